"""A run on two nodes, hit again and again, must lose nothing beyond its last completed save and never change its curve.

    python -m tests.chaos --kills 30            a table of outcomes; exit code 1 if any is wrong

Two torchrun agents on this machine stand for two nodes with a rank each. What a batch job does is done here: when the
agents end, RUN/exit.json is read, and the run is started again unless it is done. Faults, in random order, at random
moments of start-up, steps and saves:

    kill    SIGKILL to a rank                            disk    the run's file system is full
    stop    SIGSTOP to a rank: it stands still           delete  the newest checkpoint is deleted, then a kill
    agent   SIGKILL to a torchrun agent                  flip    a byte of the newest checkpoint flips, then a kill

Checked after each fault: the run went on from a checkpoint not older than the newest undamaged one that was complete
when the fault struck. Checked at the end: every loss and every weight equals, bit for bit, those of a run that nothing
happened to. Needs root, for a small file system of its own to fill up; without it that fault is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from parallel import catalog
from parallel.checkpoint import load_weights
from tests.launch import ROOT, environment, steps, tiny, train

FAULTS = ("kill", "stop", "agent", "disk", "delete", "flip")
WEIGHTS = (6, 1, 2, 2, 2, 2)  # a rank that stands still takes a minute to be noticed and ended
STEPS_EACH = 15
LIMIT_S = 600  # for a run to go on after a fault
KEYS = (
    "checkpoint.interval=2",
    "optimizer.master=none",
    "optimizer.update=stochastic",
    "watch.hang_least_s=4",
    "parallel.timeout_s=60",
)


@dataclass
class Outcome:
    """One fault. newest: step of the newest undamaged checkpoint when it struck; resumed: where the run went on."""

    fault: str
    at: int
    newest: int
    resumed: int
    ends: list[str]
    seconds: float

    @property
    def wrong(self) -> bool:
        return self.resumed < self.newest


@dataclass
class Nodes:
    """The agents of one start after the other."""

    run: Path
    arguments: list[str]
    log: Path
    agents: list[subprocess.Popen] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    starts: int = 0

    def start(self) -> None:
        """Both agents, as slurm/node.py does."""
        port, self.starts = 21000 + random.randrange(8000), self.starts + 1
        (self.run / "exit.json").unlink(missing_ok=True)
        for node in range(2):
            words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
            words += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={self.starts}"]
            words += [f"--rdzv-conf=is_host={int(node == 0)}", "--local-addr=127.0.0.1", "--max-restarts=2"]
            with self.log.open("a") as log:
                command = [*words, str(ROOT / "train.py"), *self.arguments]
                self.agents.append(subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=log, stderr=log))

    def workers(self) -> list[psutil.Process]:
        """Ranks that live, orphans of a killed agent too."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                ours = str(ROOT / "train.py") in words and "torch.distributed.run" not in words
                if ours and self.arguments[1] in words and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def tend(self) -> None:
        """What srun and the batch script do: end the other node after one has failed, then start again or be done."""
        codes = [agent.poll() for agent in self.agents]
        if any(codes) and None in codes:
            deadline = time.monotonic() + 40  # srun --wait; torchrun kills a stopped worker after 30 s
            while None in [agent.poll() for agent in self.agents] and time.monotonic() < deadline:
                time.sleep(0.1)
        if None in [agent.poll() for agent in self.agents] and not any(codes):
            return
        self.end()
        ended = self.run / "exit.json"
        self.ends.append(json.loads(ended.read_text())["reason"].splitlines()[0] if ended.is_file() else "no word")
        if not self.done:
            self.start()

    @property
    def done(self) -> bool:
        ended = self.run / "exit.json"
        return not self.agents and ended.is_file() and json.loads(ended.read_text())["code"] == 0

    def end(self) -> None:
        """Whatever still lives of this start."""
        time.sleep(0.5 if self.workers() else 0)
        for process in [*self.workers(), *(psutil.Process(a.pid) for a in self.agents if a.poll() is None)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for agent in self.agents:
            agent.wait(30)
        self.agents = []


def _complete(run: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    return [int(path.name.removeprefix("step-")) for path in catalog.by_age(run / catalog.FOLDER)]


def _starts(run: Path) -> list[int]:
    """The step from which each start went on."""
    path = run / "manifest.json"
    return [start["step"] for start in json.loads(path.read_text())["starts"]] if path.is_file() else []


def _step(run: Path) -> int:
    found = steps(run) if (run / "metrics.jsonl").is_file() else []
    return found[-1]["step"] if found else 0


class Chaos:
    """One run, its faults, and what came of them."""

    def __init__(self, folder: Path, seed: int, total: int) -> None:
        self.draw = random.Random(seed)
        self.disk = folder / "run"
        self.disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(self.disk)]
        self.mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        arguments = ["--recipe", str(tiny(folder, "run")), f"train.steps={total}", *KEYS]
        self.nodes = Nodes(self.disk, arguments, folder / "log")
        self.outcomes: list[Outcome] = []

    def close(self) -> None:
        self.nodes.end()
        if self.mounted:  # what is on it is worth keeping
            kept = self.disk.with_name("kept")
            shutil.copytree(self.disk, kept)
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)
            self.disk.rmdir()
            kept.rename(self.disk)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + LIMIT_S
        while not condition():
            if time.monotonic() > end:
                raise SystemExit(f"waited {LIMIT_S} s for {what}; log: {self.nodes.log}")
            self.nodes.tend()
            time.sleep(0.02)

    def strike(self, fault: str) -> None:
        """One fault at a random moment after the run has made progress, until it has gone on."""
        run, draw = self.disk, self.draw
        reached = max(_complete(run), default=0)
        self.wait(lambda: self.nodes.done or max(_complete(run), default=0) >= reached + 4, "progress")
        time.sleep(draw.uniform(0, 0.6))
        if self.nodes.done:
            return
        began, starts, ends, at = time.monotonic(), len(_starts(run)), len(self.nodes.ends), _step(run)
        complete = _complete(run)
        if fault in ("delete", "flip"):
            complete = self.damage(run / catalog.FOLDER / catalog.folder_name(complete[0]), fault)
        filler = run / "filler"
        if fault == "disk":
            free = shutil.disk_usage(run).free
            with suppress(OSError):  # the run writes, too: full all the same
                filler.write_bytes(bytes(max(0, free - 4096 * draw.randrange(4))))
            self.wait(lambda: len(self.nodes.ends) > ends, "the full disk to be noticed")
            filler.unlink()
        elif fault == "agent":
            draw.choice(self.nodes.agents).kill()
        elif workers := self.nodes.workers():
            with suppress(psutil.NoSuchProcess):
                draw.choice(workers).send_signal(signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
        self.wait(lambda: len(_starts(run)) > starts, f"a start after {fault}")
        resumed = _starts(run)[starts]
        self.wait(lambda: self.nodes.done or _step(run) > resumed, f"a step after {fault}")
        how = self.nodes.ends[ends:] or ["restarted by torchrun"]
        self.outcomes.append(Outcome(fault, at, complete[0], resumed, how, time.monotonic() - began))
        print(f"{len(self.outcomes)}: {self.outcomes[-1]}", file=sys.stderr, flush=True)

    def damage(self, newest: Path, fault: str) -> list[int]:
        """Delete a checkpoint or flip a byte of one of its files; the steps of those that are left."""
        if fault == "delete":
            shutil.rmtree(newest)
        else:
            file = self.draw.choice(sorted(newest.iterdir()))
            content = bytearray(file.read_bytes())
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
            file.write_bytes(content)
        damaged = int(newest.name.removeprefix("step-"))
        return [step for step in _complete(self.disk) if step < damaged]


def run_chaos(folder: Path, kills: int, seed: int, faults: Sequence[str] = ()) -> tuple[list[Outcome], list[str]]:
    """Outcomes of `kills` faults (or of those named), and what was found wrong at the end."""
    draw, total = random.Random(seed), STEPS_EACH * kills
    straight = train(tiny(folder, "straight"), f"train.steps={total}", *KEYS, ranks=2, timeout=60 + 3 * total)
    if straight.returncode:
        raise SystemExit(straight.stderr)
    chaos = Chaos(folder, seed, total)
    planned = list(faults) or draw.choices(FAULTS, WEIGHTS, k=kills)
    try:
        chaos.nodes.start()
        for fault in planned:
            if fault != "disk" or chaos.mounted:
                chaos.strike(fault)
        chaos.wait(lambda: chaos.nodes.done, "the end")
        wrong = [f"{each.fault} at step {each.at}: lost a completed save" for each in chaos.outcomes if each.wrong]
        ours, theirs = ([record["loss"] for record in steps(folder / name)] for name in ("straight", "run"))
        if ours != theirs:
            wrong.append("the losses differ from those of the run that nothing happened to")
        mine, other = (load_weights(folder / name) for name in ("straight", "run"))
        if not all(torch.equal(mine[name], other[name]) for name in mine):
            wrong.append("the weights differ from those of the run that nothing happened to")
        return chaos.outcomes, wrong
    finally:
        chaos.close()


def as_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table()
    for name in ("fault", "at step", "newest save", "went on from", "steps lost", "ended how", "seconds", "verdict"):
        table.add_column(name, justify="left" if name in ("fault", "ended how", "verdict") else "right")
    for each in outcomes:
        numbers = (each.at, each.newest, each.resumed, max(0, each.at - each.resumed))
        verdict = "LOST A SAVE" if each.wrong else "ok"
        table.add_row(each.fault, *map(str, numbers), "; ".join(each.ends)[:70], f"{each.seconds:.0f}", verdict)
    return table


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, metavar="N", help="faults (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FAULTS, nargs="+", help="these faults, in this order")
    parser.add_argument("--keep", action="store_true", help="leave the run's directory")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    faults = options.only or ()
    outcomes, wrong = run_chaos(folder, len(faults) or options.kills, options.seed, faults)
    Console(width=None if sys.stdout.isatty() else 170).print(as_table(outcomes))
    for each in wrong:
        print(f"WRONG: {each}")
    print(f"{len(outcomes)} faults, {len(wrong)} wrong" + ("" if wrong else "; curve bit-equal"))
    if options.keep:
        print(f"kept in {folder}")
    if not options.keep:
        shutil.rmtree(folder)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
