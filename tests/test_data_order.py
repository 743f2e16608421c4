"""Shuffles and blends: frozen values, bounds that the theory promises, inverses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Blend, permutation, shares, splitmix64

FROZEN = [3, 5, 2, 4, 1, 0, 6, 7]


def test_splitmix64_matches_the_published_generator():
    # The first outputs of the reference C program for seed 1234567.
    seed, step = 1234567, 0x9E3779B97F4A7C15
    states = np.array([(seed + i * step) % 2**64 for i in range(5)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
        4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_permutation_is_frozen():
    """These orders are part of what a seed means; they must never change."""
    assert permutation(8, 1, 0).tolist() == FROZEN
    assert permutation(8, 1, 1).tolist() != FROZEN
    assert permutation(0, 1).size == 0


@given(size=st.integers(1, 500), key=st.lists(st.integers(-5, 2**70), min_size=1, max_size=3))
def test_permutation_is_one(size, key):
    assert sorted(permutation(size, *key).tolist()) == list(range(size))


def test_permutation_is_uniform():
    """Where element 0 lands over 6000 keys: chi-squared with 9 degrees of freedom below its 0.1 %
    point."""
    places = np.array([np.flatnonzero(permutation(10, key) == 0)[0] for key in range(6000)])
    counts = np.bincount(places, minlength=10)
    assert ((counts - 600) ** 2 / 600).sum() < 27.9


def test_shares():
    assert shares([0.7, 0.3]) == [7, 3]
    assert shares([2, 2, 4]) == [1, 1, 2]
    assert shares([5]) == [1]
    assert shares([1, 1, 1]) == [1, 1, 1]
    assert shares([0.1234567, 0.8765433]) == [12346, 87654]
    for bad in ([1, 0], [1, -1], [], [1, 1e-9], [1, float("nan")]):
        with pytest.raises(ValueError):
            shares(bad)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_blend_stays_within_one_of_its_due_and_counts_up(weights):
    blend, total = Blend(weights), sum(weights)
    sources, numbers = blend.locate(np.arange(2 * total + 5))
    counts = [0] * len(weights)
    for index, (source, number) in enumerate(zip(sources, numbers, strict=True)):
        assert number == counts[source]
        assert blend.first_use(source, int(number)) == index
        counts[source] += 1
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - weight * (index + 1) / total) < 1
    far = 10**12 * sum(blend.shares) + 3  # no table grows with the position
    assert blend.locate(np.array([far]))[0][0] == sources[3 % len(sources)]
