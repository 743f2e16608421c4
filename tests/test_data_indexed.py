"""Reader and writer of `.bin/.idx` against an independent writer made of `struct` alone."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.indexed import IndexedDataset, IndexedWriter, token_dtype
from errors import DataError

CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def oracle(prefix: Path, sequences: list[list[int]], borders: list[int], code: int) -> None:
    """Write the pair as the format's description says, number by number."""
    size, offset, pointers = struct.calcsize("<" + CODES[code]), 0, []
    for sequence in sequences:
        pointers.append(offset)
        offset += size * len(sequence)
    tokens = [token for sequence in sequences for token in sequence]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(tokens)}{CODES[code]}", *tokens))
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(borders))
        + struct.pack(f"<{len(sequences)}i", *map(len, sequences))
        + struct.pack(f"<{len(sequences)}q", *pointers)
        + struct.pack(f"<{len(borders)}q", *borders)
    )


SEQUENCES = st.lists(st.lists(st.integers(0, 100), max_size=6), max_size=8)


@settings(max_examples=60, deadline=None)
@given(sequences=SEQUENCES, code=st.sampled_from(sorted(CODES)), data=st.data())
def test_reader_agrees_with_oracle(tmp_path_factory, sequences, code, data):
    inner = data.draw(st.lists(st.integers(0, len(sequences)), max_size=4))
    borders = [0, *sorted(inner), len(sequences)]
    prefix = tmp_path_factory.mktemp("oracle") / "x"
    oracle(prefix, sequences, borders, code)
    dataset = IndexedDataset(prefix)
    documents = [sum(sequences[a:b], []) for a, b in zip(borders, borders[1:], strict=False)]
    assert dataset.num_documents == len(documents)
    assert [dataset.document(i).tolist() for i in range(len(documents))] == documents
    assert dataset.token_range() == (
        min(sum(sequences, []), default=0),
        max(sum(sequences, []), default=-1),
    )


@settings(max_examples=30, deadline=None)
@given(documents=SEQUENCES, wide=st.booleans())
def test_writer_agrees_with_oracle(tmp_path_factory, documents, wide):
    folder = tmp_path_factory.mktemp("writer")
    dtype = token_dtype(65500 if wide else 65499)
    with IndexedWriter(folder / "ours", dtype) as writer:
        for document in documents:
            writer.add(np.array(document, dtype), np.array([len(document)]))
    oracle(folder / "oracle", documents, list(range(len(documents) + 1)), 4 if wide else 8)
    for suffix in (".bin", ".idx"):
        assert (folder / f"ours{suffix}").read_bytes() == (folder / f"oracle{suffix}").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == [
        "oracle.bin", "oracle.idx", "ours.bin", "ours.idx",
    ]  # fmt: skip


def test_writer_leaves_nothing_after_an_error_and_keeps_the_old(tmp_path):
    oracle(tmp_path / "x", [[1, 2]], [0, 1], 8)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "x", np.dtype("<u2")) as writer:
        writer.add(np.array([3, 4]), np.array([2]))
        raise KeyError
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def pair(tmp_path) -> Path:
    oracle(tmp_path / "x", [[5, 6, 7], [8]], [0, 1, 2], 8)
    return tmp_path / "x"


def fails(prefix: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        IndexedDataset(prefix)
    for word in words:
        assert word in str(caught.value)


def patch(path: Path, offset: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)


def test_every_truncation_is_an_error_that_names_the_file(pair):
    for path in (pair.with_suffix(".idx"), pair.with_suffix(".bin")):
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            fails(pair, str(path), "byte")
        path.write_bytes(whole + b"\0")
        fails(pair, str(path), "byte")
        path.write_bytes(whole)
    IndexedDataset(pair)


IDX = [
    (0, b"TNTIDX\0\0", "old TNTIDX"),
    (0, b"MMIDIDY", "byte 0"),
    (9, b"\2", "version 2"),
    (17, b"\6", "dtype code 6 (floating-point"),
    (17, b"\7", "dtype code 7 (floating-point"),
    (17, b"\x09", "dtype code 9 (unknown)"),
    (18, b"\xff" * 8, "truncated"),
    (34, b"\xff" * 4, "length -1 (byte 34)"),
    (34, b"\2", "puts sequence 1 at byte 6 of .bin"),
    (42, b"\2", "(byte 42)"),
    (50, b"\4", "puts sequence 1 at byte 4 of .bin, but the lengths before it add up to 6"),
    (58, b"\1", "do not start with 0 (byte 58)"),
    (66, b"\3", "decrease (byte 74)"),
    (74, b"\1", "2 sequences, but the last document ends at 1 (byte 74)"),
]  # fmt: skip


@pytest.mark.parametrize(("offset", "data", "message"), IDX)
def test_each_field_is_checked(pair, offset, data, message):
    patch(pair.with_suffix(".idx"), offset, data)
    fails(pair, f"{pair}.idx", message)


def test_multimodal_and_missing_files_are_refused(pair):
    idx = pair.with_suffix(".idx")
    idx.write_bytes(idx.read_bytes() + b"\0\0")
    fails(pair, "multimodal")
    idx.unlink()
    fails(pair, "x.idx does not exist")


def test_token_outside_the_vocabulary_names_file_byte_id_and_limit(pair):
    dataset = IndexedDataset(pair)
    dataset.check_tokens(9)
    with pytest.raises(DataError, match=r"x\.bin: token id 7 at byte 4 .* vocabulary of 7"):
        dataset.check_tokens(7)
    oracle(pair, [[3, -2]], [0, 1], 3)
    with pytest.raises(DataError, match="token id -2 at byte 2"):
        IndexedDataset(pair).check_tokens(9)


def test_writer_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak(batches: int) -> int:
        tokens, lengths = np.zeros(20_000, np.uint16), np.full(10_000, 2)
        tracemalloc.start()
        with IndexedWriter(tmp_path / "x", np.dtype("<u2")) as writer:
            for _ in range(batches):
                writer.add(tokens, lengths)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(300) < 1.5 * peak(30)
