"""Start train.py as a user would: one process, or several under torchrun, on a small model and corpus."""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.spawn import SERVED

ROOT = Path(__file__).parent.parent
TINY = """
model: {vocab_size: 320, hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_size: 64}
data: {train: CORPUS, validation: 0.2, tokenizer: bpe, documents: line, cache: CACHE}
train: {steps: 20, global_batch: 8, micro_batch: 2, seq_len: 32, compile: false}
optimizer: {lr: 1e-2}
run: {dir: RUN}
"""


def tiny(folder: Path, run: str = "run") -> Path:
    """A recipe file in `folder` (its data too) that trains in a second; the run directory is `folder/run`."""
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        lines = (f"Line {i}: the number {i * i % 97} follows {i % 13}, and {i % 7} comes after." for i in range(900))
        corpus.write_text("\n".join(lines))
    text = TINY.replace("CORPUS", str(corpus)).replace("CACHE", str(folder / "cache")).replace("RUN", str(folder / run))
    (folder / f"{run}.yaml").write_text(text)
    return folder / f"{run}.yaml"


def command(recipe: Path | str, *arguments: str, ranks: int = 1) -> list[str]:
    """ranks 1: a single process; more: torchrun on this machine, at a port that it finds free."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / "train.py"), "--recipe", str(recipe), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def train(
    recipe: Path | str,
    *arguments: str,
    ranks: int = 1,
    node_size: int | None = None,
    torchrun: bool = False,
    timeout: float = 300,
    script: Path = ROOT / "train.py",
    variables: Sequence[Mapping[str, str]] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; output is captured. A run that does not end fails with what it wrote.

    node_size: pretend that so many ranks are on a node; script: takes the command line instead of train.py; variables:
    of the environment, for each rank. Processes are forked from the server that has everything imported, unless the
    launcher itself is what is tested.
    """
    words = command(recipe, *arguments, ranks=ranks)
    if torchrun:
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment(), cwd=ROOT)
    more = variables or [{}] * ranks
    return _served([str(script), *command(recipe, *arguments)[2:]], ranks, node_size or ranks, timeout, more)


def run_script(*argv: str, ranks: int = 1, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python *argv`, on so many ranks."""
    return _served(list(argv), ranks, ranks, timeout, [{}] * ranks)


def _served(
    argv: list[str], ranks: int, node_size: int, timeout: float, more: Sequence[Mapping[str, str]]
) -> subprocess.CompletedProcess[str]:
    """The highest exit code of all ranks, and their output one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())} if ranks > 1 else {}
        outputs = [(Path(folder, f"stdout{rank}"), Path(folder, f"stderr{rank}")) for rank in range(ranks)]
        processes = []
        for rank, files in enumerate(outputs):
            place = {"RANK": rank, "LOCAL_RANK": rank % node_size, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": node_size}
            variables = environment() | meeting | {name: str(value) for name, value in place.items()} | dict(more[rank])
            processes.append(SERVED.Process(target=_run_script, args=(argv, variables, *files)))
            processes[-1].start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(end - time.monotonic(), 0.1))
        codes = [process.exitcode for process in processes]
        if None in codes:
            for process in processes:
                process.kill()
                process.join()
        texts = ["".join(files[which].read_text() for files in outputs) for which in (0, 1)]
        assert None not in codes, f"{argv} after {timeout:.0f} s: exit codes {codes}\n" + "\n".join(texts)
        return subprocess.CompletedProcess(argv, max(codes, key=abs), *texts)


def _free_port() -> int:
    """A port below those that the kernel hands out by itself (from 32768 on): connections of other tests take these at
    any time, also between this look and the moment when rank 0 listens.
    """
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _run_script(argv: list[str], variables: dict[str, str], stdout: Path, stderr: Path) -> None:
    """`python *argv` in this process."""
    os.environ.update(variables)
    torch.set_num_threads(1)  # torch has read OMP_NUM_THREADS when the server started
    os.chdir(ROOT)
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def steps(run_dir: Path) -> list[dict]:
    """Step records of metrics.jsonl."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "step"]
