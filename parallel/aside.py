"""`Aside`: copies of tensors in memory that another process reads, and that process, which writes and hashes them.

A save behind training takes its time from training, which uses every core: threads that wait for each other at
barriers lose what one of them loses. So it does little. A thread of training's process would fight for the
interpreter's lock at each piece; bytes sent through a pipe are copied twice, and the page cache copies once more. Here
tensors are copied once, by training, and a process of its own (write_aside.py) reads them where they lie, hashes them
with XXH3 and writes past the page cache. It lives as long as the run, so a save does not pay for its start.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from parallel import write_aside
from parallel.manifest import FileRecord

ALIGNMENT = 64  # bytes; a cache line, more than any element needs


class Aside:
    """One process at most, started by the first file; an error of one file leaves it ready for the next."""

    def __init__(self) -> None:
        self._file, self._memory, self._start, self._size = _nameless(), None, 0, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._one = threading.Lock()

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the CPU of contiguous layout, each with a storage of its own; the next call overwrites them.

        The memory stays for it: fresh pages would cost more than the copying.
        """
        places, size = [], 0
        for tensor in tensors:
            places.append(size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if size > self._size:
            self._reserve(size)
        with torch.no_grad():
            return [self._at(place, tensor).copy_(tensor) for place, tensor in zip(places, tensors, strict=True)]

    def _reserve(self, size: int) -> None:
        self._file.close()
        self._file = _nameless()
        self._file.truncate(size)
        self._memory, self._size = mmap.mmap(self._file.fileno(), size), size
        self._start = address(self._memory)

    def _at(self, place: int, like: Tensor) -> Tensor:
        if not like.numel():
            return torch.empty(like.shape, dtype=like.dtype)
        assert self._memory is not None
        memory = torch.frombuffer(self._memory, dtype=torch.uint8, count=like.nbytes, offset=place)
        return memory.view(like.dtype).view(like.shape)

    def place(self, data: memoryview) -> int | None:
        """Offset in the memory at which `data` lies; None if it is elsewhere."""
        if not data.nbytes:
            return None
        offset = address(data) - self._start
        return offset if 0 <= offset <= self._size - data.nbytes else None

    def write(self, path: Path, file: int, pieces: Sequence[tuple[int, int]], inline: bytes) -> FileRecord:
        """Write pieces, (offset in the memory, bytes), or (-1, bytes) for the next of `inline`, and sync the file.

        From any thread. Raises OSError of `path`, or RuntimeError if the process was ended from outside.
        """
        listed = json.dumps(pieces).encode()
        header = write_aside.HEADER.pack(len(listed) + len(inline), len(listed))
        with self._one:
            process, link = self._started()
            try:
                socket.send_fds(link, [header], [file, self._file.fileno()])
                link.sendall(listed + inline)
                answer = _line(link)
            except (BrokenPipeError, ConnectionResetError):
                answer = b""
            if not answer:
                raise RuntimeError(f"{path}: its writer ended with {process.wait()}")
        found = json.loads(answer)
        if "errno" in found:
            raise OSError(found["errno"], found["strerror"], str(path))
        return FileRecord(found["size"], found["xxh3_128"])

    def _started(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        if self._process is None or self._link is None or self._process.poll() is not None:
            self._link, theirs = socket.socketpair()
            script = [sys.executable, "-I", "-S", write_aside.__file__, str(Path(xxhash.__file__).parents[1])]
            # A process group of its own keeps Ctrl-C from it. In a session of its own, Linux's autogroups would give it
            # as much of the cores as all of training's processes have together.
            with theirs:
                self._process = subprocess.Popen(script, stdin=theirs.fileno(), process_group=0)
            weakref.finalize(self, _end, self._process, self._link)
        return self._process, self._link


def _nameless() -> IO[bytes]:
    """Memory as a file; a file on the disk where the system has no such thing."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("checkpoint"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def address(data: mmap.mmap | memoryview) -> int:
    """Where the bytes of `data` begin."""
    return np.frombuffer(data, np.uint8).ctypes.data


def _line(link: socket.socket) -> bytes:
    """An answer, whole, or b"" if the other end closed before."""
    found = bytearray()
    while not found.endswith(b"\n"):
        more = link.recv(4096)
        if not more:
            return b""
        found += more
    return bytes(found)


def _end(process: Any, link: socket.socket) -> None:
    link.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=60)
