"""How a run ended, for whoever decides what comes next: torchrun tells nobody the exit codes of its workers.

    RUN/exit.json     {"code": 75, "reason": "received SIGUSR1"}; there is none while the run goes on
    RUN/exits.jsonl   one line an exit, with its time, over all starts

Every rank may know why a run ends; the first one to say so is right, because the others' errors are mostly its
consequences. A run that was killed, or whose node was lost, says nothing: no exit.json. Codes: docs/slurm.md.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from errors import UserError

LATEST, HISTORY = "exit.json", "exits.jsonl"
CRASHED = 1
# How gloo and NCCL say that the other end of a connection died; perhaps inside an error of a save.
GONE = ("closed by peer", "reset by peer", "Timed out waiting", "remote process exited")


class Ending(NamedTuple):
    """code: of the process; known: the reason says it all, else a traceback should follow."""

    code: int
    reason: str
    known: bool


def clear(run_dir: Path) -> None:
    """The run begins (again): what an earlier start said is history. Raises UserError."""
    try:
        (run_dir / LATEST).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to run directory {run_dir}: {error.strerror}; choose another run.dir") from None


def explain(error: Exception) -> Ending:
    """What an error that ended the run means to the user, and to what comes next."""
    text = str(error)
    if any(sign in text for sign in GONE):
        return Ending(CRASHED, f"another rank is gone, and its own message or its node's log says why ({text})", True)
    if isinstance(error, UserError):
        return Ending(error.exit_code, text, True)
    return Ending(CRASHED, f"{type(error).__name__}: {text}", False)


def record(run_dir: Path | None, code: int, reason: str, rank: int) -> None:
    """Say that the run ends, unless another rank has; nothing without a run directory."""
    if run_dir is None or not run_dir.is_dir():
        return
    try:
        _create(run_dir / LATEST, json.dumps({"code": code, "reason": reason}) + "\n")
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with open(run_dir / HISTORY, "a") as history:
            history.write(json.dumps({"time": time, "code": code, "reason": reason, "rank": rank}) + "\n")
    except FileExistsError:
        return
    except OSError as error:  # a full disk: the message of what ends the run has been printed
        print(f"cannot record the exit in {run_dir}: {error.strerror}", file=sys.stderr, flush=True)


def _create(path: Path, text: str) -> None:
    """A new file with all of `text`, or none. Raises OSError, FileExistsError among them."""
    with open(path, "x") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            path.unlink()
            raise
