"""Jobs of a run directory: RUN/jobs.json remembers them, squeue says what they do.

[{"id": "417", "time": "2026-11-23T09:33:06Z", "command": ["sbatch", ...]}, ...]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from errors import UsageError, UserError

FILE = "jobs.json"
TIMEOUT_S = 30
FORGOTTEN = "Invalid job id"  # what squeue says of a job that ended minutes ago


def read_jobs(run_dir: Path) -> list[dict[str, Any]]:
    """The jobs that were submitted for this directory, oldest first. Raises UsageError if the file is damaged."""
    path = run_dir / FILE
    try:
        if not path.is_file():
            return []
        jobs = json.loads(path.read_text())
        assert all(isinstance(job["id"], str) for job in jobs)
        return jobs
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UsageError(f"{path} is damaged ({error!r}); move it away") from None


def remember_job(run_dir: Path, number: str, command: Sequence[str]) -> None:
    """Add a job to RUN/jobs.json. Raises UserError: the job is submitted then, and nobody will find it there."""
    entry = {"id": number, "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "command": list(command)}
    partial = run_dir / f"{FILE}.tmp"
    try:
        partial.write_text(json.dumps([*read_jobs(run_dir), entry], indent=1) + "\n")
        os.replace(partial, run_dir / FILE)
    except OSError as error:
        raise UserError(
            f"job {number} is submitted, but cannot be written to {run_dir / FILE}: {error.strerror}; "
            f"scancel {number}, or keep the number yourself"
        ) from None


def submit_job(command: Sequence[str]) -> str:
    """Run sbatch --parsable; returns the job's number. Raises UserError with what sbatch says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=4 * TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise UserError("sbatch is not found; run this on a login node of the cluster, or say --dry-run") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch did not answer within {4 * TIMEOUT_S} s; see squeue before you try again") from None
    number = done.stdout.strip().partition(";")[0]
    if done.returncode or not number:
        raise UserError(f"sbatch refused the job: {done.stderr.strip() or f'exit code {done.returncode}, no number'}")
    return number


def job_states(numbers: Sequence[str]) -> dict[str, str]:
    """Number -> state (PENDING, RUNNING, ...) of those that squeue still knows; empty where there is no squeue.

    Of several tasks of an array one state is given: RUNNING if any is, which the alphabet also puts after PENDING.
    Raises UserError if squeue does not say: a job of which nothing is known may well run.
    """
    if not numbers or shutil.which("squeue") is None:
        return {}
    ended = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
    found: dict[str, str] = {}
    for number in numbers:  # one by one: squeue fails as a whole if it does not know one of several
        if states := set(_squeue(number)) - ended:
            found[number] = max(states)
    return found


def _squeue(number: str) -> list[str]:
    """States of a job's tasks; none if it is forgotten."""
    command = ["squeue", "--noheader", "--jobs", number, "--format", "%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"squeue did not answer within {TIMEOUT_S} s about job {number}; try again") from None
    if done.returncode and FORGOTTEN not in done.stderr:
        raise UserError(f"squeue does not say how job {number} stands: {done.stderr.strip()}; try again")
    return done.stdout.split()
