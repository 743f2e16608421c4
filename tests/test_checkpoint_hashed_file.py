"""Files that are hashed while they are written hold what was written, and their records are those of the files."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from parallel import hashed_file, write_aside
from parallel.aside import Aside
from parallel.hashed_file import HandedFile, HashedFile
from parallel.manifest import FileRecord

SIZES = [[], [0, 1], [5, 7 * 4096, 11], [100] * 999, [(1 << 20) + 1, 1 << 20], [1 << 20], [(1 << 20) - 512, 512, 512]]


@pytest.fixture(scope="module")
def aside() -> Aside:
    return Aside()


def check(path: Path, file: HashedFile | HandedFile, pieces: list[bytes | memoryview]) -> None:
    with file:
        for i, piece in enumerate(pieces, 1):
            assert file.write(piece) == len(piece)
            assert file.tell() == sum(map(len, pieces[:i]))
    content = b"".join(pieces)
    assert path.read_bytes() == content
    assert file.record == FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))
    assert file.record == FileRecord.of(path)


@pytest.mark.parametrize("sizes", SIZES)
def test_any_pieces(tmp_path: Path, sizes: list[int], aside: Aside) -> None:
    pieces = [memoryview(os.urandom(size)) for size in sizes]
    check(tmp_path / "one", HashedFile(tmp_path / "one"), pieces)
    check(tmp_path / "other", HandedFile(tmp_path / "other", aside), pieces)


@pytest.mark.parametrize("sizes", SIZES)
def test_pieces_of_the_memory_are_not_sent(tmp_path: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are, and small ones; what the memory holds when the file is closed is written."""
    aside, sent = Aside(), []
    copies = aside.copies([torch.zeros(size, dtype=torch.uint8) for size in sizes])
    for copy in copies:
        copy.random_()
    pieces: list[memoryview | bytes] = []
    for copy in copies:
        pieces += [memoryview(copy.numpy()), os.urandom(len(copy) % 7)]
    original = aside.write
    monkeypatch.setattr(aside, "write", lambda *given: sent.append(given) or original(*given))
    check(tmp_path / "file", HandedFile(tmp_path / "file", aside), pieces)
    ((_, _, _, inline),) = sent
    assert inline == b"".join(p for i, p in enumerate(pieces) if i % 2 or len(p) < hashed_file.SMALL)


def test_copies_are_copies_of_any_layout() -> None:
    aside = Aside()
    tensors = [
        torch.randn(5, 7, dtype=torch.bfloat16).T,
        torch.randn(3, requires_grad=True),
        torch.arange(9)[::2],
        torch.ones((), dtype=torch.bool),
        torch.empty(0, 4),
    ]
    for _ in range(2):
        copies = aside.copies(tensors)
        for copy, tensor in zip(copies, tensors, strict=True):
            assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype and copy.is_contiguous()
            assert copy.untyped_storage().nbytes() == tensor.nbytes
            assert copy.data_ptr() != tensor.data_ptr() or not tensor.numel()
    more = aside.copies([torch.full((1 << 20,), 3)])[0]  # of more memory
    assert torch.equal(copies[0], tensors[0]) and aside.place(memoryview(more.numpy()).cast("B")) == 0
    assert aside.place(memoryview(copies[0].view(torch.uint8).numpy().ravel())) is None  # the memory before


def test_an_error_of_the_other_process_is_raised_here(tmp_path: Path, aside: Aside) -> None:
    file = HandedFile(Path("/dev/full"), aside)
    file.write(bytes(1 << 16))
    with pytest.raises(OSError, match="/dev/full") as raised:
        file.close()
    assert raised.value.errno == errno.ENOSPC
    file.close()  # once more does nothing
    check(tmp_path / "next", HandedFile(tmp_path / "next", aside), [b"goes on"])


def test_the_end_of_the_other_process_is_an_error(tmp_path: Path) -> None:
    """While it writes, that is: if it has ended before, there is another one."""
    aside = Aside()
    check(tmp_path / "file", HandedFile(tmp_path / "file", aside), [b"content"])
    process = aside._process
    assert process is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # as a scheduler sends them to all of a job
        process.send_signal(number)
    check(tmp_path / "file", HandedFile(tmp_path / "file", aside), [b"content"])
    process.send_signal(signal.SIGSTOP)
    threading.Timer(0.5, process.kill).start()
    with pytest.raises(RuntimeError, match="its writer ended with -9"), HandedFile(tmp_path / "file", aside) as file:
        file.write(b"lost")
    check(tmp_path / "file", HandedFile(tmp_path / "file", aside), [b"another process"])


def test_the_other_process_ends_with_this_side(tmp_path: Path) -> None:
    aside = Aside()
    check(tmp_path / "file", HandedFile(tmp_path / "file", aside), [b"content"])
    process = aside._process
    assert process is not None and process.poll() is None
    del aside
    gc.collect()
    assert process.poll() == 0


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_file_that_cannot_be_made_is_one_error(tmp_path: Path, aside: Aside) -> None:
    with pytest.raises(FileNotFoundError):
        HandedFile(tmp_path / "nowhere" / "file", aside)
    gc.collect()


def test_a_file_system_that_refuses_late_is_written_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some accept O_DIRECT and refuse the first write. Here an unaligned buffer is what is refused."""
    content = np.random.default_rng(0).bytes(8193)
    file = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    if not write_aside.direct(file, True):
        pytest.skip("this file system is never written past the page cache")
    write_aside.write(file, memoryview(content)[1:])
    os.close(file)
    assert (tmp_path / "file").read_bytes() == content[1:]
