"""A file that is written from its start to its end: hashed on the way, and past the page cache where that is possible.

A checkpoint is read again weeks later or never. Through the page cache the kernel copies it, keeps it, pushes the data
set out for it, and takes CPU time again to drop it when the checkpoint is pruned; and a hash made afterwards reads all
of it a second time. O_DIRECT (Linux) writes whole aligned blocks from our buffer instead; the hash is of the bytes that
were meant, so that it also finds what was damaged on the way to the disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import mmap
import os
from pathlib import Path
from typing import Any

from parallel.manifest import FileRecord

BUFFER = 4 << 20  # bytes; a multiple of every file system's block, and an anonymous mapping begins at a page
_DIRECT = getattr(os, "O_DIRECT", 0)


class HashedFile(io.RawIOBase):
    """Create or replace `path` for writing. `record` describes the file once it is closed; syncing is the caller's.

    A file system without O_DIRECT (or for blocks other than ours) is written to through the page cache.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._hash, self._size, self._filled = path, hashlib.sha256(), 0, 0
        self._view = memoryview(mmap.mmap(-1, BUFFER))
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._file = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o666)

    @property
    def record(self) -> FileRecord:
        """Size and SHA-256 of what was written."""
        return FileRecord(self._size, self._hash.hexdigest())

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        """Take all of `data` (bytes-like). Raises OSError, perhaps of an earlier call's data."""
        source = memoryview(data).cast("B")
        taken = 0
        while taken < len(source):
            count = min(BUFFER - self._filled, len(source) - taken)
            self._view[self._filled : self._filled + count] = source[taken : taken + count]
            self._filled += count
            taken += count
            if self._filled == BUFFER:
                self._empty()
        self._size += taken
        return taken

    def close(self) -> None:
        """Write the rest, which is no whole block. Raises OSError; the file is closed all the same."""
        if self.closed:
            return
        try:
            if self._filled:
                self._through_the_cache()
                self._empty()
        finally:
            super().close()
            os.close(self._file)

    def _empty(self) -> None:
        rest = self._view[: self._filled]
        self._hash.update(rest)
        while rest:
            try:
                rest = rest[os.write(self._file, rest) :]
            except OSError as error:
                # Other blocks than ours, or a short write that ended within one.
                if error.errno != errno.EINVAL or not self._through_the_cache():
                    raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._filled = 0

    def _through_the_cache(self) -> bool:
        """Write what follows without O_DIRECT; whether that changes anything."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_DIRECT)
        return bool(flags & _DIRECT)
