"""Megatron's indexed dataset: tokens in `PREFIX.bin`, where each sequence and document starts in
`PREFIX.idx`.

`.bin`: token ids back to back, little-endian, no header, one dtype for the whole file.
`.idx`, little-endian, unaligned from byte 34 on (S sequences, D - 1 documents):

| offset      | type     | content                                                            |
|-------------|----------|--------------------------------------------------------------------|
| 0           | 9 bytes  | magic `MMIDIDX\\0\\0`                                                |
| 9           | uint64   | version, 1                                                         |
| 17          | uint8    | dtype code, see `DTYPES`                                           |
| 18          | uint64   | S                                                                  |
| 26          | uint64   | D                                                                  |
| 34          | int32[S] | tokens of each sequence                                            |
| 34 + 4S     | int64[S] | byte offset of each sequence in `.bin`                             |
| 34 + 12S    | int64[D] | first sequence of each document; starts with 0, ends with S        |

Source: Megatron-LM `megatron/core/datasets/indexed_dataset.py`. The writer takes uint16 when the
vocabulary has fewer than 65500 ids, else int32, as Megatron's does. Sequences lie back to back,
which Megatron's writer guarantees and the reader checks; so a document is one slice of tokens, and
only D document borders are kept in memory.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from data.cache import rename_synced, temporary_name
from errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHUNK = 1 << 18  # elements per step of a pass over a file


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's choice of dtype for a vocabulary."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def chunks(size: int, step: int = _CHUNK) -> Iterator[slice]:
    """Slices that cover range(size) in pieces of at most `step`."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


