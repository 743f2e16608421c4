"""Is a node fit to take part? One bad node of many stops or slows all of them, so each is looked at before the start.

    GPUs         as many as processes, and none with ECC errors that could not be corrected since the last reset
    file system  the run directory is there and can be written, with room for one more checkpoint; so can the
                 temporary directory

What the nodes share is no node's fault: a run directory without room, fewer GPUs than processes in what Slurm was asked
for. Such a problem ends the job; train.sbatch leaves out nodes for problems of their own, unless all have the same.
Whether all processes reach each other, how fast, and whether their clocks agree, is slurm/ping.py's part.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import recipe as recipes
from errors import CheckpointError, UsageError

# Of train.sbatch, in the run directory: names of the nodes that it left out; starts whose processes did not meet.
UNHEALTHY, UNMET = "unhealthy", "unmet"
QUERY = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
TIMEOUT_S = 60
STATE_BYTES = 16  # a parameter in a checkpoint at most: an FP32 master, two FP32 moments, the weight itself
TEMPORARY_BYTES = 1 << 30  # compilers and caches of kernels
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Problem:
    """code: exit code of the job, because every node would find the same; None: this node's own problem."""

    text: str
    code: int | None = None


def problems(run_dir: Path, processes: int, node: str, granted: int | None = None) -> list[Problem]:
    """Why this node cannot run `processes` processes of the run; empty if it can. Raises UsageError.

    granted: GPUs that Slurm gave the job on each node; None: not known
    """
    recipe = recipes.resolve(str(run_dir / "resolved.yaml"))
    found = [] if recipe.device == "cpu" else _gpus(processes, granted)
    found += room_problems(run_dir, STATE_BYTES * recipe.model.parameter_count(), node, CheckpointError.exit_code)
    return found + room_problems(Path(tempfile.gettempdir()), TEMPORARY_BYTES, node)


def _gpus(wanted: int, granted: int | None) -> list[Problem]:
    if granted is not None and granted < wanted:
        text = f"Slurm gave the job {granted} GPUs a node for {wanted} processes; submit with --per-node={granted}"
        return [Problem(text, UsageError.exit_code)]
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [Problem(f"nvidia-smi fails: {error}")]
    return gpu_problems(done.stdout, wanted)


def gpu_problems(listing: str, wanted: int) -> list[Problem]:
    """What is wrong with the GPUs of a listing: `index, uncorrected ECC errors` a line, [N/A] without ECC."""
    lines = [[word.strip() for word in line.split(",")] for line in listing.splitlines() if line.strip()]
    found = [f"{len(lines)} GPUs for {wanted} processes"] if len(lines) < wanted else []
    counts = ((index, errors) for index, errors in lines if errors.isdigit() and int(errors))
    return [Problem(text) for text in (*found, *(f"GPU {i} has {n} uncorrected ECC errors" for i, n in counts))]


def room_problems(folder: Path, needed: int, node: str, full: int | None = None) -> list[Problem]:
    """Why `needed` bytes cannot be written into `folder`; full: the code of a lack of room, where nodes share it."""
    try:
        with tempfile.NamedTemporaryFile(prefix=f".health-{node}-", dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [Problem(f"{folder} cannot be written: {error.strerror}", full if error.errno in NO_ROOM else None)]
    if free >= needed:
        return []
    return [Problem(f"{folder} has {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB are needed", full)]


def report(node: str, found: list[Problem]) -> None:
    """Lines for the log, which train.sbatch reads: the node is unfit, or what all nodes share is."""
    for shared, words in ((False, "UNHEALTHY"), (True, "SHARED PROBLEM, seen by")):
        if texts := [problem.text for problem in found if (problem.code is not None) == shared]:
            print(f"{words} {node}: {'; '.join(texts)}", flush=True)
