"""Train a recipe and its baseline from the same initial weights and data, and show their difference while they train.

A run is `train.py` in as many processes as `parallel.ranks` says, in OUT/<recipe>_<hash>_seed<n>; the hash covers
everything that can change its losses. A run that is there and finished is not run again; one that was stopped resumes.
Equal seeds mean equal weights and data order (an initial weight is a function of seed, name and index; a sample of seed
and position).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from errors import UsageError
from recipe import Recipe, refuse, resolve, to_dict
from report.compare.pairing import NotComparable, disagreements

ROOT = Path(__file__).parent.parent.parent
WINDOW = 50  # steps of the moving mean that is shown live
POLL_S = 0.5
LINE_S = 30.0  # between two lines where no terminal can redraw


def config_hash(name: str, overrides: tuple[str, ...]) -> str:
    """12 hex digits over every key that can change a loss and is not at its default: keys to come change nothing."""
    recipe = resolve(name, overrides)
    tree = {
        section.name: _chosen(getattr(recipe, section.name))
        for section in dataclasses.fields(recipe)
        if section.name not in ("name", "description", "run", "metrics", "checkpoint", "watch", "probe")
    }
    text = json.dumps({key: value for key, value in tree.items() if value}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _chosen(value: Any) -> Any:
    """The fields of a section that are not at their defaults; anything else as it is."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: (getattr(value, f.name), f) for f in dataclasses.fields(value)}
    return {name: chosen for name, (chosen, f) in fields.items() if chosen != _default(f)}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@dataclass
class Training:
    """One run of train.py, followed by reading its metrics.jsonl as it grows.

    ranks: its processes; threads: of each. losses: {step: nats}, NaN not finite.
    """

    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    threads: int = 1
    ranks: int = 1
    losses: dict[int, float] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _errors: IO[bytes] | None = None
    _read: tuple[int, int] = (0, 0)  # inode and offset: a resumed run replaces the file

    @property
    def done(self) -> bool:
        """Whether the folder holds a finished run."""
        ended = self.folder / "exit.json"
        return ended.exists() and json.loads(ended.read_text())["code"] == 0

    @property
    def running(self) -> bool:
        """Whether the process lives. Raises UsageError once it has failed."""
        if self._process is None or self._errors is None:
            return False
        if self._process.poll() is None:
            return True
        code, self._process = self._process.returncode, None
        if code or not self.done:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace")[-2000:]
            raise UsageError(f"the run in {self.folder} ended with {code}:\n{said}")
        return False

    def start(self) -> None:
        """Start the process; a finished run is left alone."""
        if self.done:
            return
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        command = ["env", f"OMP_NUM_THREADS={self.threads}", sys.executable, *(launcher if self.ranks > 1 else [])]
        command += ["train.py", "--recipe", self.recipe, f"run.dir={self.folder}", *self.overrides]
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=self._errors)

    def stop(self) -> None:
        """Ask the process to save and end, and wait for it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def follow(self) -> None:
        """Read the whole lines written since the last call."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        with open(path, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            offset = self._read[1] if self._read[0] == inode else 0
            file.seek(offset)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read = (inode, offset + len(text))
        for line in text.splitlines():
            record = json.loads(line)
            if record.get("kind") == "step":
                self.losses[record["step"]] = math.nan if record["loss"] is None else record["loss"]


def training(recipe: str, seed: int, overrides: tuple[str, ...], out: Path, threads: int = 1) -> Training:
    """The run of a recipe with a seed under `out`."""
    overrides = (*overrides, f"train.seed={seed}")
    folder = out.resolve() / f"{recipe_name(recipe)}_{config_hash(recipe, overrides)}_seed{seed}"
    ranks = loaded(recipe, overrides).parallel.ranks or 1
    return Training(recipe=recipe, overrides=overrides, folder=folder, threads=max(1, threads // ranks), ranks=ranks)


def loaded(name: str, overrides: tuple[str, ...]) -> Recipe:
    """The recipe, validated for the ranks that it is laid out for. Raises UsageError."""
    recipe = resolve(name, overrides)
    refuse(recipe, recipe.problems(recipe.parallel.ranks or 1))
    return recipe


def recipe_name(recipe: str) -> str:
    """Name of a recipe given by name or as a file."""
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


def run_all(trainings: Sequence[Training], jobs: int) -> Iterator[None]:
    """Train all in order, `jobs` at a time; yields now and then, with the losses read. A failure stops all."""
    waiting, active = deque(trainings), []
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(waiting.popleft())
                active[-1].start()
            active = [run for run in active if run.running]
            time.sleep(POLL_S if active else 0)
            for run in trainings:
                run.follow()
            yield
    finally:
        for run in active:
            run.stop()


def run_pairs(
    baseline: str, candidate: str, overrides: tuple[str, ...], *, seeds: int, jobs: int, out: Path
) -> tuple[list[Path], list[Path]]:
    """Folders of the finished baselines and candidates. Raises NotComparable before anything is trained."""
    trees = [to_dict(loaded(name, overrides)) for name in (baseline, candidate)]
    if problems := disagreements(trees[0], trees[1]):
        raise NotComparable(f"{candidate} cannot be compared with {baseline}:\n  " + "\n  ".join(problems))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pairs = [
        tuple(training(name, seed, overrides, out, threads) for name in (baseline, candidate)) for seed in range(seeds)
    ]
    steps = trees[0]["train"]["steps"]
    console, said = Console(highlight=False), -math.inf
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for _ in run_all([run for both in pairs for run in both], jobs):
            if console.is_terminal:
                live.update(_display(pairs, steps), refresh=True)
            elif time.monotonic() - said >= LINE_S:
                said = time.monotonic()
                console.print("; ".join(_progress(i, *both) for i, both in enumerate(pairs) if both[0].losses))
    return [b.folder for b, _ in pairs], [c.folder for _, c in pairs]


def difference(baseline: Training, candidate: Training) -> float | None:
    """Mean gap in percent of the loss over the last WINDOW steps that both have; None before the first."""
    common = sorted(baseline.losses.keys() & candidate.losses.keys())[-WINDOW:]
    if not common:
        return None
    return 100 * math.fsum(candidate.losses[i] / baseline.losses[i] - 1 for i in common) / len(common)


def _progress(seed: int, baseline: Training, candidate: Training) -> str:
    gap = difference(baseline, candidate)
    shown = "no common step" if gap is None else f"gap {gap:+.2f} %"
    return f"seed {seed}: {len(baseline.losses)} and {len(candidate.losses)} steps, {shown}"


def _display(pairs: Sequence[Sequence[Training]], steps: int) -> Table:
    table = Table("seed", "baseline", "candidate", f"gap over {WINDOW} steps")
    for seed, (baseline, candidate) in enumerate(pairs):
        gap = difference(baseline, candidate)
        done = (f"{len(run.losses):,}/{steps:,}" for run in (baseline, candidate))
        table.add_row(str(seed), *done, "-" if gap is None else f"{gap:+.2f} %")
    return table