class IndexedDataset:
    """Reader of one `.bin/.idx` pair; tokens are mapped, not read.

    Attributes:
        prefix: path without suffix.
        tokens: [num_tokens], the dtype of the file, read-only, mapped.
        borders: [num_documents + 1] int64; document d is tokens[borders[d]:borders[d + 1]].
    Raises:
        DataError: a file is missing, or is not what the layout above says; names file and byte
            offset.
    """

    tokens: np.ndarray
    borders: np.ndarray

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.idx_path, self.bin_path = (Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin"))
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DataError(f"{path} does not exist; a token dataset is a pair of PREFIX.bin and PREFIX.idx")
        dtype, num_sequences, num_borders = self._read_header()
        at = HEADER.size
        lengths = self._map_idx("<i4", at, num_sequences)
        pointers = self._map_idx("<i8", at := at + 4 * num_sequences, num_sequences)
        documents = self._map_idx("<i8", at + 8 * num_sequences, num_borders)
        self._check_sequences(lengths, pointers, dtype.itemsize)
        self._check_documents(documents, num_sequences)
        num_tokens = self._bin_bytes // dtype.itemsize
        self.tokens = _map(self.bin_path, dtype, 0, num_tokens)
        self.borders = np.full(num_borders, num_tokens)
        inside = documents < num_sequences  # a document without sequences may end the file
        self.borders[inside] = pointers[documents[inside]] // dtype.itemsize

    @property
    def num_documents(self) -> int:
        """Documents in the dataset."""
        return self.borders.size - 1

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document: [length], a view of the file."""
        return self.tokens[self.borders[index] : self.borders[index + 1]]

    def token_range(self) -> tuple[int, int]:
        """Smallest and largest token id, by a pass over the file; (0, -1) if it is empty."""
        parts = [self.tokens[part] for part in chunks(self.tokens.size)]
        return min((int(p.min()) for p in parts), default=0), max((int(p.max()) for p in parts), default=-1)

    def check_tokens(self, vocab_size: int) -> None:
        """Raise DataError naming the first token id outside [0, vocab_size), by a pass over the
        file."""
        for part in chunks(self.tokens.size):
            bad = np.flatnonzero((self.tokens[part] < 0) | (self.tokens[part] >= vocab_size))
            if bad.size:
                at = part.start + int(bad[0])
                raise DataError(
                    f"{self.bin_path}: token id {self.tokens[at]} at byte "
                    f"{at * self.tokens.itemsize} is outside the vocabulary of {vocab_size}; set "
                    "the model's vocabulary size to that of the tokenizer that made this file, or "
                    "prepare it again"
                )

    def _read_header(self) -> tuple[np.dtype, int, int]:
        with open(self.idx_path, "rb") as handle:
            raw = handle.read(HEADER.size)
            size = os.fstat(handle.fileno()).st_size
        if raw.startswith(b"TNTIDX"):
            raise self._bad(
                0,
                "is in the old TNTIDX format; make it again with Megatron-LM or data.prepare",
            )
        if not raw.startswith(MAGIC):
            raise self._bad(0, f"starts with {raw[:9]!r} instead of {MAGIC!r}: not a Megatron index")
        if len(raw) < HEADER.size:
            raise self._bad(len(raw), f"is truncated: the header has {HEADER.size} bytes")
        _, version, code, num_sequences, num_borders = HEADER.unpack(raw)
        if version != 1:
            raise self._bad(9, f"has version {version}; only version 1 exists")
        if code not in DTYPES:
            found = "floating-point numbers, not token ids" if code in (6, 7) else "unknown"
            raise self._bad(17, f"has dtype code {code} ({found}); token ids have one of {DTYPES}")
        wanted = HEADER.size + 12 * num_sequences + 8 * num_borders
        if size != wanted:
            hint = "a multimodal index is not supported" if size == wanted + num_sequences else "copy it again"
            what = "is truncated" if size < wanted else "has bytes too many"
            raise self._bad(
                min(size, wanted),
                f"{what}: {size} bytes, but {num_sequences} sequences and {num_borders} document "
                f"borders need {wanted}; {hint}",
            )
        return np.dtype(DTYPES[code]), num_sequences, num_borders

    def _map_idx(self, dtype: str, offset: int, count: int) -> np.ndarray:
        return _map(self.idx_path, np.dtype(dtype), offset, count)

    @property
    def _bin_bytes(self) -> int:
        return self.bin_path.stat().st_size

    def _check_sequences(self, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> None:
        """Lengths are not negative, sequences lie back to back from byte 0 and fill `.bin`."""
        expected = 0
        for part in chunks(lengths.size):
            sizes = lengths[part].astype(np.int64) * itemsize
            if (negative := np.flatnonzero(sizes < 0)).size:
                at = part.start + int(negative[0])
                raise self._bad(HEADER.size + 4 * at, f"gives sequence {at} the length {lengths[at]}")
            ends = expected + np.cumsum(sizes)
            wrong = np.flatnonzero(pointers[part] != ends - sizes)
            if wrong.size:
                at = part.start + int(wrong[0])
                raise self._bad(
                    HEADER.size + 4 * lengths.size + 8 * at,
                    f"puts sequence {at} at byte {pointers[at]} of .bin, but the lengths before it "
                    f"add up to {ends[wrong[0]] - sizes[wrong[0]]}",
                )
            expected = int(ends[-1])
        if self._bin_bytes != expected:
            what = "is truncated" if self._bin_bytes < expected else "has bytes too many"
            raise DataError(
                f"{self.bin_path} {what} at byte {min(self._bin_bytes, expected)}: it has "
                f"{self._bin_bytes} bytes, but {self.idx_path.name} describes {expected}; the two "
                "files do not belong together, or the copy is incomplete"
            )

    def _check_documents(self, documents: np.ndarray, num_sequences: int) -> None:
        at = HEADER.size + 12 * num_sequences
        if not documents.size or documents[0] != 0:
            raise self._bad(at, "has document borders that do not start with 0")
        for part in chunks(documents.size - 1):
            falls = np.flatnonzero(documents[part] > documents[part.start + 1 : part.stop + 1])
            if falls.size:
                raise self._bad(at + 8 * (part.start + int(falls[0]) + 1), "has document borders that decrease")
        if documents[-1] != num_sequences:
            raise self._bad(
                at + 8 * (documents.size - 1),
                f"has {num_sequences} sequences, but the last document ends at {documents[-1]}",
            )

    def _bad(self, offset: int, message: str) -> DataError:
        return DataError(f"{self.idx_path} {message} (byte {offset})")


def _map(path: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """A read-only array over a part of a file; no memmap, whose slices cost much more."""
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))


class IndexedWriter:
    """Writes one `.bin/.idx` pair, one sequence a document, in memory that does not grow with the
    corpus.

    Use as a context manager: leaving it normally publishes both files, an exception removes every
    trace. A file keeps its temporary name until it is complete and synced. The old `.idx` goes
    first and the new one comes last, so that no reader ever meets an index with the wrong tokens.

    Attributes after leaving: num_tokens, num_documents, max_token (-1 if empty), sha256 = {".bin":
    ..., ".idx": ...}.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self._code = next(code for code, name in DTYPES.items() if np.dtype(name) == dtype)
        self._paths = {suffix: Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx")}
        self._temporary = {suffix: temporary_name(path) for suffix, path in self._paths.items()}
        self._temporary[".lengths"] = temporary_name(Path(f"{prefix}.lengths"))
        self.dtype = dtype
        self.num_tokens, self.num_documents, self.max_token = 0, 0, -1
        self.sha256: dict[str, str] = {}

    def __enter__(self) -> IndexedWriter:
        self._digest = hashlib.sha256()
        self._bin = open(self._temporary[".bin"], "wb")
        self._lengths = open(self._temporary[".lengths"], "w+b")
        return self

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens back to back, and the number of tokens of each."""
        assert tokens.size == lengths.sum()
        if not lengths.size:
            return
        if lengths.max() >= 1 << 31:
            raise DataError(f"a document of {lengths.max()} tokens does not fit in an index; split it")
        if tokens.size:
            self.max_token = max(self.max_token, int(tokens.max()))
        data = tokens.astype(self.dtype, copy=False).tobytes()
        self._digest.update(data)
        self._bin.write(data)
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.num_tokens += tokens.size
        self.num_documents += lengths.size

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._bin, self._lengths:
                if error is None:
                    self.sha256 = {".bin": self._digest.hexdigest(), ".idx": self._write_idx()}
            if error is None:
                self._paths[".idx"].unlink(missing_ok=True)
                for suffix, path in self._paths.items():
                    rename_synced(self._temporary[suffix], path)
        finally:
            for path in self._temporary.values():
                path.unlink(missing_ok=True)

    def _write_idx(self) -> str:
        """Write header, lengths, byte offsets and document borders; returns the SHA-256 of the
        file."""
        digest = hashlib.sha256()
        count = self.num_documents
        with open(self._temporary[".idx"], "wb") as idx:

            def put(data: bytes) -> None:
                digest.update(data)
                idx.write(data)

            put(HEADER.pack(MAGIC, 1, self._code, count, count + 1))
            for lengths in _blocks(self._lengths):
                put(lengths.tobytes())
            offset = 0
            for lengths in _blocks(self._lengths):
                ends = offset + np.cumsum(lengths.astype("<i8") * self.dtype.itemsize)
                put(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
                offset = int(ends[-1])
            for part in chunks(count + 1):
                put(np.arange(part.start, part.stop, dtype="<i8").tobytes())
        return digest.hexdigest()


def _blocks(handle: BinaryIO) -> Iterator[np.ndarray]:
    handle.seek(0)
    while data := handle.read(4 * _CHUNK):
        yield np.frombuffer(data, dtype="<i4")
