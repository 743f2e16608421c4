"""What a gap means: tokens for equal loss, equal time; and what went wrong on the way: spikes, NaN, skipped steps.

The gap of a step, in percent of the baseline, on the same batch:

    loss        100 (candidate / baseline - 1)
    perplexity  100 (exp(candidate - baseline) - 1)

Tokens for equal loss: the trend of the baseline is the nearest non-increasing curve to its losses; the candidate's is
that plus the final gap. extra = T / (tokens at which the baseline's trend was where the candidate ends) - 1. Within one
run the learning rate falls with the tokens, so this is what the baseline's own curve says, not a second run with a
longer schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from report.compare.curves import Curve
from report.compare.pairing import Pair

SPIKE_WIDTH = 32  # finite steps before, whose median and spread a loss is held against
SPIKE_HEIGHT = 6.0  # robust standard deviations above that median


@dataclass(frozen=True, kw_only=True)
class View:
    """The runs at equal steps, tokens or time: where each stands, and the gap of the loss in percent; why: a remark."""

    name: str
    baseline_step: int | None = None
    candidate_step: int | None = None
    gap: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Events:
    """Of all runs of a side: spikes (and those that the other side has at the same steps), NaN steps, skipped steps."""

    spikes: int
    shared_spikes: int
    nan: int
    skipped: int


def gap_percent(candidate: np.ndarray, baseline: np.ndarray, unit: str) -> np.ndarray:
    """Gap of losses in nats (any shape), in percent of the baseline's loss or perplexity."""
    with np.errstate(all="ignore"):  # what is not finite is left out, and counted
        return 100 * (np.expm1(candidate - baseline) if unit == "perplexity" else candidate / baseline - 1)


def mean_of(values: np.ndarray) -> np.ndarray:
    """(n,) mean over the pairs (pairs, n); NaN entries are left out."""
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    return np.where(finite, values, 0.0).sum(axis=0) / np.where(count, count, np.nan)


def filled(values: np.ndarray) -> np.ndarray:
    """`values` (n,) with NaN entries replaced by straight lines between their neighbours."""
    finite = np.isfinite(values)
    return np.interp(np.arange(len(values)), np.flatnonzero(finite), values[finite])


def falling(values: np.ndarray) -> np.ndarray:
    """The non-increasing curve (n,) nearest to `values` in squares: pool adjacent violators."""
    pools: list[tuple[float, int]] = []  # mean, size
    for value in values:
        mean, size = float(value), 1
        while pools and pools[-1][0] < mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    return np.repeat([mean for mean, _ in pools], [size for _, size in pools])


def extra_tokens(trend: np.ndarray, steps: np.ndarray, gap: float, unit: str) -> float | None:
    """Percent more tokens that the candidate needs for equal loss, fewer if negative; None beyond the baseline's curve.

    trend: the baseline's falling curve (n,) in nats at `steps` (n,); gap: of the candidate at the end, in percent.
    """
    end = trend[-1]
    if not math.isfinite(gap) or gap <= -100:
        return None
    nats = math.log1p(gap / 100) if unit == "perplexity" else gap / 100 * end
    if end + abs(nats) > trend[0]:
        return None
    # A worse candidate ends where the baseline was at `reached`; a better one was there where the baseline ends.
    reached = np.interp(-(end + abs(nats)), -trend, steps)
    return float(100 * (steps[-1] / reached - 1 if nats > 0 else reached / steps[-1] - 1)) if nats else 0.0


def views(pairs: Sequence[Pair], steps: np.ndarray, gap: float, trend: np.ndarray, behind: np.ndarray) -> list[View]:
    """Equal steps, tokens and time. gap: of the loss at the end, percent; behind (n,): candidate - baseline, nats."""
    last = int(steps[-1])
    step = View(name="equal steps", baseline_step=last, candidate_step=last, gap=gap)
    curves = [curve for p in pairs for curve in (p.baseline, p.candidate)]
    if all(np.isfinite(c.tokens).any() or np.isfinite(c.samples).any() for c in curves):
        tokens = replace(step, name="equal tokens", why="as equal steps: a step takes as many tokens on both sides")
    else:
        tokens = View(
            name="equal tokens", why="the logs do not tell tokens; a step is taken to be the same on both sides"
        )
    return [step, tokens, _equal_time(pairs, steps, trend, behind)]


def _equal_time(pairs: Sequence[Pair], steps: np.ndarray, trend: np.ndarray, behind: np.ndarray) -> View:
    """Both runs at the time when the faster one ends; mean times over the pairs."""
    times = []
    for curves in ([p.baseline for p in pairs], [p.candidate for p in pairs]):
        spent = [curve.seconds_since_start[np.searchsorted(curve.step, steps)] for curve in curves]
        times.append(np.mean(spent, axis=0))
    if not np.isfinite(times).all():
        return View(name="equal time", why="the logs do not tell the time of every step")
    end = min(times[0][-1], times[1][-1])
    at = [max(0, int(np.searchsorted(spent, end, side="right")) - 1) for spent in times]
    gap = 100 * (trend[at[1]] + behind[at[1]]) / trend[at[0]] - 100
    return View(
        name="equal time",
        baseline_step=int(steps[at[0]]),
        candidate_step=int(steps[at[1]]),
        gap=float(gap) if math.isfinite(gap) else None,
        why=f"after {end:,.0f} s of training steps",
    )


def spikes(loss: np.ndarray) -> list[tuple[int, int]]:
    """(begin, end) of each spike in a loss (n,), as indices, end exclusive; NaN entries are no spikes.

    A spike is a run of steps whose loss lies SPIKE_HEIGHT robust standard deviations (1.4826 times the median distance
    from the median) above the median of the SPIKE_WIDTH finite steps before; fewer steps before, no spike.
    """
    places = np.flatnonzero(np.isfinite(loss))
    values = loss[places]
    if len(values) <= SPIKE_WIDTH:
        return []
    before = np.lib.stride_tricks.sliding_window_view(values[:-1], SPIKE_WIDTH)
    median = np.median(before, axis=1)
    spread = 1.4826 * np.median(np.abs(before - median[:, None]), axis=1)
    high = values[SPIKE_WIDTH:] > median + np.maximum(SPIKE_HEIGHT * spread, 1e-6 * np.abs(median))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], high, [False]]).astype(int)))
    found = zip(edges[::2] + SPIKE_WIDTH, edges[1::2] + SPIKE_WIDTH, strict=True)
    return [(int(places[begin]), int(places[end - 1]) + 1) for begin, end in found]


def count_events(pairs: Sequence[Pair]) -> tuple[Events, Events]:
    """Events of the baselines and of the candidates."""
    sides: list[list[Curve]] = [[p.baseline for p in pairs], [p.candidate for p in pairs]]
    found = [[_spike_steps(curve) for curve in curves] for curves in sides]
    counted = []
    for side, curves in enumerate(sides):
        shared = sum(
            any(first <= there[1] and there[0] <= last for there in theirs)
            for ours, theirs in zip(found[side], found[1 - side], strict=True)
            for first, last in ours
        )
        counted.append(
            Events(
                spikes=sum(map(len, found[side])),
                shared_spikes=shared,
                nan=int(sum(curve.nan.sum() for curve in curves)),
                skipped=int(sum(curve.skipped.sum() for curve in curves)),
            )
        )
    return counted[0], counted[1]


def _spike_steps(curve: Curve) -> list[tuple[int, int]]:
    """First and last step of each spike."""
    return [(int(curve.step[begin]), int(curve.step[end - 1])) for begin, end in spikes(curve.loss)]
