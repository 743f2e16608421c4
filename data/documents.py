"""Documents out of files: plain text, JSON Lines and parquet, also compressed with xz, gzip or
Zstandard.

`read_records` cuts a file into batches of raw documents without decoding them, so that the costly
part, `Records.texts` (UTF-8, JSON), can run in another process. A batch knows where it starts;
whatever is wrong with a document is reported with its file, line and byte (of the decompressed
stream) or row. Memory: one batch, or the largest document.

Plain text has no agreed mark between documents, so it is said: a `file` is one document, or `blank`
lines separate documents, or each `line` is one; white space around it is dropped.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from errors import DataError, UsageError

Documents = Literal["file", "blank", "line"]

_BATCH_BYTES = 1 << 19
_LARGEST_DOCUMENT = 256 << 20  # bytes of a text file that is one document: it is held in memory whole
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TEXT_SUFFIXES = (".txt", ".text", ".md", "")
_COMPRESSED = (".xz", ".gz", ".zst")


@dataclass(frozen=True)
class Records:
    """A batch of consecutive raw documents of one file.

    Attributes:
        path, kind: the file, and how to decode a document.
        raw: the documents; for text and JSON exactly the bytes of the file from `offset` on.
        offset: byte of the (decompressed) file where the batch starts; for parquet unused.
        first: number, from 1, of the line or row where the batch starts.
        consumed: bytes of the file on disk read so far, for progress.
    """

    path: Path
    kind: Literal["json", "text", "row"]
    raw: list[bytes]
    offset: int
    first: int
    consumed: int

    def texts(self, key: str) -> list[str]:
        """Decoded documents; empty ones are kept as "", blank JSON lines left out.

        Args:
            key: field that holds the text of a JSON object.
        Raises:
            DataError: not UTF-8, not JSON, or no text under `key`.
        """
        found = (self._text(index, key) for index in range(len(self.raw)))
        return [text for text in found if text is not None]

    def _text(self, index: int, key: str) -> str | None:
        try:
            text = self.raw[index].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._bad(index, f"is not UTF-8: {error.reason}", error.start) from None
        if self.kind == "row":
            return text
        if self.kind == "text":
            return text.strip()
        if not text.strip():
            return None
        try:
            value = json.loads(text)
        except ValueError as error:
            raise self._bad(index, f"is not JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get(key), str):
            keys = f"its keys are {sorted(value)}" if isinstance(value, dict) else "it is no object"
            raise self._bad(index, f"has no text under {key!r} ({keys}); name the field with --json-key")
        try:
            value[key].encode("utf-8")
        except UnicodeEncodeError as error:
            raise self._bad(index, f"has half of a surrogate pair in {key!r}: {error.reason}") from None
        return value[key]

    def _bad(self, index: int, message: str, at: int = 0) -> DataError:
        if self.kind == "row":
            return DataError(f"{self.path}: row {self.first + index} {message}")
        before = b"".join(self.raw[:index]) + self.raw[index][:at]
        line, byte = self.first + before.count(b"\n"), self.offset + len(before)
        return DataError(f"{self.path}: line {line} (byte {byte}) {message}")


def read_records(path: Path, documents: Documents, key: str) -> Iterator[Records]:
    """Batches of the raw documents of one file, in order.

    Args:
        path: `.txt`, `.md` or no suffix, `.jsonl` (`.json`, `.ndjson`), each also `.xz`, `.gz` or
            `.zst`; `.parquet`.
        documents: what a document is in plain text.
        key: column of a parquet file.
    Raises:
        DataError: missing or damaged file.
        UsageError: unknown suffix, or a package for it is missing.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file")
    inner = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    if path.suffix == ".parquet":
        yield from _parquet_records(path, key)
        return
    if inner not in _JSON_SUFFIXES + _TEXT_SUFFIXES:
        raise UsageError(
            f"{path}: cannot tell what {inner!r} holds; known are "
            f"{', '.join(_JSON_SUFFIXES)} (JSON Lines), {', '.join(filter(None, _TEXT_SUFFIXES))} "
            f"(text), each also {', '.join(_COMPRESSED)}, and .parquet"
        )
    kind: Literal["json", "text"] = "json" if inner in _JSON_SUFFIXES else "text"
    batch: list[bytes] = []
    offset, first, size = 0, 1, 0
    with open(path, "rb") as disk:
        try:
            for raw in _pieces(_decompressed(path, disk), "line" if kind == "json" else documents, path):
                batch.append(raw)
                size += len(raw)
                if size >= _BATCH_BYTES:
                    yield Records(path, kind, batch, offset, first, disk.tell())
                    offset, first = (
                        offset + size,
                        first + sum(piece.count(b"\n") for piece in batch),
                    )
                    batch, size = [], 0
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{path} is damaged or truncated after {offset + size} decompressed bytes: {error}"
            ) from None
        if batch:
            yield Records(path, kind, batch, offset, first, disk.tell())


