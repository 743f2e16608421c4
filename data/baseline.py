"""Cross-entropy of an interpolated bigram model: what a trained model must beat to have learnt more
than counts.

    p(w | v) = a c(v w) / c(v) + b c(w) / N + (1 - a - b) / V            (Jelinek and Mercer)

c counts pairs and tokens of the training documents, packed back to back in the order of the file as
the samples are; for a v never seen, a goes to the unigram term, so that p always sums to 1. The
weights a, b maximise the likelihood of a held-out tenth of the training documents under counts of
the other nine tenths (EM); then all of them are counted.

Source: Jurafsky and Martin, "Speech and Language Processing", chapter 3. Time: two sorts of the
corpus; memory: about 40 bytes a token.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from data.stream import SampleStream

_EM_STEPS = 100


def interpolated_bigram_cross_entropy(train: SampleStream, validation: SampleStream, vocab_size: int) -> float:
    """Nats per token over exactly the tokens that the samples of `validation` predict, given the
    token before.

    Args:
        train: stream whose documents are counted (each once, whatever the weights of a blend).
        validation: stream of known length.
        vocab_size: V.
    """
    documents = list(train.documents())
    samples = (validation.sample(index) for index in range(validation.num_samples))
    return cross_entropy(documents, samples, vocab_size)


def cross_entropy(documents: list[np.ndarray], samples: Iterable[np.ndarray], vocab_size: int) -> float:
    """As `interpolated_bigram_cross_entropy`, of token arrays: each predicts its tokens but the
    first."""
    if len(documents) == 1:  # nothing to hold out but a part of it
        documents = np.array_split(documents[0], 10)
    held_out = documents[::10]
    rest = [document for index, document in enumerate(documents) if index % 10]
    pairs, counts = _count([np.concatenate(held_out)], vocab_size)
    weights = _fit(_Counts(np.concatenate(rest), vocab_size).terms(pairs), counts)
    pairs, counts = _count(samples, vocab_size)
    terms = _Counts(np.concatenate(documents), vocab_size).terms(pairs)
    return float(-(np.log(weights @ terms) @ counts) / counts.sum())


def _count(sequences: Iterable[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs v * V + w of neighbours, sorted, and how often each occurs."""
    keys = [sequence[:-1] * np.int64(vocab_size) + sequence[1:] for sequence in sequences]
    return np.unique(np.concatenate(keys), return_counts=True)


class _Counts:
    """Pair, context and token counts of one line of tokens."""

    def __init__(self, tokens: np.ndarray, vocab_size: int) -> None:
        self._pairs, self._counts = _count([tokens], vocab_size)
        self._context = np.bincount(tokens[:-1], minlength=vocab_size)
        self._unigram = np.bincount(tokens, minlength=vocab_size) / tokens.size
        self._vocab_size = vocab_size

    def terms(self, pairs: np.ndarray) -> np.ndarray:
        """Bigram, unigram and uniform probability of each pair: [3, n] float64."""
        context, token = np.divmod(pairs, self._vocab_size)
        at = np.searchsorted(self._pairs, pairs).clip(max=self._pairs.size - 1)
        count = np.where(self._pairs[at] == pairs, self._counts[at], 0)
        seen, unigram = self._context[context], self._unigram[token]
        bigram = np.where(seen > 0, count / np.maximum(seen, 1), unigram)
        return np.stack([bigram, unigram, np.full(pairs.size, 1 / self._vocab_size)])


def _fit(terms: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Weights of the terms, [3], that maximise the likelihood of `counts`, by EM."""
    weights = np.full(3, 1 / 3)
    for _ in range(_EM_STEPS):
        share = weights[:, None] * terms
        weights = (share / share.sum(axis=0)) @ counts / counts.sum()
    return weights
