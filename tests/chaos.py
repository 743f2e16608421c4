"""A run on two nodes, hit again and again, must lose nothing beyond its last completed save and never change its curve.

    python -m tests.chaos --kills 30            a table of outcomes; exit code 1 if any is wrong

Two torchrun agents on this machine stand for two nodes with a rank each. What a batch job does is done here: when the
agents end, RUN/exit.json is read, and the run is started again unless it is done. Faults, in random order, at random
moments of steps and saves:

    kill    SIGKILL to a rank                            disk    the run's file system is full
    twice   the same, and again while the run starts     delete  the newest checkpoint is deleted, then a kill
    stop    SIGSTOP to a rank: it stands still           flip    a byte of the newest checkpoint flips, then a kill
    agent   SIGKILL to a torchrun agent

Checked after each fault (`judge`): the run went on from a checkpoint not older than the newest undamaged one that was
complete when the fault struck, and never from the damaged one; it ended in the way that this fault should make it end,
and with a code after which slurm/train.sbatch goes on; every loss so far equals, bit for bit, that of a run that
nothing happened to. At the end the weights do, too. Needs root, for a small file system of its own to fill up; without
it that fault is left out.
"""

from __future__ import annotations

import argparse
import json
import math
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

from parallel import catalog
from parallel.checkpoint import load_weights
from run import exits
from run.watchdog import FOLDER as STACKS
from slurm.node import ATTEMPT
from tests.chaos_verdict import Curve, Ending, Outcome, as_table, judge
from tests.launch import ROOT, environment, steps, tiny, train

FAULTS = ("kill", "twice", "stop", "agent", "disk", "delete", "flip")
WEIGHTS = (4, 2, 1, 2, 2, 2, 2)  # a rank that stands still takes a minute to be noticed and ended
STEPS_EACH, SECONDS_EACH = 15, 2.0  # the least between two faults, which come 4 steps and up to 0.6 s after a resume
LIMIT_S = 600  # for a run to go on after a fault
KEYS = (
    "checkpoint.interval=2",
    "optimizer.master=none",
    "optimizer.update=stochastic",
    "watch.hang_least_s=10",
    "parallel.timeout_s=60",
)


@dataclass
class Moment:
    """How the run stood when a fault struck: its step, complete checkpoints (newest first), and what it had said."""

    at: int
    complete: list[int]
    starts: int
    ends: int
    exits: int
    stacks: int
    log: int


@dataclass
class Nodes:
    """The agents of one start after the other."""

    run: Path
    arguments: list[str]
    log: Path
    agents: list[subprocess.Popen] = field(default_factory=list)
    ends: list[Ending] = field(default_factory=list)
    starts: int = 0

    def start(self) -> None:
        """Both agents, as slurm/node.py does."""
        port, self.starts = 21000 + random.randrange(8000), self.starts + 1
        (self.run / exits.LATEST).unlink(missing_ok=True)
        for node in range(2):
            words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
            words += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={self.starts}"]
            words += [f"--rdzv-conf=is_host={int(node == 0)}", "--local-addr=127.0.0.1", "--max-restarts=2"]
            with self.log.open("a") as log:
                command = [*words, str(ROOT / "train.py"), *self.arguments]
                variables = environment() | {ATTEMPT: str(self.starts)}
                self.agents.append(subprocess.Popen(command, env=variables, cwd=ROOT, stdout=log, stderr=log))

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
        ended = self.run / exits.LATEST
        said = json.loads(ended.read_text()) if ended.is_file() else {"code": None, "reason": "no word"}
        self.ends.append((said["code"], said["reason"].splitlines()[0]))
        if not self.done:
            self.start()

    @property
    def done(self) -> bool:
        ended = self.run / exits.LATEST
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


