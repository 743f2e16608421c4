"""The `data` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from data.documents import Documents
from data.order import shares

Source = str | tuple[float | str, ...]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train and validate on.

    Attributes:
        train: a text, JSON Lines (field `text`) or parquet file, also compressed; or the prefix of
            a Megatron
            `.bin/.idx` pair; or a blend of several, `[weight, source, weight, source, ...]`. A
            relative path is looked for in the working directory, then in the repository.
        validation: fraction of each source's documents, in (0, 0.5]; or a source of its own, as
            `train`; or null.
        tokenizer: `bpe` or `unigram`, trained on the sources of `train` with the model's vocabulary
            size; or a
            SentencePiece `.model` or Hugging Face `tokenizer.json`; or null, if all sources are
            `.bin/.idx`.
        documents: what a document is in plain text: the `file`, blocks between `blank` lines, or
            each `line`.
        cache: directory for prepared sources.
        workers: processes that prepare.
        reset_at_document: restart positions, and cut attention, at each document.
    """

    train: Source = "data/corpus/sotu.jsonl.xz"
    validation: float | Source | None = 0.05
    tokenizer: str | None = "bpe"
    documents: Documents = "file"
    cache: str = "cache/data"
    workers: int = 2
    reset_at_document: bool = False

    def problems(self) -> list[str]:
        """What is wrong with the values, as messages."""
        found = _source_problems("train", self.train)
        if isinstance(self.validation, int | float):
            if not 0 < self.validation <= 0.5:
                found.append(f"validation: a fraction lies in (0, 0.5], not {self.validation}; null for none")
        elif self.validation is not None:
            found += _source_problems("validation", self.validation)
        if self.workers < 1:
            found.append(f"workers: at least 1, not {self.workers}")
        return found


def _source_problems(key: str, source: Source) -> list[str]:
    if isinstance(source, str):
        return [] if source else [f"{key}: an empty path"]
    weights, paths = source[::2], source[1::2]
    if (
        not source
        or len(source) % 2
        or not all(isinstance(weight, int | float) for weight in weights)
        or not all(isinstance(path, str) for path in paths)
    ):
        return [f"{key}: a blend is [weight, source, weight, source, ...], not {list(source)}"]
    try:
        shares([float(weight) for weight in weights])
    except ValueError as error:
        return [f"{key}: {error}"]
    return []