def read_texts(paths: Iterable[Path], documents: Documents, key: str) -> Iterator[str]:
    """All documents of several files, decoded."""
    for path in paths:
        for records in read_records(path, documents, key):
            yield from records.texts(key)


def _whole(stream: io.BufferedIOBase | BinaryIO, path: Path) -> bytes:
    """A file that is one document. Raises UsageError for one that memory should not have to hold."""
    text = stream.read(_LARGEST_DOCUMENT + 1)
    if len(text) > _LARGEST_DOCUMENT:
        raise UsageError(
            f"{path} as one document is larger than {_LARGEST_DOCUMENT >> 20} MiB; say what a document is: "
            "data.documents=blank (separated by blank lines) or line, --documents for data.prepare"
        )
    return text


def _pieces(stream: io.BufferedIOBase | BinaryIO, documents: Documents, path: Path) -> Iterator[bytes]:
    """Cut a stream into documents without losing a byte."""
    if documents == "line":
        yield from stream
        return
    if documents == "file":
        yield _whole(stream, path)
        return
    piece: list[bytes] = []
    filled = ended = False
    for line in stream:
        blank = not line.strip()
        if ended and not blank:
            yield b"".join(piece)
            piece, filled = [], False
        piece.append(line)
        filled = filled or not blank
        ended = filled and blank
    yield b"".join(piece)


def _decompressed(path: Path, disk: BinaryIO) -> io.BufferedIOBase | BinaryIO:
    if path.suffix in _COMPRESSED and not path.stat().st_size:
        raise EOFError("there is not even a header")  # an empty gzip or Zstandard stream would read as no text
    match path.suffix:
        case ".xz":
            return lzma.open(disk)
        case ".gz":
            return gzip.open(disk)
        case ".zst":
            return io.BufferedReader(_ZstdStream(path, disk), 1 << 17)
    return disk


class _ZstdStream(io.RawIOBase):
    """Zstandard frames as a raw stream. The package's own reader takes a truncated file for a
    complete one."""

    def __init__(self, path: Path, disk: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise UsageError(f"{path} needs the `zstandard` package: pip install zstandard") from None
        self._zstandard, self._disk = zstandard, disk
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = data or self._disk.read(1 << 15)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the last Zstandard frame is incomplete")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _parquet_records(path: Path, key: str) -> Iterator[Records]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{path} needs the `pyarrow` package: pip install pyarrow") from None
    row, size = 1, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if key not in table.schema_arrow.names:
                raise DataError(
                    f"{path} has no column {key!r}, only {table.schema_arrow.names}; name it with --json-key"
                )
            for batch in table.iter_batches(batch_size=256, columns=[key]):
                values = batch.column(0).to_pylist()
                for index, value in enumerate(values):
                    if not isinstance(value, str):
                        raise DataError(f"{path}: row {row + index} of column {key!r} holds {value!r:.80}, not text")
                consumed = size * (row - 1 + len(values)) // table.metadata.num_rows
                yield Records(path, "row", [value.encode() for value in values], 0, row, consumed)
                row += len(values)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is damaged or not parquet (after row {row - 1}): {error}") from None
