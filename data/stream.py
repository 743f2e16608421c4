"""An endless, reproducible stream of samples: sample i is a function of i, and of nothing else that
changes.

Packing, as in Megatron-LM: the documents of an epoch, in shuffled order, form one long line of
tokens; sample j of the epoch is tokens [j * S, j * S + S] of it, S + 1 tokens of which the last is
the first of sample j + 1, so that every token but the first is predicted once. Then the samples of
the epoch are shuffled. What does not fill a sample at the end of an epoch is left out (another tail
each epoch). Both orders are functions of (seed, epoch, source).

There is no other state. A run's position is the number of samples that it has consumed, whatever
the number of ranks.
Memory: 24 bytes a document and 8 a sample, for two epochs at most; tokens stay in the mapped file.
Batches are copied into one int64 buffer, which also converts them. Samples within one document,
which are most where documents are long, take one gather through a sliding-window view. Every batch is
searched for ids outside the vocabulary: a file can change under a run, and an embedding read out of
bounds is no error that says so, or none at all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from data.indexed import IndexedDataset
from data.order import Blend, PhasedBlend, permutation
from errors import DataError

log = logging.getLogger(__name__)

_SUBSTITUTES = 1000  # samples tried in place of a damaged one: more in a row are no accident


@dataclass(frozen=True)
class Checks:
    """What every sample must be. skip: take another instead of one that is not; else an error."""

    vocab_size: int
    skip: bool = False

    def passed(self, tokens: np.ndarray) -> bool:
        """Whether all ids are of the vocabulary."""
        return tokens.size == 0 or (int(tokens.min()) >= 0 and int(tokens.max()) < self.vocab_size)


@dataclass(frozen=True)
class Batch:
    """Some samples of a stream; B samples of S predicted tokens.

    Attributes:
        tokens, labels: [B, S] int64; views of one [B, S + 1] buffer, so not contiguous.
        positions: [B, S] int64, from 0 at the sample's start and after each EOD; None: 0 .. S - 1
            everywhere.
        document_ids: [B, S] int32, 0, 1, ... within a sample; None: attention crosses documents.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None
    document_ids: torch.Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        positions, document_ids = (None if x is None else x.to(device) for x in (self.positions, self.document_ids))
        return Batch(self.tokens.to(device), self.labels.to(device), positions, document_ids)


class _Epoch(NamedTuple):
    """Documents in their order, all [D] int64, and samples in theirs, [n] int64."""

    starts: np.ndarray  # where the document starts in the file
    lengths: np.ndarray  # its tokens
    line: np.ndarray  # where it starts in the line
    samples: np.ndarray  # their numbers in the line


class _Buffers(NamedTuple):
    """What a batch is filled into: three times [B, S + 1], and 0 .. S to copy positions from."""

    tokens: np.ndarray
    positions: np.ndarray | None
    document_ids: np.ndarray | None
    columns: np.ndarray

    def fill(self, rows: np.ndarray, samples: np.ndarray) -> None:
        """Put samples that lie within one document into their rows."""
        self.tokens[rows] = samples
        if self.positions is not None and self.document_ids is not None:
            self.positions[rows] = self.columns
            self.document_ids[rows] = 0


