"""Files that many processes may want at once: locks, atomic writes, and results remembered between
runs.

Every rank of a node opens the same data. Whoever takes the lock first does the work, the others
wait and find it done. A file is written under a temporary name, synced and renamed, so that its
final name always means complete. `fcntl.flock` is released by the kernel when its holder dies, so a
killed run never leaves a lock behind. On a shared file system without flock two nodes may do the
same work twice; the results are identical, hence harmless.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 22
SAY_EVERY_S = 20.0


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if missing, never deleted) between processes of a
    machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other live process of this machine uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def rename_synced(source: Path, target: Path) -> None:
    """Rename `source` to `target` after its bytes are on the disk; then make the rename itself
    durable."""
    _sync(source)
    os.replace(source, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file so that `path` holds either its old content or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(content)
        rename_synced(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces; one that takes long says on stderr how far it is."""
    digest, done, said = hashlib.sha256(), 0, time.monotonic()
    with open(path, "rb") as handle:
        total = os.fstat(handle.fileno()).st_size
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                text = f"SHA-256 of {path}: {done / 1e9:.1f} of {total / 1e9:.1f} GB"
                print(text, file=sys.stderr, flush=True)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """16 hex digits naming a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def remember(cache: Path, what: str, path: Path, compute: Callable[[], Any]) -> Any:
    """`compute()` about the file `path`, computed once per (path, size, modification time) and kept
    as JSON in `cache`.

    For results that cost a whole pass over the file: its hash, its largest token.
    """
    path = path.resolve()
    stat = path.stat()
    result = cache / f"{what}-{digest_of([str(path), stat.st_size, stat.st_mtime_ns])}.json"
    if not result.exists():
        with file_lock(result.with_suffix(".lock")):
            if not result.exists():
                write_atomic(result, json.dumps(compute()).encode())
    return json.loads(result.read_text())
