"""Prepared data on demand: a training run names a text file, and gets tokens.

Tokenizers and tokens are made once per content of the inputs and options, into a cache directory,
by whichever of many ranks comes first; the others wait for its lock.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data.cache import digest_of, file_lock, remember, sha256_file
from data.documents import Documents, read_texts
from data.prepare import FORMAT
from data.tokenizer import TRAINED_KINDS, train_sentencepiece
from errors import DataError, UsageError


def ensure_tokenizer(
    spec: str, sources: Sequence[Path], vocab_size: int, cache: Path, documents: Documents = "file"
) -> Path:
    """Path of the tokenizer `spec`; "bpe" and "unigram" are trained on `sources` together, once,
    into `cache`.

    Safe to call from many processes at once.
    """
    if spec not in TRAINED_KINDS:
        return Path(spec)
    key = digest_of([FORMAT, spec, vocab_size, documents, [_content(cache, path) for path in sources]])
    target = cache / f"{spec}-{vocab_size}-{key}.model"
    with file_lock(target.with_suffix(".lock")):
        if not target.exists():
            train_sentencepiece(read_texts(sources, documents, "text"), target, spec, vocab_size)
    return target


def ensure_prepared(
    source: Path, tokenizer: Path, cache: Path, *, workers: int = 2, documents: Documents = "file"
) -> Path:
    """Prefix of the prepared form of `source` in `cache`, made if it is not there yet.

    Safe to call from many processes at once: one does the work, the others wait. The work is done
    by `python -m data.prepare` in a process of its own, so that the encoders do not start by
    importing all of a training run, and never fork one.

    Raises:
        DataError, UsageError: as `prepare`.
    """
    key = digest_of([FORMAT, documents, _content(cache, source), _content(cache, tokenizer)])
    prefix = cache / f"{source.name.split('.')[0]}-{key}"
    with file_lock(Path(f"{prefix}.lock")):
        if not Path(f"{prefix}.manifest.json").exists():
            _run_prepare(source, tokenizer, prefix, workers, documents)
    return prefix


def _content(cache: Path, path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file")
    suffixes = "".join(path.suffixes)  # they say how the bytes are read
    return suffixes + remember(cache, "sha256", path, lambda: sha256_file(path))


def _run_prepare(source: Path, tokenizer: Path, prefix: Path, workers: int, documents: Documents) -> None:
    options = {
        "input": source.resolve(),
        "output": prefix.resolve(),
        "tokenizer": tokenizer.resolve(),
        "workers": workers,
        "documents": documents,
    }
    command = [sys.executable, "-m", "data.prepare"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    stdout = None if sys.stdout.isatty() else subprocess.DEVNULL  # the progress bar, or nothing
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        kinds = {kind.exit_code: kind for kind in (DataError, UsageError)}
        raise kinds.get(done.returncode, RuntimeError)(done.stderr.strip())
