"""Is a node fit to take part? One bad node of many stops or slows all of them, so each is looked at before the start.

    GPUs         as many as processes, and none with ECC errors that could not be corrected since the last reset
    file system  the run directory is there and can be written, with room for one more checkpoint; so can the
                 temporary directory

Whether all processes reach each other, how fast, and whether their clocks agree, is slurm/ping.py's part. A node that
is not fit is named in RUN/unhealthy; train.sbatch gives the job back with that node excluded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import recipe as recipes

UNHEALTHY = "unhealthy"
QUERY = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
TIMEOUT_S = 60
STATE_BYTES = 16  # a parameter in a checkpoint at most: an FP32 master, two FP32 moments, the weight itself
TEMPORARY_BYTES = 1 << 30  # compilers and caches of kernels


def problems(run_dir: Path, processes: int, node: str) -> list[str]:
    """Why this node is not fit for `processes` processes of the run; empty if it is. Raises UsageError."""
    recipe = recipes.resolve(str(run_dir / "resolved.yaml"))
    found = [] if recipe.device == "cpu" else _gpus(processes)
    places = {run_dir: STATE_BYTES * recipe.model.parameter_count(), Path(tempfile.gettempdir()): TEMPORARY_BYTES}
    return found + [problem for place, needed in places.items() for problem in room_problems(place, needed, node)]


def _gpus(wanted: int) -> list[str]:
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi fails: {error}"]
    return gpu_problems(done.stdout, wanted)


def gpu_problems(listing: str, wanted: int) -> list[str]:
    """What is wrong with the GPUs of a listing: `index, uncorrected ECC errors` a line, [N/A] without ECC."""
    lines = [[word.strip() for word in line.split(",")] for line in listing.splitlines() if line.strip()]
    found = [f"{len(lines)} GPUs for {wanted} processes"] if len(lines) < wanted else []
    counts = ((index, errors) for index, errors in lines if errors.isdigit() and int(errors))
    return found + [f"GPU {index} has {errors} uncorrected ECC errors" for index, errors in counts]


def room_problems(folder: Path, needed: int, node: str) -> list[str]:
    """Why `needed` bytes cannot be written into `folder`."""
    try:
        with tempfile.NamedTemporaryFile(prefix=f".health-{node}-", dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [f"{folder} cannot be written: {error.strerror}"]
    if free >= needed:
        return []
    return [f"{folder} has {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB are needed"]


def report(run_dir: Path, node: str, found: list[str]) -> None:
    """Name the node for train.sbatch, and say why."""
    print(f"UNHEALTHY {node}: {'; '.join(found)}", file=sys.stderr, flush=True)
    try:
        with open(run_dir / UNHEALTHY, "a") as names:
            names.write(f"{node}\n")
    except OSError as error:  # perhaps the very reason
        print(f"{node}: cannot write {run_dir / UNHEALTHY}: {error.strerror}", file=sys.stderr, flush=True)
