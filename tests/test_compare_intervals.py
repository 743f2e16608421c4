"""Intervals against tables, resampling and known processes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from report.compare.intervals import block_length, interval, moving_mean, t_interval, t_quantile


@pytest.mark.parametrize(
    ("df", "wanted"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (121, 1.980)]
)
def test_t_is_the_printed_table(df: int, wanted: float) -> None:
    assert t_quantile(0.975, df) == pytest.approx(wanted, abs=6e-4)


def autoregression(phi: float, n: int, seed: int) -> np.ndarray:
    shocks = np.random.default_rng(seed).standard_normal(n)
    values = np.zeros(n)
    for i in range(1, n):
        values[i] = phi * values[i - 1] + shocks[i]
    return values


def test_block_length_of_an_autoregression_is_the_formulas() -> None:
    """For R(k) ~ phi^k the optimum of Politis & White is (1.5 (2 phi / (1 - phi^2))^2 n)^(1/3)."""
    n, phi = 20000, 0.7
    wanted = (1.5 * (2 * phi / (1 - phi**2)) ** 2 * n) ** (1 / 3)
    lengths = [block_length(autoregression(phi, n, seed)) for seed in range(5)]
    assert np.mean(lengths) == pytest.approx(wanted, rel=0.25)
    assert np.median([block_length(autoregression(0.0, 2000, seed)) for seed in range(9)]) <= 6
    assert block_length(np.ones(50)) == 1


def test_interval_of_one_seed_is_that_of_circular_blocks_drawn_at_random() -> None:
    values = autoregression(0.6, 400, 0)
    found = interval([values], 0.95)
    rng, block = np.random.default_rng(1), found.block
    count = len(values) / block
    starts = rng.integers(len(values), size=(4000, int(count)))
    means = values[(starts[..., None] + np.arange(block)) % len(values)].mean(axis=(1, 2))
    error = means.std() * math.sqrt(int(count) / count) * math.sqrt(count / (count - 1))
    half = t_quantile(0.975, int(count) - 1) * error
    assert block > 1 and found.mean == pytest.approx(values.mean())
    assert found.high - found.mean == pytest.approx(half, rel=0.05)


def test_seeds_that_differ_widen_the_interval_to_students() -> None:
    series = [np.full(100, mean) + autoregression(0.0, 100, i) * 1e-3 for i, mean in enumerate((1.0, 2.0, 3.0))]
    found = interval(series, 0.95)
    assert found.mean == pytest.approx(2.0, abs=1e-3) and found.spread == pytest.approx(1.0, abs=1e-3)
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3), rel=2e-3)
    assert t_interval(np.array([1.0, 2.0, 3.0]), 0.95).high == pytest.approx(2 + 4.303 / math.sqrt(3), rel=1e-3)


def test_seeds_that_agree_by_luck_do_not_narrow_it_below_the_steps() -> None:
    values = autoregression(0.6, 400, 3)
    alone, thrice = interval([values], 0.95), interval([values] * 3, 0.95)
    ratio = t_quantile(0.975, 2) / t_quantile(0.975, 400 // alone.block - 1) / math.sqrt(3)
    assert (thrice.high - thrice.mean) == pytest.approx(ratio * (alone.high - alone.mean), rel=1e-6)


def test_intervals_cover_an_autoregressions_mean() -> None:
    covered = 0
    for trial in range(100):
        found = interval([autoregression(0.6, 300, 1000 + 3 * trial + i) for i in range(3)], 0.95)
        covered += found.low <= 0 <= found.high
    assert covered >= 92


def test_moving_mean_leaves_nan_out() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan, np.nan])
    wanted = [1.0, 1.0, 2.0, 4.0, 4.0, 5.0, np.nan]
    assert np.array_equal(moving_mean(values, 3), wanted, equal_nan=True)
