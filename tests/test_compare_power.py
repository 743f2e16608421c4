"""The verdict on constructed curves whose noise is fitted from real pairs: false alarms, and what is found.

docs/comparing.md holds the table of `python -m tests.curve_noise`, of which this is a part.
"""

from __future__ import annotations

import numpy as np

from tests.curve_noise import compare, fit, found


def test_the_fit_is_autocorrelated_and_heavy_tailed() -> None:
    noise = fit()
    assert 0.4 < noise.offset < 0.9 and 0.2 < noise.slow < 0.5 and 0.2 < noise.fast < 0.4  # percent
    assert noise.tau > 50 and (noise.pool**4).mean() > 3.3


def test_equal_recipes_are_seldom_called_different() -> None:
    assert found(0.0, trials=200) <= 0.05


def test_a_gap_of_0_3_percent_is_found_with_three_seeds_where_drift_is_small() -> None:
    assert found(0.3, drift=0.1, trials=40) >= 0.6


def test_noise_as_large_as_the_limit_is_not_decided() -> None:
    noise, rng = fit(), np.random.default_rng(1)
    verdicts = [compare(np.stack([noise.draw(rng, 500) for _ in range(3)])).verdict for _ in range(5)]
    assert "undecided" in verdicts
