"""A file that is hashed while it is written holds what was written, and its record is that of the file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from parallel.hashed_file import HashedFile
from parallel.manifest import FileRecord


@pytest.mark.parametrize("sizes", [[], [0, 1], [5, 7 * 4096, 11], [100] * 999, [(1 << 20) + 1, 1 << 20]])
def test_any_pieces(tmp_path: Path, sizes: list[int]) -> None:
    pieces = [os.urandom(size) for size in sizes]
    with HashedFile(tmp_path / "file") as file:
        for i, piece in enumerate(pieces, 1):
            assert file.write(memoryview(piece)) == len(piece)
            assert file.tell() == sum(map(len, pieces[:i]))
    content = b"".join(pieces)
    assert (tmp_path / "file").read_bytes() == content
    assert file.record == FileRecord(len(content), hashlib.sha256(content).hexdigest())
