"""Intervals for the mean of paired differences: over the steps of a run, and over seeds.

Differences of neighbouring steps are alike (a run that fell behind stays behind for a while), so steps are taken in
blocks. Length of a block: the rule of Politis & White (2004) for the circular block bootstrap, corrected by Patton,
Politis & White (2009, Econometric Reviews), from the autocorrelations of the series itself.

The bootstrap of a mean needs no random draws. For a series of N steps and blocks of L, with k = N / L:

    within^2 = Var(means of all N circular blocks) / k * k / (k - 1)       the last factor: the mean is estimated too

Seeds are the upper level. The seeds' means already differ by the noise of their steps, so the two levels are not
added; the larger one counts, and an interval is never smaller than its steps alone make it:

    SE^2 = max(between^2, mean of within^2) / seeds,    between^2 = variance of the seeds' means (divided by seeds - 1)
    interval = mean -+ t(df) SE,                        df = seeds - 1, or k - 1 for one seed

Student's t, because a bootstrap over few seeds, taken by its percentiles, is far too narrow (Hesterberg 2015,
The American Statistician); tests/test_compare_power.py measures what remains. An interval over one seed is
about that pair of runs, not about the recipe: it cannot know what another seed would give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Mean with its two-sided interval. spread: standard deviation of the seeds' means, NaN for one; block: steps."""

    mean: float
    low: float
    high: float
    spread: float
    seeds: int
    block: int


def interval(series: Sequence[np.ndarray], confidence: float) -> Interval:
    """Interval of the mean of `series`, an array (steps,) a seed; NaN entries left out. confidence: 0.95 for 95 %."""
    kept = [values[np.isfinite(values)] for values in series]
    means = np.array([values.mean() for values in kept])
    blocks = [block_length(values) for values in kept]
    within = np.mean([_block_variance(values, block) for values, block in zip(kept, blocks, strict=True)])
    seeds = len(kept)
    between = float(means.var(ddof=1)) if seeds > 1 else 0.0
    df = seeds - 1 if seeds > 1 else max(1, len(kept[0]) // blocks[0] - 1)
    half = t_quantile((1 + confidence) / 2, df) * math.sqrt(max(between, within) / seeds)
    mean = float(means.mean())
    spread = math.sqrt(between) if seeds > 1 else math.nan
    return Interval(mean=mean, low=mean - half, high=mean + half, spread=spread, seeds=seeds, block=max(blocks))


def t_interval(means: np.ndarray, confidence: float) -> Interval:
    """Interval of the mean of one figure a seed (seeds,); without ends for a single one."""
    spread = float(means.std(ddof=1)) if len(means) > 1 else math.nan
    half = t_quantile((1 + confidence) / 2, max(1, len(means) - 1)) * spread / math.sqrt(len(means))
    mean = float(means.mean())
    return Interval(mean=mean, low=mean - half, high=mean + half, spread=spread, seeds=len(means), block=1)


def _block_variance(values: np.ndarray, block: int) -> float:
    """Variance of the mean of `values` under the circular block bootstrap, free of the bias of an estimated mean."""
    count = len(values) / block
    around = np.concatenate([values, values[: block - 1]])
    sums = np.cumsum(np.concatenate([[0.0], around]))
    means = (sums[block:] - sums[:-block]) / block
    return float(means.var() / (count - 1)) if count > 1 else math.inf


def block_length(values: np.ndarray) -> int:
    """Length of a block by Politis & White, in steps; between 1 and a third of the series (steps,)."""
    n = len(values)
    centred = values - values.mean()
    if n < 6 or not centred.any():
        return 1
    lags = min(n - 1, int(math.ceil(math.sqrt(n))) + max(5, math.ceil(math.sqrt(math.log10(n)))))
    covariance = np.array([centred[: n - k] @ centred[k:] / n for k in range(lags + 1)])
    small = np.abs(covariance[1:] / covariance[0]) < 2 * math.sqrt(math.log10(n) / n)
    run = max(5, math.ceil(math.sqrt(math.log10(n))))  # so many lags in a row are as good as none
    quiet = next((m for m in range(lags - run + 1) if small[m : m + run].all()), None)
    reach = min(lags, 2 * (lags if quiet is None else max(1, quiet)))
    k = np.arange(1, reach + 1)
    taper = np.clip(2 * (1 - k / reach), 0, 1)  # flat to reach / 2, then falling to 0
    weighted = 2 * taper * covariance[1 : reach + 1]
    spectrum = covariance[0] + weighted.sum()
    if spectrum <= 0:
        return 1
    slope = (weighted * k).sum()
    length = (1.5 * (slope / spectrum) ** 2 * n) ** (1 / 3)
    return int(min(max(1, math.ceil(length)), math.ceil(3 * math.sqrt(n)), n // 3))


def t_quantile(probability: float, df: int) -> float:
    """Quantile of Student's t with df (1, 2, ...) degrees of freedom, for a probability in [0.5, 1)."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < probability:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < probability else (low, middle)
    return high


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) for t >= 0: Abramowitz & Stegun 26.7.3 (odd df) and 26.7.4 (even df), finite sums."""
    angle = math.atan(t / math.sqrt(df))
    cosine, sine = math.cos(angle), math.sin(angle)
    term = cosine if df % 2 else 1.0
    total = 0.0
    for k in range(1 if df % 2 else 0, df - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * cosine**2
    inside = 2 / math.pi * (angle + sine * total) if df % 2 else sine * total
    return (1 + inside) / 2


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` entries along the last axis, fewer at the start; NaN entries are left out."""
    finite = np.isfinite(values)

    def trailing(x: np.ndarray) -> np.ndarray:
        sums = np.cumsum(x, axis=-1)
        sums[..., window:] = sums[..., window:] - sums[..., :-window].copy()
        return sums

    count = trailing(finite.astype(np.float64))
    with np.errstate(invalid="ignore"):
        return trailing(np.where(finite, values, 0.0)) / np.where(count > 0, count, np.nan)