class PackedDocuments:
    """Documents of one dataset, packed into samples.

    Attributes:
        seq_len: S, predicted tokens of a sample.
        num_samples: samples in an epoch.
        num_tokens: tokens of these documents.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: np.ndarray,
        seq_len: int,
        key: tuple[int, ...] | None,
    ) -> None:
        """
        Args:
            documents: numbers of the documents to use.
            seq_len: S, predicted tokens of a sample.
            key: seed and source number for shuffling; None keeps the order of the file, in every
                epoch.
        Raises:
            DataError: not enough tokens for one sample.
        """
        lengths = dataset.borders[documents + 1] - dataset.borders[documents]
        self._dataset, self._documents = dataset, documents[lengths > 0]
        self.seq_len, self._key = seq_len, key
        self.num_tokens = int(lengths.sum())
        self.num_samples = (self.num_tokens - 1) // seq_len
        if self.num_samples < 1:
            raise DataError(
                f"{dataset.bin_path}: {self.num_tokens} tokens in {documents.size} documents, but "
                f"one sample needs seq_len + 1 = {seq_len + 1}; use more data, a shorter "
                "sequence, or another validation fraction"
            )
        self._windows = np.lib.stride_tricks.sliding_window_view(dataset.tokens, seq_len + 1)
        self._epoch = lru_cache(maxsize=2)(self._order)

    def documents(self) -> Iterator[np.ndarray]:
        """Tokens of each document, in the order of the file."""
        return map(self._dataset.document, self._documents.tolist())

    def copy(self, numbers: np.ndarray, rows: np.ndarray, out: _Buffers) -> None:
        """Copy samples `numbers` [b] of this source into rows `rows` [b] of the buffers."""
        epochs, within = np.divmod(numbers, self.num_samples)
        for epoch in sorted(set(epochs.tolist())):
            order, here = self._epoch(epoch), epochs == epoch
            begins = order.samples[within[here]] * self.seq_len
            documents = np.searchsorted(order.line, begins, side="right") - 1
            skipped = begins - order.line[documents]
            sources, left = order.starts[documents] + skipped, order.lengths[documents] - skipped
            whole = left > self.seq_len  # within one document: one gather for all of them
            out.fill(rows[here][whole], self._windows[sources[whole]])
            columns = (column[~whole].tolist() for column in (rows[here], documents, sources, left))
            for row in zip(*columns, strict=True):
                self._copy_sample(order, out, *row)

    def _copy_sample(self, order: _Epoch, out: _Buffers, row: int, document: int, source: int, left: int) -> None:
        """Fill one row: `left` tokens from `source` of the file on, which end `document`, then
        those that follow."""
        width, begin, piece = self.seq_len + 1, 0, 0
        while True:
            end = min(begin + left, width)
            out.tokens[row, begin:end] = self._dataset.tokens[source : source + end - begin]
            if out.positions is not None and out.document_ids is not None:
                out.positions[row, begin:end] = out.columns[: end - begin]
                out.document_ids[row, begin:end] = piece
            if end == width:
                return
            begin, piece, document = end, piece + 1, document + 1
            source, left = order.starts.item(document), order.lengths.item(document)

    def damage(self, number: int, tokens: np.ndarray, vocab_size: int) -> str:
        """Which of the `tokens` of sample `number` is outside the vocabulary, and where it lies in the file."""
        column = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
        epoch, within = divmod(number, self.num_samples)
        order = self._epoch(epoch)
        place = int(order.samples[within]) * self.seq_len + column
        document = int(np.searchsorted(order.line, place, side="right")) - 1
        at = int(order.starts[document] + place - order.line[document]) * self._dataset.tokens.itemsize
        what = f"token id {tokens[column]} at byte {at}"
        return f"{self._dataset.bin_path}: {what} is outside the vocabulary of {vocab_size}"

    def _order(self, epoch: int) -> _Epoch:
        documents, samples = self._documents, np.arange(self.num_samples)
        if self._key is not None:
            documents = documents[permutation(documents.size, *self._key, epoch, 0)]
            samples = permutation(self.num_samples, *self._key, epoch, 1)
        starts = self._dataset.borders[documents]
        lengths = self._dataset.borders[documents + 1] - starts
        return _Epoch(starts, lengths, np.cumsum(lengths) - lengths, samples)


class SampleStream:
    """Samples 0, 1, 2, ... of a blend of sources.

    Attributes:
        seq_len: S; a sample has S + 1 tokens.
        num_samples: samples before any source repeats one of its own.
        endless: later samples exist (further epochs); else asking for one is an IndexError.
        skipped: (source, number within it) of the damaged samples that were left out so far.
    """

    def __init__(
        self,
        parts: Sequence[PackedDocuments],
        blend: Blend | PhasedBlend,
        *,
        endless: bool,
        reset: bool,
        checks: Checks,
    ) -> None:
        self._parts, self._blend, self._reset, self._checks = parts, blend, reset, checks
        self.skipped: set[tuple[int, int]] = set()
        self.seq_len, self.endless = parts[0].seq_len, endless
        self.num_samples = int(min(blend.first_use(j, part.num_samples) for j, part in enumerate(parts)))

    def documents(self) -> Iterator[np.ndarray]:
        """Tokens of each document, source by source, in the order of the files."""
        for part in self._parts:
            yield from part.documents()

    def sample(self, index: int) -> np.ndarray:
        """Tokens of one sample: [S + 1] int64."""
        return self._copy(np.array([index]), reset=False).tokens[0]

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Samples of the given numbers, in that order."""
        buffers = self._copy(np.asarray(indices, dtype=np.int64), self._reset)
        tokens = torch.from_numpy(buffers.tokens)
        if buffers.positions is None or buffers.document_ids is None:
            return Batch(tokens[:, :-1], tokens[:, 1:], None, None)
        positions = torch.from_numpy(buffers.positions)[:, :-1]
        document_ids = torch.from_numpy(buffers.document_ids)[:, :-1]
        return Batch(tokens[:, :-1], tokens[:, 1:], positions, document_ids)

    def _copy(self, indices: np.ndarray, reset: bool) -> _Buffers:
        low, high = indices.min(initial=0), indices.max(initial=0)
        if low < 0 or (not self.endless and high >= self.num_samples):
            raise IndexError(f"samples {low} to {high} of a stream that has {self.num_samples}")
        shape = (indices.size, self.seq_len + 1)
        positions = np.empty(shape, np.int64) if reset else None
        document_ids = np.empty(shape, np.int32) if reset else None
        tokens, columns = np.empty(shape, np.int64), np.arange(shape[1])
        out = _Buffers(tokens, positions, document_ids, columns)
        sources, numbers = self._blend.locate(indices)
        for source, part in enumerate(self._parts):
            rows = np.flatnonzero(sources == source)
            part.copy(numbers[rows], rows, out)
        if not self._checks.passed(tokens):
            for row in range(indices.size):
                self._mend(int(sources[row]), int(numbers[row]), row, out)
        return out

    def _mend(self, source: int, number: int, row: int, out: _Buffers) -> None:
        """Put the next whole sample of the source into `row` if this one is damaged. Raises DataError."""
        part, tokens = self._parts[source], out.tokens[row]
        if self._checks.passed(tokens):
            return
        damage = part.damage(number, tokens, self._checks.vocab_size)
        if not self._checks.skip:
            raise DataError(f"{damage}, but was not when the run began; restore the file, or set data.corrupt=skip")
        if (source, number) not in self.skipped:
            self.skipped.add((source, number))
            log.warning("sample %d is left out: %s", number, damage)
        for other in range(number + 1, number + 1 + _SUBSTITUTES):
            part.copy(np.array([other if self.endless else other % part.num_samples]), np.array([row]), out)
            if self._checks.passed(tokens):
                return
        raise DataError(f"{damage}, and so it goes on for {_SUBSTITUTES} samples; restore the file")
