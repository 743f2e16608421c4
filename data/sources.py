"""Finding and opening the sources that a recipe names: prepared if need be, checked always.

A source is a file of text, or the prefix of a `.bin/.idx` pair. All token ids are known to lie in
the vocabulary before training starts: from the manifest of a pair that we made, else by one pass
over `.bin` whose result is remembered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.cache import remember, sha256_file
from data.config import DataConfig
from data.ensure import ensure_prepared, ensure_tokenizer
from data.indexed import IndexedDataset
from data.prepare import check_vocabulary
from data.tokenizer import TRAINED_KINDS, load_tokenizer
from errors import DataError, UsageError


def locate(name: str) -> Path:
    """Path of a text file or prefix, in the working directory or the repository."""
    prefix = name.removesuffix(".bin").removesuffix(".idx")
    for base in (Path(), Path(__file__).resolve().parent.parent):
        if (base / f"{prefix}.idx").is_file():
            return base / prefix
        if (base / name).is_file():
            return base / name
    raise DataError(f"data source {name}: there is neither such a file nor {prefix}.idx")


def _is_prepared(path: Path) -> bool:
    return Path(f"{path}.idx").is_file()


def find_tokenizer(config: DataConfig, train: list[Path], validation: list[Path], vocab_size: int) -> Path | None:
    """Path of the tokenizer, trained if need be, checked against sources and vocabulary."""
    spec, paths = config.tokenizer, train + validation
    if spec is None:
        if text := [str(path) for path in paths if not _is_prepared(path)]:
            raise UsageError(
                f"data.tokenizer is null, but {', '.join(text)} holds text; set it to bpe, "
                "unigram or a file, or name prepared .bin/.idx sources only"
            )
        return None
    if spec in TRAINED_KINDS and (tokens := [str(path) for path in paths if _is_prepared(path)]):
        raise UsageError(
            f"data.tokenizer is {spec}, but {', '.join(tokens)} already holds token ids; "
            "set it to the tokenizer that made them, or to null"
        )
    tokenizer = ensure_tokenizer(spec, train, vocab_size, Path(config.cache), config.documents)
    check_vocabulary(tokenizer, load_tokenizer(tokenizer).vocab_size, vocab_size)
    return tokenizer


def open_source(
    config: DataConfig, path: Path, tokenizer: Path | None, vocab_size: int
) -> tuple[IndexedDataset, dict[str, Any]]:
    """The dataset of a source, all tokens known to be in range, and its entry in `Data.sources`."""
    cache, prefix = Path(config.cache), path
    if not _is_prepared(path):
        assert tokenizer is not None
        prefix = ensure_prepared(path, tokenizer, cache, workers=config.workers, documents=config.documents)
    dataset = IndexedDataset(prefix)
    manifest = _manifest(dataset)
    if manifest is None:
        low, high = remember(cache, "range", dataset.bin_path, dataset.token_range)
        idx_hash = remember(cache, "sha256", dataset.idx_path, lambda: sha256_file(dataset.idx_path))
        bin_hash = None
    else:
        low, high = 0, manifest["max_token"]
        idx_hash, bin_hash = (manifest["outputs"][suffix]["sha256"] for suffix in (".idx", ".bin"))
        if config.verify:
            _verify(cache, dataset.idx_path, idx_hash)
            _verify(cache, dataset.bin_path, bin_hash)
        if tokenizer is not None and manifest["tokenizer"]["sha256"] != sha256_file(tokenizer):
            raise DataError(
                f"{prefix} was prepared with another tokenizer than {tokenizer}; set "
                f"data.tokenizer to {prefix.parent / manifest['tokenizer']['file']} or to null"
            )
    if low < 0 or high >= vocab_size:
        dataset.check_tokens(vocab_size)
    return dataset, {
        "source": str(path),
        "prefix": str(prefix),
        "tokens": dataset.tokens.size,
        "documents": dataset.num_documents,
        "idx_sha256": idx_hash,
        "bin_bytes": dataset.tokens.nbytes,
        "bin_sha256": bin_hash,
    }


def _verify(cache: Path, path: Path, expected: str) -> None:
    """Raise DataError unless the file is the one that was written; a pass over it, remembered."""
    if remember(cache, "sha256", path, lambda: sha256_file(path)) != expected:
        raise DataError(
            f"{path} has other content than was prepared (SHA-256): its disk or a copy damaged it; restore it, or "
            f"delete {path.with_suffix('')}.* and prepare it again"
        )


def _manifest(dataset: IndexedDataset) -> dict[str, Any] | None:
    """The manifest that `data.prepare` wrote for these files; None if they are not, or no longer,
    its work."""
    path = Path(f"{dataset.prefix}.manifest.json")
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        outputs = [manifest["outputs"][suffix] for suffix in (".bin", ".idx")]
        sizes = [output["bytes"] for output in outputs]
        texts = [*(output["sha256"] for output in outputs), *(manifest["tokenizer"][key] for key in ("sha256", "file"))]
        if not (isinstance(manifest["max_token"], int) and all(isinstance(text, str) for text in texts)):
            raise TypeError("a value of another type than was written")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); delete it, or prepare the data again") from None
    same = sizes == [dataset.bin_path.stat().st_size, dataset.idx_path.stat().st_size]
    return manifest if same else None
