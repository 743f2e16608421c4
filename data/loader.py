"""From the recipe's `data` section to the streams of samples that a run trains and validates on.

    text, JSON Lines, parquet --tokenizer--> .bin/.idx --documents--> train | validation --> samples

Sources that are text are prepared into the cache at the first start. The validation fraction is
taken by document, evenly spread over each source of the first phase (of 233 documents and 0.05: 12, every 19th or
20th), and depends on nothing but the number of documents: runs with different seeds are validated
on the same tokens, and none of them trains on any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, Source
from data.indexed import IndexedDataset
from data.order import Blend, PhasedBlend
from data.sources import find_tokenizer, locate, open_source
from data.stream import Checks, PackedDocuments, SampleStream
from errors import DataError, UsageError

Part = tuple[IndexedDataset, np.ndarray]  # a dataset and the numbers of the documents to use


@dataclass(frozen=True)
class Data:
    """Open data of a run.

    Attributes:
        train: endless.
        validation: None if there is none.
        tokenizer_path: file of the tokenizer, None if training runs on prepared tokens alone.
        sources: one flat dict per source, for the run's manifest: role, source, prefix, tokens,
            documents, idx_sha256,
            bin_bytes, bin_sha256 (None for files that we did not make: hashing them would take a
            pass).
    """

    train: SampleStream
    validation: SampleStream | None
    tokenizer_path: Path | None
    sources: tuple[dict[str, Any], ...]

    def hashes(self) -> list[dict[str, Any]]:
        """`sources`, for the run manifest."""
        return list(self.sources)

    def description(self) -> str:
        """One line per source and stream, for people."""
        lines = [
            f"{s['role']} {s['source']}: {s['tokens']:,} tokens, {s['documents']:,} documents, "
            + (f"sha256 {s['bin_sha256'][:12]}" if s["bin_sha256"] else "tokens not hashed")
            for s in self.sources
        ]
        for name, stream in (("train", self.train), ("validation", self.validation)):
            if stream is not None:
                lines.append(f"{name}: {stream.num_samples:,} samples of {stream.seq_len:,} tokens")
        return "\n".join(lines)


def open_data(config: DataConfig, *, vocab_size: int, seq_len: int, seed: int, starts: Sequence[int] = ()) -> Data:
    """Prepare what is not prepared, open and check everything. Many ranks of a node may call this
    at once.

    Args:
        starts: first sample of each of config.phases.
        vocab_size: ids of the model; every token must be below.
        seq_len: S, tokens that a sample predicts.
        seed: of the shuffles; not of the validation split.
    Raises:
        DataError, UsageError: a source or the tokenizer cannot be used.
    """
    train, own, fraction = _weighted("data.train", config.train), [], None
    phases = [_weighted(f"data.phases[{i}].train", phase.train) for i, phase in enumerate(config.phases)]
    if isinstance(config.validation, int | float):
        fraction = config.validation
    elif config.validation is not None:
        own = _weighted("data.validation", config.validation)
    first, own_paths = ([path for _, path in blend] for blend in (train, own))
    later = dict.fromkeys(path for blend in phases for _, path in blend if path not in first)
    train_paths = [*first, *later]
    try:
        tokenizer = find_tokenizer(config, train_paths, own_paths, vocab_size)
        opened = [open_source(config, path, tokenizer, vocab_size) for path in train_paths + own_paths]
    except OSError as error:
        raise DataError(f"{error.filename or config.cache}: {error.strerror}") from None
    datasets = [dataset for dataset, _ in opened]
    training = held_out = [(dataset, np.arange(dataset.num_documents)) for dataset in datasets]
    if fraction:
        splits = [(dataset, *split_documents(dataset, fraction)) for dataset in datasets[: len(train)]]
        training = [(dataset, chosen) for dataset, chosen, _ in splits] + training[len(train) :]
        held_out = [(dataset, chosen) for dataset, _, chosen in splits]

    def stream(blend: Blend | PhasedBlend, parts: list[Part], shuffled: bool) -> SampleStream:
        packed = [
            PackedDocuments(dataset, documents, seq_len, (seed, index) if shuffled else None)
            for index, (dataset, documents) in enumerate(parts)
        ]
        checks = Checks(vocab_size, skip=config.corrupt == "skip")
        return SampleStream(packed, blend, endless=shuffled, reset=config.reset_at_document, checks=checks)

    blend, validation = Blend([weight for weight, _ in train]), None
    if fraction:
        validation = stream(blend, held_out, shuffled=False)
    elif own:
        validation = stream(Blend([weight for weight, _ in own]), held_out[len(train_paths) :], shuffled=False)
    if phases:
        blend = _phased([train, *phases], [0, *starts], train_paths)
    roles = ["train"] * len(train_paths) + ["validation"] * len(own)
    return Data(
        train=stream(blend, training[: len(train_paths)], shuffled=True),
        validation=validation,
        tokenizer_path=tokenizer,
        sources=tuple({"role": role, **info} for role, (_, info) in zip(roles, opened, strict=True)),
    )


def _phased(blends: list[list[tuple[float, Path]]], starts: list[int], paths: list[Path]) -> PhasedBlend:
    """The blends by the numbers that `paths` gives their sources (one named twice in the first blend has two)."""
    numbered = [{i: weight for i, (weight, _) in enumerate(blends[0])}]
    for index, blend in enumerate(blends[1:]):
        numbered.append({paths.index(path): weight for weight, path in blend})
        if len(numbered[-1]) < len(blend):
            raise UsageError(
                f"data.phases[{index}].train names a source twice; name it once, with both weights together"
            )
    return PhasedBlend(list(zip(starts, numbered, strict=True)))


def split_documents(dataset: IndexedDataset, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and of the validation documents; the latter evenly spread.

    Raises:
        DataError: there is only one document.
    """
    count = dataset.num_documents
    if count < 2:
        raise DataError(
            f"{dataset.bin_path} has {count} document, so no part of them can be held out; "
            "set data.validation to a file or null, or cut plain text with data.documents=blank"
        )
    held_out = max(1, round(count * fraction))
    chosen = (2 * np.arange(held_out) + 1) * count // (2 * held_out)
    return np.delete(np.arange(count), chosen), chosen


def _weighted(key: str, source: Source | None) -> list[tuple[float, Path]]:
    """(weight, path) of each source of a blend."""
    if source is None:
        raise UsageError(
            f"{key} is null: this recipe is for data of your own; set it to a file, the prefix of a .bin/.idx pair "
            "or a blend, and data.tokenizer to their tokenizer"
        )
    pairs = [(1.0, source)] if isinstance(source, str) else zip(source[::2], source[1::2], strict=True)
    return [(float(weight), locate(str(path))) for weight, path in pairs]
