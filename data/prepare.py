"""Text files to a Megatron `.bin/.idx` pair: `python -m data.prepare --input FILES --output PREFIX
--tokenizer ...`

One process reads, N encode, the reader writes their results in the order of the input; so the
output does not depend on N. At most 3 batches a worker are under way, hence memory does not grow
with the corpus. Written are `PREFIX.bin`, `PREFIX.idx`, `PREFIX.tokenizer.model` (or `.json`), and
last `PREFIX.manifest.json`: hashes of the inputs, the tokenizer and both outputs, counts, the
largest token id and the options. Each document ends with EOD.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from data.cache import sha256_file, write_atomic
from data.documents import Documents, Records, read_records, read_texts
from data.indexed import IndexedWriter, token_dtype
from data.tokenizer import TRAINED_KINDS, load_tokenizer, train_sentencepiece
from errors import DataError, UsageError, UserError

FORMAT = 1  # raise it when the same input would give other tokens: it is part of every cache key
_BATCHES_PER_WORKER = 3
Encoded = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to prepare and how.

    Attributes:
        inputs: files, see `data.documents.read_records`; their documents follow each other.
        output: prefix of the files to write.
        tokenizer: "bpe" or "unigram" (trained on the inputs), or a `.model` or `tokenizer.json`
            file.
        vocab_size: size of a tokenizer to train; upper limit for a given one.
        json_key: field of JSON objects, or column of parquet, that holds the text.
        documents: what a document is in plain text: the file, blocks between blank lines, or each
            line.
        eod: end each document with the EOD token.
        eod_token: name of that token, None for the usual ones.
        workers: processes that encode.
    """

    inputs: tuple[Path, ...]
    output: Path
    tokenizer: str
    vocab_size: int | None = None
    json_key: str = "text"
    documents: Documents = "file"
    eod: bool = True
    eod_token: str | None = None
    workers: int = 2


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Write the files described above and return the manifest.

    Raises:
        DataError: bad or empty input, or the output cannot be written; nothing is left
            half-written.
        UsageError: options that do not fit together.
    """
    if options.workers < 1:
        raise UsageError(f"--workers is {options.workers}; at least 1 is needed")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        return _prepare(options)
    except BrokenProcessPool:
        raise DataError(
            "an encoding process died, most likely for lack of memory; use fewer workers, or shorter documents"
        ) from None
    except OSError as error:
        raise DataError(f"{error.filename or options.output}: {error.strerror}") from None


def _prepare(options: PrepareOptions) -> dict[str, Any]:
    with TemporaryDirectory(prefix=".tokenizer-", dir=options.output.parent) as folder:
        source = Path(options.tokenizer)
        if options.tokenizer in TRAINED_KINDS:
            source = _train(options, Path(folder))
        tokenizer = load_tokenizer(source, options.eod_token)
        check_vocabulary(source, tokenizer.vocab_size, options.vocab_size)
        writer = IndexedWriter(options.output, token_dtype(tokenizer.vocab_size))
        manifest_path = Path(f"{options.output}.manifest.json")
        empty = 0
        with writer:
            encode = partial(_encode, options=options, tokenizer=source, dtype=writer.dtype.str)
            for tokens, lengths in _in_order(encode, _batches(options), options.workers):
                writer.add(tokens, lengths[lengths > 0])
                empty += int((lengths == 0).sum())
            if not writer.num_tokens:
                names = ", ".join(map(str, options.inputs))
                raise DataError(f"no document with text in {names}: the corpus is empty")
            manifest_path.unlink(missing_ok=True)  # from here on it would not be true
        beside = Path(f"{options.output}.tokenizer{source.suffix}")
        write_atomic(beside, source.read_bytes())
    manifest = _manifest(options, writer) | {
        "empty_documents": empty,
        "tokenizer": _file(beside) | {"vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id},
    }
    write_atomic(manifest_path, (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def _manifest(options: PrepareOptions, writer: IndexedWriter) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "tokens": writer.num_tokens,
        "documents": writer.num_documents,
        "max_token": writer.max_token,
        "dtype": writer.dtype.name,
        "outputs": {
            suffix: {"bytes": Path(f"{options.output}{suffix}").stat().st_size, "sha256": digest}
            for suffix, digest in writer.sha256.items()
        },
        "inputs": [_file(path) for path in options.inputs],
        "options": json.loads(json.dumps(asdict(options), default=str)),
    }


def _file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _train(options: PrepareOptions, folder: Path) -> Path:
    if options.vocab_size is None:
        raise UsageError(f"--tokenizer {options.tokenizer} needs --vocab-size")
    texts = read_texts(options.inputs, options.documents, options.json_key)
    train_sentencepiece(texts, folder / "new.model", options.tokenizer, options.vocab_size)
    return folder / "new.model"


def _encode(records: Records, options: PrepareOptions, tokenizer: Path, dtype: str) -> Encoded:
    """Tokens of a batch back to back, and the length of each document, 0 for one without text.

    Runs in a worker.
    """
    model = _load_once(tokenizer, options.eod_token)
    end = [model.eod_id] if options.eod else []
    texts = records.texts(options.json_key)
    documents = [ids + end if (ids := model.encode(text)) else [] for text in texts]
    parts = [np.array(ids, dtype=dtype) for ids in documents]
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype)
    return tokens, np.array([part.size for part in parts], dtype=np.int64)


_load_once = lru_cache(maxsize=1)(load_tokenizer)


def check_vocabulary(path: Path, size: int, limit: int | None) -> None:
    """Raise UsageError if a tokenizer has more ids than `limit`."""
    if limit is not None and size > limit:
        raise UsageError(f"tokenizer {path} has {size} ids, more than the vocabulary size {limit}; raise that")


def _batches(options: PrepareOptions) -> Iterator[Records]:
    """All batches, under a progress bar over the bytes on disk if standard output is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = sum(path.stat().st_size for path in options.inputs if path.is_file())
        task, done = progress.add_task("encode", total=total), 0
        for path in options.inputs:
            for records in read_records(path, options.documents, options.json_key):
                yield records
                progress.update(task, completed=done + records.consumed)
            done += path.stat().st_size


