"""RUN/manifest.json: what ran, on what, from which code. One entry a start, never overwritten.

    {"starts": [{"time": "2026-11-23T09:33:06Z", "step": 0, "recipe": {...}, "data": {...},
                 "hosts": 1, "topology": {...}, "git": {"commit": "...", "dirty": false},
                 "versions": {...}, "device": "...", "cpu": "...", "threads": 2}]}

A restart may come with other code, another topology or a changed recipe, so every start says all of
it; the last entry describes the run as it is. The file is replaced by rename. No environment
variable and no host name is recorded: both can hold what must not be shared.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from errors import UsageError, UserError
from report.flops import cpu_name, device_name

PACKAGES = ("torch", "deepspeed", "numpy", "transformer-engine", "torchao", "triton")
ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = "SNAPSHOT.json"
GIT_TIMEOUT_S = 20  # a work tree on a slow network disk


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the caller knows of one start.

    step: step resumed from (0: fresh). recipe: resolved. data: hashes by file. hosts: their number.
    topology: parallel degrees by name.
    """

    step: int
    recipe: Mapping[str, Any]
    data: Sequence[Mapping[str, Any]]
    hosts: int
    topology: Mapping[str, int]


def record_start(run_dir: Path, start: Start, device: torch.device) -> dict[str, Any]:
    """Append `start`, with what this process can see, to RUN/manifest.json; returns the entry.

    Raises UsageError where the manifest is damaged, UserError where it cannot be written.
    """
    path = run_dir / "manifest.json"
    entry = {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **asdict(start),
        "git": git_state(ROOT),
        "versions": versions(),
        "device": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }
    manifest = {"starts": [*_starts(path), entry]}
    partial = path.with_suffix(".json.tmp")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(partial, "w") as out:
            json.dump(manifest, out, indent=1, allow_nan=False)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room, then start again") from error
    return entry


def _starts(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["starts"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a run manifest ({error}); it is written whole, so something else "
            "changed it: restore it, or move it away to begin a new one"
        ) from error


def versions() -> dict[str, str]:
    """Versions of Python, CUDA or ROCm (where PyTorch has one) and of the installed PACKAGES."""
    found = {"python": platform.python_version()}
    if gpu := torch.version.cuda or torch.version.hip:
        found["cuda" if torch.version.cuda else "rocm"] = gpu
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # its absence is the record
    return found


def git_state(root: Path) -> dict[str, Any] | None:
    """{"commit": hash, "dirty": bool}; None unless `root` is the top of a readable git work tree, or a snapshot of one.

    Dirty counts changed and new files that are not ignored: either can change what runs. A snapshot (slurm/snapshot.py)
    says itself what it was taken of.
    """
    if (snapshot := root / SNAPSHOT).is_file():
        return json.loads(snapshot.read_text())
    try:
        top, commit = _git(root, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        dirty = bool(_git(root, "status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None  # no git, no repository, no commit, or not ours to read: recorded as null
    return {"commit": commit, "dirty": dirty} if Path(top).resolve() == root.resolve() else None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)
    return done.stdout
