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


def read_jobs(run_dir: Path) -> list[dict[str, Any]]:
    """The jobs that were submitted for this directory, oldest first. Raises UsageError if the file is damaged."""
    path = run_dir / FILE
    if not path.is_file():
        return []
    try:
        jobs = json.loads(path.read_text())
        assert all(isinstance(job["id"], str) for job in jobs)
        return jobs
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UsageError(f"{path} is damaged ({error!r}); move it away") from None


def remember_job(run_dir: Path, number: str, command: Sequence[str]) -> None:
    """Add a job to RUN/jobs.json."""
    entry = {"id": number, "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "command": list(command)}
    partial = run_dir / f"{FILE}.tmp"
    partial.write_text(json.dumps([*read_jobs(run_dir), entry], indent=1) + "\n")
    os.replace(partial, run_dir / FILE)


def submit_job(command: Sequence[str]) -> str:
    """Run sbatch --parsable; returns the job's number. Raises UserError with what sbatch says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=4 * TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise UserError("sbatch is not found; run this on a login node of the cluster, or say --dry-run") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch did not answer within {4 * TIMEOUT_S} s; see squeue before you try again") from None
    if done.returncode:
        raise UserError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def job_states(numbers: Sequence[str]) -> dict[str, str]:
    """Number -> state (PENDING, RUNNING, ...) of those that squeue still knows; empty where there is no squeue.

    Of several tasks of an array one state is given: RUNNING if any is, which the alphabet also puts after PENDING.
    """
    if not numbers or shutil.which("squeue") is None:
        return {}
    ended = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
    found: dict[str, str] = {}
    for number in numbers:  # one by one: squeue fails as a whole if it does not know one of several
        command = ["squeue", "--noheader", "--jobs", number, "--format", "%T"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if states := set(done.stdout.split()) - ended:
            found[number] = max(states)
    return found
