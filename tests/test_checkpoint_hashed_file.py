"""A file written past the page cache holds what was written, and its record is that of the file."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel import hashed_file
from parallel.hashed_file import HashedFile
from parallel.manifest import FileRecord

BLOCK = 4096


def write(path: Path, pieces: list[bytes]) -> FileRecord:
    with HashedFile(path) as file:
        for i, piece in enumerate(pieces, 1):
            assert file.write(memoryview(piece)) == len(piece)
            assert file.tell() == sum(map(len, pieces[:i]))
    return file.record


def check(path: Path, pieces: list[bytes], record: FileRecord) -> None:
    content = b"".join(pieces)
    assert path.read_bytes() == content
    assert record == FileRecord(len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    "sizes", [[], [0, 1], [3 * BLOCK], [5, 7 * BLOCK, 11], [100] * 999, [2 * BLOCK + 1, 2 * BLOCK]]
)
def test_any_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    monkeypatch.setattr(hashed_file, "BUFFER", 2 * BLOCK)
    pieces = [os.urandom(size) for size in sizes]
    check(tmp_path / "file", pieces, write(tmp_path / "file", pieces))


def refuse_direct_open(path: Path, flags: int, mode: int, really: Callable[..., int] = os.open) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "no O_DIRECT here")
    return really(path, flags, mode)


def refuse_direct_write(file: int, data: memoryview, really: Callable[..., int] = os.write) -> int:
    """As a file system with blocks larger than ours; every write is cut short."""
    if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, "not aligned")
    return really(file, data[:1000])


@pytest.mark.parametrize(("name", "stand_in"), [("open", refuse_direct_open), ("write", refuse_direct_write)])
def test_file_systems_without_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stand_in: Callable[..., int]
) -> None:
    monkeypatch.setattr(hashed_file, "BUFFER", 2 * BLOCK)
    pieces = [os.urandom(5 * BLOCK), os.urandom(3)]
    with monkeypatch.context() as patch:
        patch.setattr(os, name, stand_in)
        record = write(tmp_path / "file", pieces)
    check(tmp_path / "file", pieces, record)


def test_errors_name_the_file_and_close_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device: .*file'"):
        write(tmp_path / "file", [bytes(10)])
    assert len(os.listdir("/proc/self/fd")) == before
