"""Files that are hashed while they are written, so that a hash costs no second reading.

The hash is of the bytes that were meant: it also finds what was damaged on the way to the disk.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import xxhash

from parallel.aside import Aside
from parallel.manifest import FileRecord

SMALL = 512  # bytes; torch.save writes forty small pieces a tensor, which are sent, wherever they lie


class HashedFile(io.BufferedWriter):
    """Create or replace `path`, to be written from its start to its end. Syncing is the caller's."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._hash, self._size = xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        """Write all of `data` (bytes-like)."""
        written = super().write(data)
        self._hash.update(data)
        self._size += written
        return written

    @property
    def record(self) -> FileRecord:
        """Size and hash of what was written."""
        return FileRecord(self._size, self._hash.hexdigest())


class HandedFile(io.RawIOBase):
    """The same, but another process writes, hashes and syncs (`Aside`), all of it at `close`. Then `record` is there.

    What is written of the memory of `aside` is named, not copied; it has to stay until then.
    """

    record: FileRecord

    def __init__(self, path: Path, aside: Aside) -> None:
        self._path, self._aside, self._size = path, aside, 0
        self._pieces: list[tuple[int, int]] = []
        self._inline = bytearray()
        self._file: int | None = None  # for close, which runs even where there is nothing to close
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        """Note all of `data` (bytes-like)."""
        data = memoryview(data).cast("B")
        size = len(data)
        self._size += size
        offset = self._aside.place(data) if size >= SMALL else None
        if offset is not None:
            self._pieces.append((offset, size))
            return size
        self._inline += data
        before = self._pieces.pop()[1] if self._pieces and self._pieces[-1][0] < 0 else 0
        self._pieces.append((-1, before + size))
        return size

    def close(self) -> None:
        """Wait until all is on the disk. Raises OSError, or RuntimeError if the process was ended from outside."""
        if self.closed:
            return
        super().close()
        if self._file is None:
            return
        try:
            self.record = self._aside.write(self._path, self._file, self._pieces, bytes(self._inline))
        finally:
            os.close(self._file)
        if self.record.size != self._size:
            raise RuntimeError(f"{self._path}: {self._size} bytes were handed over, {self.record.size} arrived")