def _lines(path: Path) -> list[dict]:
    """Complete records of a file that is being written."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _curve(run: Path) -> Curve:
    """Step and loss of all steps so far."""
    return [(each["step"], each["loss"]) for each in _lines(run / "metrics.jsonl") if each["kind"] == "step"]


def _step(run: Path) -> int:
    return max((step for step, _ in _curve(run)), default=0)


def _size(path: Path) -> int:
    """Bytes of a file, or of those in a directory; 0 if it is not there."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


class Chaos:
    """One run, its faults, and what came of them. straight: losses of the run that nothing happened to."""

    def __init__(self, folder: Path, seed: int, total: int, straight: Curve) -> None:
        self.draw, self.straight = random.Random(seed), straight
        self.disk = folder / "run"
        self.disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(self.disk)]
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
            time.sleep(0.05)

    def look(self) -> Moment:
        run = self.disk
        return Moment(
            at=_step(run),
            complete=_complete(run),
            starts=len(_starts(run)),
            ends=len(self.nodes.ends),
            exits=len(_lines(run / exits.HISTORY)),
            stacks=_size(run / STACKS),
            log=_size(self.nodes.log),
        )

    def strike(self, fault: str) -> None:
        """One fault at a random moment after the run has made progress, until it has gone on."""
        run, draw = self.disk, self.draw
        reached = max(_complete(run), default=0)
        self.wait(lambda: self.nodes.done or max(_complete(run), default=0) >= reached + 4, "progress")
        time.sleep(draw.uniform(0, 0.6))
        if self.nodes.done:
            return
        moment, damaged, began = self.look(), None, time.monotonic()
        if fault == "twice":
            target, moment = self.kill_twice()
        elif fault == "disk":
            target = self.fill_up()
        elif fault == "agent":
            node = draw.randrange(2)
            self.nodes.agents[node].kill()
            target = f"agent {node}"
        else:
            target = ""
            if fault in ("delete", "flip"):
                damaged, target = self.damage(run / catalog.FOLDER / catalog.folder_name(moment.complete[0]), fault)
            target += self.send(signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
        self.wait(lambda: len(_starts(run)) > moment.starts, f"a start after {fault}")
        resumed = _starts(run)[moment.starts]
        log = lambda: self.nodes.log.read_bytes()[moment.log :].decode(errors="replace")  # noqa: E731
        # Until the log says so, metrics.jsonl still has the steps that the fault took back.
        self.wait(lambda: f"(step {resumed}, " in log(), f"the log to say that it goes on after {fault}")
        self.wait(lambda: self.nodes.done or _step(run) > resumed, f"a step after {fault}")
        said = [(each["code"], each["reason"]) for each in _lines(run / exits.HISTORY)[moment.exits :]]
        newest = next((step for step in moment.complete if damaged is None or step < damaged), 0)
        ends, seconds, number = self.nodes.ends[moment.ends :], time.monotonic() - began, len(self.outcomes) + 1
        outcome = Outcome(number, fault, target, moment.at, newest, damaged, resumed, ends, said, seconds)
        outcome.wrong = judge(outcome, _size(run / STACKS) - moment.stacks, log(), _curve(run), self.straight)
        self.outcomes.append(outcome)
        print(outcome.describe(), file=sys.stderr, flush=True)

    def send(self, number: signal.Signals) -> str:
        """A signal to one of the ranks that live; which."""
        if not (workers := self.nodes.workers()):
            return "no rank, none lived"
        worker, rank = self.draw.choice(workers), "a rank that had ended"
        with suppress(psutil.Error):
            rank = f"rank {worker.environ()['RANK']}"
            worker.send_signal(number)
        return rank

    def kill_twice(self) -> tuple[str, Moment]:
        """Kill a rank, then one of those that start after it; what, and how the run stood at the second kill."""
        old = {worker.pid for worker in self.nodes.workers()}
        first = self.send(signal.SIGKILL)
        self.wait(lambda: len({worker.pid for worker in self.nodes.workers()} - old) == 2, "both ranks to start again")
        pause = self.draw.uniform(0, 15)  # a start takes about as long here
        end = time.monotonic() + pause
        self.wait(lambda: time.monotonic() > end, "a moment of the start")
        moment = self.look()
        return f"{first}, {pause:.0f} s into the start {self.send(signal.SIGKILL)}", moment

    def fill_up(self) -> str:
        """Leave next to nothing of the disk until the run has ended of it."""
        filler, ends, left = self.disk / "filler", len(self.nodes.ends), 4096 * self.draw.randrange(4)
        with suppress(OSError):  # the run writes, too: full all the same
            filler.write_bytes(bytes(max(0, shutil.disk_usage(self.disk).free - left)))
        self.wait(lambda: len(self.nodes.ends) > ends, "the full disk to be noticed")
        filler.unlink()
        return f"the disk, {left} bytes left"

    def damage(self, newest: Path, fault: str) -> tuple[int, str]:
        """Delete a checkpoint or flip a bit of one of its files; its step, and what was done."""
        step = int(newest.name.removeprefix("step-"))
        if fault == "delete":
            shutil.rmtree(newest)
            return step, f"{newest.name} and "
        file = self.draw.choice(sorted(newest.iterdir()))
        content = bytearray(file.read_bytes())
        at = self.draw.randrange(len(content))
        content[at] ^= 1 << self.draw.randrange(8)
        file.write_bytes(content)
        return step, f"{newest.name}/{file.name} byte {at} and "


def run_chaos(folder: Path, kills: int, seed: int, faults: Sequence[str] = ()) -> tuple[list[Outcome], list[str]]:
    """Outcomes of `kills` faults (or of those named), and everything that was found wrong."""
    draw = random.Random(seed)
    pace = train(tiny(folder, "pace"), "train.steps=10", *KEYS, ranks=2)
    if pace.returncode:
        raise SystemExit(pace.stderr)
    seconds = min(record["step_time_s"] for record in steps(folder / "pace"))  # what slows others down may end
    total = max(STEPS_EACH, math.ceil(SECONDS_EACH / seconds)) * kills
    straight = train(tiny(folder, "straight"), f"train.steps={total}", *KEYS, ranks=2, timeout=60 + 3 * total)
    if straight.returncode:
        raise SystemExit(straight.stderr)
    right = _curve(folder / "straight")
    chaos = Chaos(folder, seed, total, right)
    planned = list(faults) or draw.choices(FAULTS, WEIGHTS, k=kills)
    planned = [fault for fault in planned if fault != "disk" or chaos.mounted]
    try:
        chaos.nodes.start()
        for fault in planned:
            chaos.strike(fault)
        chaos.wait(lambda: chaos.nodes.done, "the end")
        wrong = [f"fault {each.number} ({each.fault}): {text}" for each in chaos.outcomes for text in each.wrong]
        if len(chaos.outcomes) < len(planned):
            wrong.append(f"the run was done after {len(chaos.outcomes)} of {len(planned)} faults")
        if _curve(folder / "run") != right:
            wrong.append("the losses differ from those of the run that nothing happened to")
        mine, other = (load_weights(folder / name) for name in ("straight", "run"))
        if not all(torch.equal(mine[name], other[name]) for name in mine):
            wrong.append("the weights differ from those of the run that nothing happened to")
        return chaos.outcomes, wrong
    finally:
        chaos.close()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, metavar="N", help="faults (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FAULTS, nargs="+", help="these faults, in this order")
    parser.add_argument("--keep", action="store_true", help="leave the run's directory")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    faults, began = options.only or (), time.monotonic()
    outcomes, wrong = run_chaos(folder, len(faults) or options.kills, options.seed, faults)
    Console(width=None if sys.stdout.isatty() else 200).print(as_table(outcomes))
    for each in wrong:
        print(f"WRONG: {each}")
    minutes = f"{(time.monotonic() - began) / 60:.0f} min"
    print(f"{len(outcomes)} faults, {len(wrong)} wrong, {minutes}" + ("" if wrong else "; curve and weights bit-equal"))
    if options.keep:
        print(f"kept in {folder}")
    if not options.keep:
        shutil.rmtree(folder)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
