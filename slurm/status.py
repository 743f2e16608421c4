"""How runs stand: `python -m slurm.status RUN...`, a table of run directories, or of all those below a directory.

Everything is read from what a run writes (metrics.jsonl, manifest.json, exit.json, checkpoints); where Slurm is at
hand, squeue says what the run's jobs do. Nothing is written, nothing of a run has to answer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from errors import UsageError, UserError
from parallel import catalog
from run import exits
from run.signals import REQUEUE
from slurm.jobs import job_states, read_jobs
from strict_yaml import load_yaml

TAIL_BYTES = 1 << 18
RECENT = 20  # steps that the speed is a mean of
DEPTH = 3  # directories below a given one that are searched
WIDTH = 160  # characters, where no terminal says
SILENT_S = 120.0  # and 20 steps: after so long a run that says nothing is said to be silent


@dataclass(frozen=True)
class Status:
    """One run. Times in seconds; what is not known is None.

    state:      RUNNING, PENDING, ... of its newest job; else done, stopped, failed, running, or silent
    checkpoint: step of the newest complete one, and its age; restarts: starts after the first one
    exit:       code and reason of the last end that was said
    """

    run: str
    state: str
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    eta_s: float | None = None
    checkpoint: int | None = None
    checkpoint_age_s: float | None = None
    restarts: int = 0
    exit: str | None = None


def find_runs(places: Sequence[Path]) -> list[Path]:
    """Run directories among and below the given ones. Raises UsageError for a place that does not exist."""
    found: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise UsageError(f"{place} is no directory")
        found |= dict.fromkeys(_below(place, DEPTH))
    return list(found)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "resolved.yaml").is_file():
        yield folder
    elif depth:
        try:
            folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "code")
        except OSError as error:
            raise UsageError(f"cannot read {folder}: {error.strerror}") from None
        for below in folders:
            yield from _below(below, depth - 1)


def read_status(run_dir: Path, now: float | None = None) -> Status:
    """The state of one run directory at `now`, seconds since the epoch.

    Raises UsageError for files that are damaged or cannot be read, UserError if Slurm does not answer.
    """
    now = time.time() if now is None else now
    try:
        return _read(run_dir, now)
    except OSError as error:
        raise UsageError(f"cannot read {error.filename or run_dir}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"a file of {run_dir} is damaged: it is no text") from None
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(f"a file of {run_dir} is damaged, or of another version: {error!r}") from None


def _read(run_dir: Path, now: float) -> Status:
    records = list(_last_records(run_dir / "metrics.jsonl"))
    recipe: dict[str, Any] = load_yaml((run_dir / "resolved.yaml").read_text(), str(run_dir / "resolved.yaml"))
    steps = recipe["train"]["steps"]
    values: dict[str, Any] = {"steps": steps, "restarts": _restarts(run_dir), "exit": _last_exit(run_dir)}
    seconds = 0.0
    if records:
        last, seconds = records[-1], statistics.fmean(record["step_time_s"] for record in records)
        values |= {key: last[key] for key in ("step", "loss", "mfu")}
        values["tokens_per_s"] = statistics.fmean(record["tokens_per_s"] for record in records)
        values["eta_s"] = seconds * (steps - last["step"])
    if newest := next(iter(catalog.by_age(run_dir / catalog.FOLDER)), None):
        with suppress(FileNotFoundError):  # deleted since, as the run goes on
            values["checkpoint_age_s"] = max(0.0, now - newest.stat().st_mtime)
            values["checkpoint"] = int(newest.name.removeprefix("step-"))
    return Status(str(run_dir), _state(run_dir, now, seconds), **values)


def _last_records(path: Path) -> Iterator[dict[str, Any]]:
    """The newest step records, oldest first; a torn line is none."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    found = []
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") == "step":
            found.append(record)
        if len(found) == RECENT:
            break
    yield from reversed(found)


def _restarts(run_dir: Path) -> int:
    path = run_dir / "manifest.json"
    return len(_json(path)["starts"]) - 1 if path.is_file() else 0


def _last_exit(run_dir: Path) -> str | None:
    """Of all starts: while a run goes on, why the start before it ended."""
    path = run_dir / exits.HISTORY
    lines = path.read_text().splitlines() if path.is_file() else []
    last = _parse(lines[-1], path) if lines else None
    return last and f"{last['code']} {last['reason'].splitlines()[0]}"


def _state(run_dir: Path, now: float, step_s: float) -> str:
    """Slurm knows best; else what the run says, or for how long it has said nothing."""
    ended = run_dir / exits.LATEST
    code = _json(ended)["code"] if ended.is_file() else None
    if code == 0:
        return "done"
    jobs = [job["id"] for job in read_jobs(run_dir)]
    if not jobs and run_dir.name.startswith("seed-"):  # a task of an array, which has the seed for its number
        jobs = [f"{job['id']}_{run_dir.name.removeprefix('seed-')}" for job in read_jobs(run_dir.parent)]
    if states := job_states(jobs):
        return max(states.values())
    if code is not None:
        return "stopped" if code == REQUEUE else "failed"
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        return "not started"
    silent = now - metrics.stat().st_mtime
    return "running" if silent < max(SILENT_S, 20 * step_s) else f"silent {_duration(silent)}"


def _json(path: Path) -> Any:
    return _parse(path.read_text(), path)


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from None


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def as_table(found: Sequence[Status]) -> Table:
    """What a person wants to see of them; run directories relative to the one above all of them."""
    above = os.path.commonpath([str(Path(each.run).absolute().parent) for each in found])
    table = Table(title=above, title_justify="left")
    for name in ("run", "state", "step", "loss", "tokens/s", "MFU", "ETA", "checkpoint", "restarts", "last exit"):
        left = name in ("run", "state", "last exit")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "last exit")
    for each in found:
        age = "" if each.checkpoint_age_s is None else f" ({_duration(each.checkpoint_age_s)} old)"
        table.add_row(
            os.path.relpath(each.run, above),
            each.state,
            f"{each.step:,}/{each.steps:,}",
            _shown(each.loss, "{:.4f}"),
            _shown(each.tokens_per_s, "{:,.0f}"),
            _shown(each.mfu, "{:.1%}"),
            "-" if each.eta_s is None else _duration(each.eta_s),
            _shown(each.checkpoint, "{:,}") + age,
            str(each.restarts),
            each.exit or "-",
        )
    return table


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m slurm.status", description="How runs stand.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or one above several")
    parser.add_argument("--json", action="store_true", help="one JSON object a run")
    options = parser.parse_args(argv)
    found, code = [], 0
    try:
        places = find_runs(options.runs)
        if not places:
            raise UsageError(f"no run (a directory with resolved.yaml) in {', '.join(map(str, options.runs))}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for place in places:
        try:
            found.append(read_status(place))
        except UserError as error:  # of one run: the others still stand as they do
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
    if options.json:
        for each in found:
            print(json.dumps(asdict(each)))
    elif found:
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        console.print(as_table(found))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
