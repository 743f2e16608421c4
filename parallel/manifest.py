"""What makes a directory of files a checkpoint: a manifest with the size and the XXH3 hash (128 bits) of each of them.

DCP and torch.load notice neither a flipped byte nor a zeroed page, and a file cut short only sometimes. So every rank
hashes its files while it writes them (hashed_file.py) and syncs them, rank 0 writes `manifest.json` when all have done
so, and nothing is read from a checkpoint before every file was found as listed. A directory without a manifest is not
a checkpoint.

    {"format": 2, "files": {".metadata": {"size": 2210, "xxh3_128": "9f..."}, "__0_0.distcp": {...}, ...}}

XXH3 is there to find damage, at a tenth of the cost of SHA-256, which a save behind training takes from training;
neither would keep out who rewrites the manifest as well. Format 1 had SHA-256, and is still read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 2
HASH = "xxh3_128"
HASHES: dict[str, Callable[[], Any]] = {HASH: xxhash.xxh3_128, "sha256": hashlib.sha256}
THREADS = 4  # hashing and fsync release the interpreter lock


@dataclass(frozen=True)
class FileRecord:
    """Size [bytes] and hash (hexadecimal) of one file, and which hash it is: a key of HASHES."""

    size: int
    digest: str
    kind: str = HASH

    @classmethod
    def of(cls, path: Path, kind: str = HASH) -> FileRecord:
        """Read the file. Raises OSError."""
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, HASHES[kind]).hexdigest()
            return cls(stream.tell(), digest, kind)

    @classmethod
    def listed(cls, entry: dict[str, Any]) -> FileRecord:
        """As a manifest lists it. Raises ValueError."""
        (kind,) = entry.keys() - {"size"}
        if kind not in HASHES:
            raise ValueError(f"{kind!r} is not a hash that this version knows")
        return cls(entry["size"], entry[kind], kind)


def sync(path: Path) -> None:
    """Force a file or a directory (its entries) to permanent storage."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file and sync it; not atomic."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync(path)


def to_json(value: Any) -> str:
    """Readable JSON whose numbers read back exactly."""
    return json.dumps(value, indent=1) + "\n"


def seal(folder: Path, written: Mapping[str, FileRecord], others: Iterable[str]) -> dict[str, FileRecord]:
    """Sync the files `written`, whose records are known, and `others`; the records of all, keyed by file name."""
    others = list(others)
    with ThreadPoolExecutor(THREADS) as pool:
        for done in pool.map(lambda name: sync(folder / name), [*written, *others]):
            assert done is None
    return {**written, **{name: FileRecord.of(folder / name) for name in others}}


def write_manifest(folder: Path, files: dict[str, FileRecord]) -> None:
    """Write and sync the manifest of `folder`, then the folder's own entries."""
    listed = {name: {"size": record.size, record.kind: record.digest} for name, record in sorted(files.items())}
    write_text(folder / MANIFEST, to_json({"format": FORMAT, "files": listed}))
    sync(folder)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The files that make up the checkpoint. Raises CheckpointError if there is no readable manifest."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] not in (1, FORMAT):
            raise CheckpointError(f"{path}: format {content['format']!r}, this version reads 1 and {FORMAT}")
        files = {name: FileRecord.listed(entry) for name, entry in content["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a checkpoint, or not a complete one") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if strange := [name for name in files if name == ".." or name != Path(name).name]:
        raise CheckpointError(f"{path} lists {strange[:3]}, which are not names of files beside it")
    return files


def share(files: dict[str, FileRecord], rank: int, size: int) -> dict[str, FileRecord]:
    """The files that `rank` of `size` verifies: all ranks together take each file once, bytes balanced."""
    load = [0] * size
    mine: dict[str, FileRecord] = {}
    for name, record in sorted(files.items(), key=lambda item: (-item[1].size, item[0])):
        taker = load.index(min(load))
        load[taker] += record.size
        if taker == rank:
            mine[name] = record
    return mine


def verify(folder: Path, files: dict[str, FileRecord]) -> None:
    """Compare files with their records. Raises CheckpointError naming every file that differs, and how."""
    with ThreadPoolExecutor(THREADS) as pool:
        defects = list(filter(None, pool.map(lambda item: _defect(folder / item[0], item[1]), files.items())))
    if defects:
        raise CheckpointError("; ".join(defects[:3]) + (f"; {len(defects) - 3} more" if defects[3:] else ""))


def _defect(path: Path, expected: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{path} has {size} bytes instead of {expected.size}"
        found = FileRecord.of(path, expected.kind)
        return None if found == expected else f"{path} has other content than was written ({expected.kind})"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
