"""Files that are hashed while they are written hold what was written, and their records are those of the files."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
from pathlib import Path

import pytest

from parallel.hashed_file import HandedFile, HashedFile
from parallel.manifest import FileRecord


@pytest.mark.parametrize("sizes", [[], [0, 1], [5, 7 * 4096, 11], [100] * 999, [(1 << 20) + 1, 1 << 20]])
@pytest.mark.parametrize("kind", [HashedFile, HandedFile])
def test_any_pieces(tmp_path: Path, sizes: list[int], kind: type[HashedFile] | type[HandedFile]) -> None:
    pieces = [os.urandom(size) for size in sizes]
    with kind(tmp_path / "file") as file:
        for i, piece in enumerate(pieces, 1):
            assert file.write(memoryview(piece)) == len(piece)
            assert file.tell() == sum(map(len, pieces[:i]))
    content = b"".join(pieces)
    assert (tmp_path / "file").read_bytes() == content
    assert file.record == FileRecord(len(content), hashlib.sha256(content).hexdigest())


def test_an_error_of_the_other_process_is_raised_here() -> None:
    file = HandedFile(Path("/dev/full"))
    with pytest.raises(OSError, match="/dev/full") as raised:
        for _ in range(100):
            file.write(bytes(1 << 16))
        file.close()
    assert raised.value.errno == errno.ENOSPC
    file.close()  # once more does nothing


def test_the_end_of_the_other_process_is_an_error(tmp_path: Path) -> None:
    file = HandedFile(tmp_path / "file")
    file._process.kill()
    file._process.wait()
    with pytest.raises(RuntimeError, match="its writer ended with -9: no word"):
        file.write(b"lost")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_file_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        HandedFile(tmp_path / "nowhere" / "file")
    gc.collect()
