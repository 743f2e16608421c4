"""The bigram baseline against dictionaries and plain loops."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.baseline import _Counts, cross_entropy
from data.loader import DataConfig, open_data


def brute_force(documents: list[list[int]], samples: list[list[int]], vocab_size: int) -> float:
    """The same model, one probability at a time."""

    def counted(parts: list[list[int]]):
        line = [token for part in parts for token in part]
        return (
            Counter(zip(line, line[1:], strict=False)),
            Counter(line[:-1]),
            Counter(line),
            len(line),
        )

    def terms(model, v: int, w: int) -> list[float]:
        pairs, contexts, unigrams, total = model
        unigram = unigrams[w] / total
        bigram = pairs[v, w] / contexts[v] if contexts[v] else unigram
        return [bigram, unigram, 1 / vocab_size]

    held_out = [token for document in documents[::10] for token in document]
    rest = counted([document for i, document in enumerate(documents) if i % 10])
    weights = [1 / 3] * 3
    for _ in range(100):
        gained = [0.0] * 3
        for v, w in zip(held_out, held_out[1:], strict=False):
            parts = [a * b for a, b in zip(weights, terms(rest, v, w), strict=True)]
            gained = [g + part / sum(parts) for g, part in zip(gained, parts, strict=True)]
        weights = [g / sum(gained) for g in gained]
    model, total, count = counted(documents), 0.0, 0
    for sample in samples:
        for v, w in zip(sample, sample[1:], strict=False):
            total -= math.log(sum(a * b for a, b in zip(weights, terms(model, v, w), strict=True)))
            count += 1
    return total / count


DOCUMENT = st.lists(st.integers(0, 6), min_size=2, max_size=15)


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(DOCUMENT, min_size=2, max_size=25),
    samples=st.lists(DOCUMENT, min_size=1, max_size=4),
)
def test_equals_brute_force(documents, samples):
    arrays = [np.array(document, dtype=np.uint16) for document in documents]
    ours = cross_entropy(arrays, [np.array(sample) for sample in samples], 8)
    assert ours == pytest.approx(brute_force(documents, samples, 8), rel=1e-9)


@given(DOCUMENT)
def test_each_term_is_a_distribution(tokens):
    counts = _Counts(np.array(tokens), 8)
    for context in range(8):
        assert counts.terms(context * 8 + np.arange(8)).sum(axis=1) == pytest.approx([1, 1, 1])


def test_on_the_shipped_corpus(tmp_path):
    from data.baseline import interpolated_bigram_cross_entropy

    data = open_data(DataConfig(cache=str(tmp_path)), vocab_size=1024, seq_len=256, seed=0)
    nats = interpolated_bigram_cross_entropy(data.train, data.validation, 1024)
    assert 3.2 < nats < 4.2  # bits per character about 1.9
    with pytest.raises(IndexError):
        data.validation.sample(data.validation.num_samples)
