"""Tokens for equal loss, equal time, spikes: against closed formulas and brute force."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from report.compare.curves import Curve, make_curve
from report.compare.measures import count_events, extra_tokens, falling, gap_percent, spikes, views
from report.compare.pairing import pair

STEPS = np.arange(1, 501)
LAW = 2.0 + 6.0 * STEPS**-0.3


def curve(losses: np.ndarray, side: str, **columns: np.ndarray) -> Curve:
    rows = {
        i: {"loss": float(loss), **{name: float(values[i - 1]) for name, values in columns.items()}}
        for i, loss in enumerate(losses, 1)
    }
    return make_curve(Path(f"{side}/seed0"), "test", rows, {})


def test_gap_of_loss_and_perplexity() -> None:
    assert gap_percent(np.array([4.04]), np.array([4.0]), "loss") == pytest.approx(1.0)
    assert gap_percent(np.array([4.005]), np.array([4.0]), "perplexity") == pytest.approx(100 * (math.exp(0.005) - 1))


def test_falling_is_the_minimax_formula() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        y = rng.standard_normal(12)
        wanted = [min(max(y[s : t + 1].mean() for t in range(i, 12)) for s in range(i + 1)) for i in range(12)]
        assert falling(y) == pytest.approx(wanted)


def test_extra_tokens_of_a_power_law() -> None:
    """A candidate at L(T) (1 + gap) stands where the baseline was at T_b, L(T_b) = L(T) (1 + gap)."""
    gap = 1.0
    reached = ((LAW[-1] * (1 + gap / 100) - 2) / 6) ** (-1 / 0.3)
    assert extra_tokens(LAW, STEPS, gap, "loss") == pytest.approx(100 * (500 / reached - 1), rel=1e-3)
    nats = math.log1p(gap / 100)
    reached = ((LAW[-1] + nats - 2) / 6) ** (-1 / 0.3)
    assert extra_tokens(LAW, STEPS, gap, "perplexity") == pytest.approx(100 * (500 / reached - 1), rel=1e-3)
    assert extra_tokens(LAW, STEPS, -gap, "loss") == pytest.approx(
        100 * (((LAW[-1] * 1.01 - 2) / 6) ** (-1 / 0.3) / 500 - 1), rel=1e-3
    )
    assert extra_tokens(LAW, STEPS, 0.0, "loss") == 0.0
    assert extra_tokens(LAW, STEPS, 500.0, "loss") is None and extra_tokens(LAW, STEPS, math.nan, "loss") is None


def test_equal_time_sets_a_fast_candidate_ahead() -> None:
    slow = curve(LAW, "baseline", seconds=np.full(500, 2.0), tokens=2048.0 * STEPS)
    fast = curve(LAW * 1.01, "candidate", seconds=np.full(500, 1.0), tokens=2048.0 * STEPS)
    step, tokens, time = views(pair([slow], [fast]), STEPS, 1.0, LAW, LAW * 0.01)
    assert (step.gap, tokens.gap) == (1.0, 1.0)
    assert (time.baseline_step, time.candidate_step) == (250, 500)
    assert time.gap == pytest.approx(100 * (LAW[499] * 1.01 / LAW[249] - 1))


def test_unknown_time_and_tokens_are_said() -> None:
    _, tokens, time = views(pair([curve(LAW, "a")], [curve(LAW, "b")]), STEPS, 0.0, LAW, LAW * 0)
    assert tokens.gap is None and "do not tell" in tokens.why and time.gap is None and "do not tell" in time.why


def test_spikes_are_runs_of_high_losses_and_nan_are_none() -> None:
    noisy = LAW + 0.02 * np.random.default_rng(0).standard_normal(500)
    assert spikes(noisy) == []
    noisy[200:203] += 1.0
    noisy[300] += 1.0
    noisy[100] = np.nan
    assert spikes(noisy) == [(200, 203), (300, 301)]
    assert spikes(noisy[:20]) == []


def test_events_of_both_sides_are_counted() -> None:
    noise = 0.02 * np.random.default_rng(0).standard_normal(500)
    baseline, candidate = LAW + noise, LAW + noise
    baseline[200:203] += 1.0
    candidate[202:206] += 1.0
    candidate[300] += 1.0
    candidate[400:402] = np.nan
    skipped = np.zeros(500)
    skipped[400:402] = 1
    sides = count_events(pair([curve(baseline, "baseline")], [curve(candidate, "candidate", skipped=skipped)]))
    assert (sides[0].spikes, sides[0].shared_spikes, sides[0].nan, sides[0].skipped) == (1, 1, 0, 0)
    assert (sides[1].spikes, sides[1].shared_spikes, sides[1].nan, sides[1].skipped) == (2, 1, 2, 2)
