"""A file that is hashed while it is written, so that its hash costs no second reading.

The hash is of the bytes that were meant: it also finds what was damaged on the way to the disk.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

from parallel.manifest import FileRecord


class HashedFile(io.BufferedWriter):
    """Create or replace `path`, to be written from its start to its end. Syncing is the caller's."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._hash, self._size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write all of `data` (bytes-like)."""
        written = super().write(data)
        self._hash.update(data)
        self._size += written
        return written

    @property
    def record(self) -> FileRecord:
        """Size and SHA-256 of what was written."""
        return FileRecord(self._size, self._hash.hexdigest())
