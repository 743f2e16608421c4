"""In which order samples come: shuffles and blends as pure functions of numbers.

A shuffle is the order of hashed indices. The hash is splitmix64, a bijection of 64-bit integers, so
there are no ties, and the result depends on no library's random generator or version: the same key
gives the same order for ever.

A blend decides for each sample which source it comes from. Weights become whole shares c_j of a
period P (at most 100 000), and one period is filled by Tijdeman's algorithm, which keeps every
source's count within 1 - 1 / (2k - 2) of its due c_j / P * n, for k sources, after every n samples;
the period then repeats. (Megatron's greedy rule gives no such bound for more than two sources and
must be run from sample 0.) A sample's source, and its number within that source, are two table
look-ups. Blends may follow each other in phases (`PhasedBlend`); the numbering of the samples goes on.

Sources: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014
(constants by Vigna); Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import gcd, inf, lcm

import numpy as np

_MAX_PERIOD = 100_000


def splitmix64(state: np.ndarray) -> np.ndarray:
    """Hash of 64-bit integers: uint64 in, uint64 out, elementwise."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(size: int, *key: int) -> np.ndarray:
    """A random order of range(size): [size] int64, the same for the same key everywhere."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = splitmix64(state ^ np.uint64(part % (1 << 64)))
    return np.argsort(splitmix64(np.arange(size, dtype=np.uint64) + state))


def shares(weights: Sequence[float]) -> list[int]:
    """Whole shares in lowest terms: exactly the weights if their sum is then at most 100 000, else
    nearest.

    Raises:
        ValueError: a weight is not positive, or too small for a share of 100 000.
    """
    if not weights or not all(0 < weight < inf for weight in weights):
        raise ValueError(f"weights {list(weights)} must all be positive")
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is meant, not the nearest binary number
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    total = sum(whole) // gcd(*whole)
    whole = [share // gcd(*whole) for share in whole]
    if total > _MAX_PERIOD:  # largest remainders
        rest = [share * _MAX_PERIOD % total for share in whole]
        whole = [share * _MAX_PERIOD // total for share in whole]
        for index in sorted(range(len(whole)), key=lambda i: -rest[i])[: _MAX_PERIOD - sum(whole)]:
            whole[index] += 1
    if min(whole) == 0:
        raise ValueError(f"weights {list(weights)} differ by more than 1 : {_MAX_PERIOD}")
    return whole


class Blend:
    """Which source sample i comes from, and which number it has there.

    Attributes:
        shares: samples of each source in a period.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = shares(weights)
        self._choice = np.array(_tijdeman(self.shares), dtype=np.int64)
        self._rank = np.empty_like(self._choice)
        for source, share in enumerate(self.shares):
            self._rank[self._choice == source] = np.arange(share)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source, and number within the source, of samples: both int64 of the shape of
        `indices`."""
        period, phase = np.divmod(indices, self._choice.size)
        source = self._choice[phase]
        return source, period * np.array(self.shares)[source] + self._rank[phase]

    def first_use(self, source: int, number: int) -> int:
        """The sample that is sample `number` of `source`: the inverse of `locate`."""
        period, rank = divmod(number, self.shares[source])
        return period * self._choice.size + int(np.flatnonzero(self._choice == source)[rank])

    def counts(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples come from each source: [k] int64."""
        periods, rest = divmod(samples, self._choice.size)
        started = np.bincount(self._choice[:rest], minlength=len(self.shares))
        return periods * np.array(self.shares, dtype=np.int64) + started


class PhasedBlend:
    """Blends that follow each other over one numbering of the samples: the interface of `Blend`.

    A source goes on in a later phase where the earlier ones left it, so that none of its samples comes
    again before all have come.
    """

    def __init__(self, phases: Sequence[tuple[int, Mapping[int, float]]]) -> None:
        """
        Args:
            phases: first sample of each phase, ascending from 0, and the weights of its sources by
                number.
        """
        self._starts = np.array([start for start, _ in phases], dtype=np.int64)
        self._blends = [Blend(list(weights.values())) for _, weights in phases]
        self._sources = [np.array(list(weights), dtype=np.int64) for _, weights in phases]
        # samples of each source before each phase: [phases, sources]
        self._before = np.zeros((len(phases), 1 + max(max(weights) for _, weights in phases)), dtype=np.int64)
        for phase, length in enumerate(np.diff(self._starts)):
            self._before[phase + 1] = self._before[phase]
            self._before[phase + 1, self._sources[phase]] += self._blends[phase].counts(int(length))

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Blend.locate`."""
        phases = np.searchsorted(self._starts, indices, side="right") - 1
        sources, numbers = np.empty_like(indices), np.empty_like(indices)
        for phase in set(phases.tolist()):
            here = phases == phase
            place, within = self._blends[phase].locate(indices[here] - self._starts[phase])
            sources[here] = self._sources[phase][place]
            numbers[here] = within + self._before[phase, sources[here]]
        return sources, numbers

    def first_use(self, source: int, number: int) -> int | float:
        """As `Blend.first_use`; infinite if no phase comes so far."""
        for phase, (blend, sources) in enumerate(zip(self._blends, self._sources, strict=True)):
            left = number - int(self._before[phase, source])
            last = phase + 1 == len(self._blends)
            if source in sources and (last or number < self._before[phase + 1, source]):
                return int(self._starts[phase]) + blend.first_use(int(np.flatnonzero(sources == source)[0]), left)
        return inf


def _tijdeman(shares: Sequence[int]) -> list[int]:
    """One period: at each step, of the sources that are due, the one whose deadline is nearest.

    In units of 1 / (period * slack), source j is due when share_j * n - count_j * period reaches 1
    / (2k - 2) of a sample, and must come before it reaches 1 - 1 / (2k - 2) more than that.
    """
    period, slack = sum(shares), 2 * len(shares) - 2
    if not slack:
        return [0]
    counts, choice = [0] * len(shares), []
    for step in range(1, period + 1):
        debts = [share * step - count * period for share, count in zip(shares, counts, strict=True)]
        due = [source for source, debt in enumerate(debts) if debt * slack >= period]
        chosen = min(due, key=lambda j: (period * (slack - 1) - debts[j] * slack) / shares[j])
        counts[chosen] += 1
        choice.append(chosen)
    return choice
