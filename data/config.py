"""The `data` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.documents import Documents
from data.order import shares

Source = str | tuple[float | str, ...]


@dataclass(frozen=True, kw_only=True)
class DataPhase:
    """From a point of the run on, another blend. A source goes on where the phases before left it.

    Attributes:
        start: first step of the phase: a step, or a fraction of train.steps if below 1.
        tokens: instead of start: the phase begins at the step that starts with this many tokens
            consumed.
        train: as `data.train`.
    """

    start: float | None = None
    tokens: int | None = None
    train: Source | None

    def first_step(self, steps: int, tokens_per_step: int) -> int:
        """The 0-based step at which it begins."""
        if self.tokens is not None:
            return -(-self.tokens // tokens_per_step)
        assert self.start is not None, "refused by DataConfig.problems"
        return round(self.start * steps) if self.start < 1 else round(self.start)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train and validate on.

    Attributes:
        train: a text, JSON Lines (field `text`) or parquet file, also compressed; or the prefix of
            a Megatron
            `.bin/.idx` pair; or a blend of several, `[weight, source, weight, source, ...]`. A
            relative path is looked for in the working directory, then in the repository. null: the
            recipe is for data of your own; a run needs them, a dry run does not.
        phases: other blends from some step on, in order; `train` is the one before the first.
        validation: fraction of the documents of each source of `train`, in (0, 0.5]; or a source
            of its own, as `train`; or null.
        tokenizer: `bpe` or `unigram`, trained on the sources of `train` and `phases` with the model's
            vocabulary size; or a
            SentencePiece `.model` or Hugging Face `tokenizer.json`; or null, if all sources are
            `.bin/.idx`.
        documents: what a document is in plain text: the `file`, blocks between `blank` lines, or
            each `line`.
        cache: directory for prepared sources.
        workers: processes that prepare.
        reset_at_document: restart positions, and cut attention, at each document.
        verify: compare prepared files with the SHA-256 of their manifest, once per modification of the
            file. Files without a manifest are only searched for token ids outside the vocabulary.
        corrupt: what to do with a sample whose tokens are outside the vocabulary although the file was
            found in order (its disk is failing): `error`, or `skip` it for the next one of its
            source, which is counted.
    """

    train: Source | None = "data/corpus/sotu.jsonl.xz"
    phases: tuple[DataPhase, ...] = ()
    validation: float | Source | None = 0.05
    tokenizer: str | None = "bpe"
    documents: Documents = "file"
    cache: str = "cache/data"
    workers: int = 2
    reset_at_document: bool = False
    verify: bool = True
    corrupt: Literal["error", "skip"] = "error"

    def problems(self) -> list[str]:
        """What is wrong with the values, as messages."""
        found = _source_problems("train", self.train)
        for index, phase in enumerate(self.phases):
            found += _phase_problems(f"phases[{index}]", phase)
        if isinstance(self.validation, int | float):
            if not 0 < self.validation <= 0.5:
                found.append(f"validation: a fraction lies in (0, 0.5], not {self.validation}; null for none")
        elif self.validation is not None:
            found += _source_problems("validation", self.validation)
        if self.workers < 1:
            found.append(f"workers: at least 1, not {self.workers}")
        return found


def _phase_problems(key: str, phase: DataPhase) -> list[str]:
    found = _source_problems(f"{key}.train", phase.train)
    if (phase.start is None) == (phase.tokens is None):
        found.append(f"{key} needs either start or tokens")
    return found


def _source_problems(key: str, source: Source | None) -> list[str]:
    if source is None:
        return []
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
