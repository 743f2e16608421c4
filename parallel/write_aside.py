"""The process behind `aside.Aside`: writes and hashes files whose content is in memory that it shares with training.

Started as a script that imports nothing of this repository but xxhash, whose folder is its argument. Standard input is
a socket. A request is

    8 bytes   length of what follows the next
    8 bytes   length of the pieces, JSON: [[offset in the memory, or -1: the next of the bytes below, size], ...]
    pieces, then bytes

with two descriptors: the file, opened by who asks, so that nothing is created after that one's end, and the memory.
The answer, one line, is {"size": bytes, "xxh3_128": hex} of the synced file, or {"errno": number, "strerror": text}.
The end of the socket is its own.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterable, Iterator

HEADER = struct.Struct("<QQ")
PIECE = 1 << 20  # bytes, of a buffer that stays in a core's cache between copying, hashing and writing


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # for training, which then saves
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.path.append(sys.argv[1])
    link = socket.socket(fileno=sys.stdin.fileno())
    answers = link.makefile("w")
    buffer, memory = memoryview(mmap.mmap(-1, PIECE)), Memory()
    while True:
        header, descriptors, *_ = socket.recv_fds(link, HEADER.size, 2, socket.MSG_WAITALL)
        if len(header) < HEADER.size:
            return
        length, split = HEADER.unpack(header)
        request = memoryview(bytearray(length))
        link.recv_into(request, length, socket.MSG_WAITALL)
        target, shared = descriptors
        try:
            parts = named(json.loads(bytes(request[:split])), memory.view(shared), request[split:])
            found = copy(parts, target, buffer)
        except OSError as error:
            found = {"errno": error.errno, "strerror": error.strerror}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        print(json.dumps(found), file=answers, flush=True)


class Memory:
    """The shared memory, mapped once: to find its pages again would cost as much as half a copy of them."""

    def __init__(self) -> None:
        self._known, self._view = (0, 0), memoryview(b"")

    def view(self, descriptor: int) -> memoryview:
        found = os.fstat(descriptor)
        if self._known != (found.st_dev, found.st_ino):
            self._view = memoryview(b"")  # lets the former one go
            if found.st_size:
                self._view = memoryview(mmap.mmap(descriptor, found.st_size, access=mmap.ACCESS_READ))
            self._known = (found.st_dev, found.st_ino)
        return self._view


def named(pieces: list[tuple[int, int]], memory: memoryview, inline: memoryview) -> Iterator[memoryview]:
    """What a request names, piece by piece."""
    at = 0
    for offset, size in pieces:
        if offset < 0:
            yield inline[at : at + size]
            at += size
        else:
            yield memory[offset : offset + size]


def copy(parts: Iterable[memoryview], target: int, buffer: memoryview) -> dict[str, int | str | None]:
    """Size and hash of all parts, once the file `target` holds them."""
    import xxhash

    digest, size = xxhash.xxh3_128(), 0
    direct(target, True)
    for count in filled(buffer, parts):
        part = buffer[:count]
        digest.update(part)
        size += count
        if count < PIECE:  # the end, which fills no block
            direct(target, False)
        write(target, part)
    os.fsync(target)
    return {"size": size, "xxh3_128": digest.hexdigest()}


def filled(buffer: memoryview, parts: Iterable[memoryview]) -> Iterator[int]:
    """Put all parts one after the other into the buffer; gives the bytes in it where it is full, and at the end."""
    at = 0
    for part in parts:
        while part:
            count = min(len(part), PIECE - at)
            buffer[at : at + count] = part[:count]
            part, at = part[count:], at + count
            if at == PIECE:
                yield at
                at = 0
    if at:
        yield at


def direct(target: int, on: bool) -> bool:
    """Write `target` past the page cache, whose copies cost more than all the rest, or not; whether it is so now."""
    past = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(target, fcntl.F_GETFL)
    try:
        fcntl.fcntl(target, fcntl.F_SETFL, flags | past if on else flags & ~past)
    except OSError:  # this file system, or no file
        return False
    return on and bool(past)


def write(target: int, part: memoryview) -> None:
    """Write all of `part`, through the page cache if this file system refuses to do without it only now."""
    while part:
        try:
            part = part[os.write(target, part) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not fcntl.fcntl(target, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
                raise
            direct(target, False)


if __name__ == "__main__":
    main()
