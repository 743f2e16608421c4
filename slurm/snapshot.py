"""The code that a job runs is a copy from when it was submitted: a queue is long, and a requeued run must not change.

RUN/code/3f9c0a1b2d4e/      everything but tests and documents; named by the hash of its content
              SNAPSHOT.json what it was taken of: commit, and whether the work tree differed from it
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from errors import UserError
from report.manifest import ROOT, SNAPSHOT, git_state

FOLDERS = ("convert", "data", "lowprec", "model", "parallel", "recipes", "report", "run", "slurm")
LARGEST = 16 << 20  # bytes; a larger file is data that somebody put there


def take_snapshot(folder: Path, root: Path = ROOT) -> Path:
    """Copy the code in `root` to a directory of `folder`, unless it is there; return it. Raises UserError."""
    files = sorted(_files(root))
    contents = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    target = folder / digest.hexdigest()[:12]
    if target.is_dir():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".snapshot-", dir=folder))
        try:
            for path, (name, content) in zip(files, contents.items(), strict=True):
                copy = partial / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(content)
                shutil.copymode(path, copy)
            (partial / SNAPSHOT).write_text(json.dumps(git_state(root)) + "\n")
            partial.chmod(0o755)
            os.rename(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot copy the code to {folder}: {error.strerror}; choose another run.dir") from None
    return target


def _files(root: Path) -> Iterator[Path]:
    """What a run may need."""
    yield from root.glob("*.py")
    for name in FOLDERS:
        for folder, folders, names in os.walk(root / name):
            folders[:] = [each for each in folders if each != "__pycache__" and not each.startswith(".")]
            for path in (Path(folder, each) for each in names if not each.startswith(".")):
                if path.suffix not in {".pyc", ".so", ".o"} and path.stat().st_size <= LARGEST:
                    yield path
