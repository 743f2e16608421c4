"""Data: batches against nanoGPT-style window sampling, preparation against one Megatron-style
process.

nanoGPT opens the memory map for every batch, draws random windows, and converts each window by
itself, once for the tokens and once for the labels. Megatron-LM's `preprocess_data.py` with one
worker encodes document by document and appends each to the file; ours is timed with its start as a
command. Both get the same tokens, the same SentencePiece model and the same machine as ours.

    python -m bench.data [--json FILE|-]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from bench.common import interleaved, parser, report
from data.config import DataConfig
from data.documents import read_texts
from data.loader import open_data
from data.prepare import PrepareOptions, prepare

_ROOT = Path(__file__).resolve().parent.parent
_CORPUS = _ROOT / "data/corpus/sotu.jsonl.xz"
_VOCAB_SIZE = 8192


def loader_figures(prefix: Path, *, batch: int, seq_len: int, batches: int, repetitions: int) -> dict[str, float]:
    """Tokens per second of our stream (also with document resets) and of window sampling."""
    streams = {}
    for name, reset in (("ours", False), ("ours_with_resets", True)):
        config = DataConfig(
            train=str(prefix),
            validation=None,
            tokenizer=None,
            cache=str(prefix.parent),
            reset_at_document=reset,
        )
        streams[name] = open_data(config, vocab_size=_VOCAB_SIZE, seq_len=seq_len, seed=1).train

    def ours(name: str) -> None:
        for index in range(batches):
            streams[name].batch(range(index * batch, (index + 1) * batch))

    def windows() -> None:
        for _ in range(batches):
            _nanogpt_batch(prefix, batch, seq_len)

    variants: dict[str, Callable[[], object]] = {name: partial(ours, name) for name in streams}
    variants["windows"] = windows
    seconds = interleaved(variants, repetitions)
    figures = {f"loader_{name}_mtok_per_s": batches * batch * seq_len / 1e6 / s for name, s in seconds.items()}
    return figures | {"loader_ratio": seconds["windows"] / seconds["ours"]}


def _nanogpt_batch(prefix: Path, batch: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - seq_len, (batch,)).tolist()
    x = torch.stack([torch.from_numpy(data[i : i + seq_len].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + seq_len].astype(np.int64)) for i in starts])
    return x, y


def prepare_figures(text: Path, tokenizer: Path, *, workers: int, repetitions: int) -> dict[str, float]:
    """MB/s of `data.prepare`, and of one process encoding document by document."""
    megabytes = text.stat().st_size / 1e6
    output = text.parent / "prepared"
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "data.prepare",
        "--input",
        text,
        "--output",
        output,
    ]
    command += ["--tokenizer", tokenizer, "--workers", str(workers)]

    def ours() -> None:
        subprocess.run(command, cwd=_ROOT, stdout=subprocess.DEVNULL, check=True)

    seconds = interleaved(
        {
            "ours": ours,
            "one_process": lambda: _megatron_prepare(text, tokenizer),
        },
        repetitions,
    )
    assert Path(f"{output}.bin").read_bytes() == text.with_suffix(".bin").read_bytes()
    figures = {f"prepare_{name}_mb_per_s": megabytes / s for name, s in seconds.items()}
    return figures | {"prepare_ratio": seconds["one_process"] / seconds["ours"]}


def _megatron_prepare(text: Path, tokenizer: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    with open(text, encoding="utf-8") as lines, open(text.with_suffix(".bin"), "wb") as out:
        for line in lines:
            ids = [*model.encode(json.loads(line)["text"]), model.eos_id()]
            out.write(np.array(ids, dtype=np.uint16).tobytes())


def main() -> None:
    """Run the bench."""
    options = parser(__doc__)
    options.add_argument("--copies", type=int, default=3, help="of the corpus, to prepare (%(default)s)")
    options.add_argument("--repetitions", type=int, default=3, help="of preparing (%(default)s)")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "corpus")
        prepare(PrepareOptions(inputs=(_CORPUS,), output=prefix, tokenizer="bpe", vocab_size=_VOCAB_SIZE))
        text = Path(folder, "text.jsonl")
        lines = [json.dumps({"text": document}) for document in read_texts([_CORPUS], "file", "text")]
        text.write_text("\n".join(lines * given.copies) + "\n")
        tokenizer = Path(f"{prefix}.tokenizer.model")
        figures = loader_figures(prefix, batch=64, seq_len=1024, batches=100, repetitions=9)
        figures |= prepare_figures(text, tokenizer, workers=2, repetitions=given.repetitions)
    report({"prepare_workers": 2, **figures}, given.json)


if __name__ == "__main__":
    main()