def _in_order(function: Callable[[Records], Encoded], items: Iterator[Records], workers: int) -> Iterator[Encoded]:
    """`map(function, items)` over worker processes, with a bounded number of items under way."""
    if workers == 1:
        yield from map(function, items)
        return
    ignore_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), ignore_interrupt)
    try:
        pending: deque[Future[Encoded]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= _BATCHES_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="text, JSON Lines or parquet",
    )
    add(
        "--output",
        type=Path,
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.bin, PREFIX.idx, ...",
    )
    add(
        "--tokenizer",
        required=True,
        metavar="bpe|unigram|PATH",
        help="train one, or a .model or tokenizer.json",
    )
    add("--vocab-size", type=int, metavar="N", help="of a tokenizer to train; limit for a given one")
    add(
        "--json-key",
        default="text",
        metavar="KEY",
        help="field or column with the text (%(default)s)",
    )
    add(
        "--documents",
        choices=get_args(Documents),
        default="file",
        help="in plain text (%(default)s)",
    )
    add("--workers", type=int, default=2, metavar="N", help="encoding processes (%(default)s)")
    add("--eod-token", metavar="NAME", help="token that ends documents, if not a usual one")
    add("--no-eod", dest="eod", action="store_false", help="do not end documents with EOD")
    options = vars(parser.parse_args(arguments))
    start = time.perf_counter()
    try:
        manifest = prepare(PrepareOptions(inputs=tuple(options.pop("input")), **options))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    seconds = time.perf_counter() - start
    counts = f"{manifest['tokens']} tokens, {manifest['documents']} documents"
    print(f"{options['output']}: {counts}, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
