"""How a run ended, for whoever decides what comes next: torchrun tells nobody the exit codes of its workers.

    RUN/exit.json     {"code": 75, "reason": "received SIGUSR1"}; there is none while the run goes on
    RUN/exits.jsonl   one line an exit, with its time and the start of a job that it ended, over all starts

Every rank may know why a run ends; the first one to say so is right, because the others' errors are mostly its
consequences. A run that was killed, or whose node was lost, says nothing: no exit.json. Codes: docs/slurm.md.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from errors import CheckpointError, DataError, StuckError, UsageError, UserError
from run.signals import REQUEUE, pending

LATEST, HISTORY = "exit.json", "exits.jsonl"
CRASHED = 1
# Of a run that would end the same way if it were started again: usage, data, checkpoint, stuck (errors.py).
FINAL = (UsageError.exit_code, DataError.exit_code, CheckpointError.exit_code, StuckError.exit_code)
# How gloo and NCCL say that the other end of a connection died; perhaps inside an error of a save.
CLOSED = ("closed by peer", "reset by peer", "remote process exited")
GONE = (*CLOSED, "Timed out waiting")


class Ending(NamedTuple):
    """code: of the process; known: the reason says it all, else a traceback should follow."""

    code: int
    reason: str
    known: bool


def settled(run_dir: Path, attempt: str | None) -> int | None:
    """The final code with which processes of this very start have ended already; None: there is none.

    torchrun restarts workers whatever they ended with; those that it starts after a final code need not train again to
    find the same. None where no start is known, as of a torchrun by hand, where the user may have mended it.
    """
    path = run_dir / HISTORY
    if attempt is None or not path.is_file():
        return None
    try:
        last = json.loads(path.read_text().splitlines()[-1])
    except (ValueError, IndexError):  # torn by a full disk: nobody can say
        return None
    return last["code"] if last.get("attempt") == attempt and last["code"] in FINAL else None


def clear(run_dir: Path) -> None:
    """The run begins (again): what an earlier start said is history. Raises UserError."""
    forget(run_dir / LATEST)


def forget(path: Path) -> None:
    """Delete a file of the run directory, if it is there. Raises UserError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to run directory {path.parent}: {error.strerror}; choose another run.dir"
        ) from None


def explain(error: Exception) -> Ending:
    """What an error that ended the run means to the user, and to what comes next."""
    text = str(error)
    if any(sign in text for sign in GONE):
        return Ending(CRASHED, f"another rank is gone, and its own message or its node's log says why ({text})", True)
    if isinstance(error, UserError):
        return Ending(error.exit_code, text, True)
    return Ending(CRASHED, f"{type(error).__name__}: {text}", False)


def record(run_dir: Path | None, code: int, reason: str, rank: int, attempt: str | None = None) -> None:
    """Say that the run ends, unless another rank has; nothing without a run directory. attempt: as of `settled`."""
    if run_dir is None or not run_dir.is_dir():
        return
    try:
        _create(run_dir / LATEST, json.dumps({"code": code, "reason": reason}) + "\n")
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with open(run_dir / HISTORY, "a") as history:
            line = {"time": time, "code": code, "reason": reason, "rank": rank, "attempt": attempt}
            history.write(json.dumps(line) + "\n")
    except FileExistsError:
        return
    except OSError as error:  # a full disk: the message of what ends the run has been printed
        print(f"cannot record the exit in {run_dir}: {error.strerror}", file=sys.stderr, flush=True)


def stopped_before(run_dir: Path) -> bool:
    """Whether a signal asked the run to stop while there was no run to take it; records that as the run's end."""
    name = pending()
    if name is not None:
        record(run_dir, REQUEUE, f"received {name} before the run began", rank=0)
    return name is not None


def _create(path: Path, text: str) -> None:
    """A new file with all of `text`, or none. Raises OSError, FileExistsError among them."""
    with open(path, "x") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            path.unlink()
            raise
