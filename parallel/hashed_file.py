"""Files that are hashed while they are written, so that a hash costs no second reading.

The hash is of the bytes that were meant: it also finds what was damaged on the way to the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from parallel import write_aside
from parallel.manifest import FileRecord

PIPE = 1 << 20  # bytes; with the default, 64 KiB, the two processes take turns sixteen times as often


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


class HandedFile(io.RawIOBase):
    """The same, but another process writes, hashes and syncs, in time that this one's threads leave (write_aside.py).

    A thread would not do: of low priority, it would keep the interpreter's lock while it waits for a core, and of equal
    priority it takes a core from training, whose other cores wait at the next barrier. `record` is there after `close`.
    """

    record: FileRecord

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, 0
        self._process: Any = None  # for close, which runs even where there is nothing to close
        script = [sys.executable, "-I", "-S", write_aside.__file__]
        pipe = subprocess.PIPE
        # A process group of its own keeps Ctrl-C from it. In a session of its own, Linux's autogroups would give it as
        # much of the cores as all of this one's processes have together, whatever its priority.
        with path.open("wb") as file:
            self._process = subprocess.Popen(script, stdin=pipe, stdout=file, stderr=pipe, bufsize=0, process_group=0)
        with contextlib.suppress(AttributeError, OSError):  # not Linux, or this user has many pipes
            fcntl.fcntl(self._process.stdin, fcntl.F_SETPIPE_SZ, PIPE)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        """Hand over all of `data` (bytes-like). Raises as `close`, if the process has ended."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                rest = rest[self._process.stdin.write(rest) :]
        except BrokenPipeError:
            self.close()  # says why
            raise
        self._size += size
        return size

    def close(self) -> None:
        """Wait until all is on the disk. Raises OSError, or RuntimeError if the process was ended from outside."""
        if self.closed:
            return
        super().close()
        if self._process is None:
            return
        _, said = self._process.communicate()
        try:
            found = json.loads(said)
        except ValueError:
            reason = said.decode(errors="replace").strip() or "no word"
            raise RuntimeError(f"{self._path}: its writer ended with {self._process.returncode}: {reason}") from None
        if "errno" in found:
            raise OSError(found["errno"], found["strerror"], str(self._path))
        if found["size"] != self._size:
            raise RuntimeError(f"{self._path}: {self._size} bytes were handed over, {found['size']} arrived")
        self.record = FileRecord(found["size"], found["sha256"])
