"""From pairs of curves to figures and a verdict.

The verdict is about the final steps (the last fifth by default). The interval of their mean gap must lie wholly below
the limit to be within, wholly above to be outside; else it is not decided. A candidate whose loss is not finite at the
end is outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from report.compare.curves import Curve
from report.compare.intervals import Interval, interval, moving_mean, t_interval, t_quantile
from report.compare.limits import Limit
from report.compare.measures import (
    Events,
    View,
    count_events,
    extra_tokens,
    falling,
    filled,
    gap_percent,
    mean_of,
    views,
)
from report.compare.pairing import MIN_STEPS, NotComparable, Pair

EXIT_CODES = {"within": 0, "outside": 1, "undecided": 2}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """final: share of the common steps that the verdict is about. window: logged steps of the moving mean (None: a
    twentieth). warmup, decay: steps, or a share below 1, where no recipe tells them (None: 5 % and 20 %)."""

    limit: Limit
    confidence: float = 0.95
    final: float = 0.2
    window: int | None = None
    warmup: float | None = None
    decay: float | None = None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps first..last of a phase. grad_ratio: geometric mean of candidate / baseline gradient norm, None unknown."""

    name: str
    first: int
    last: int
    gap: Interval
    grad_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that is shown. steps (n,), gaps and moving (pairs, n) in percent; validation at `validation_step`."""

    pairs: list[Pair]
    settings: Settings
    window: int
    steps: np.ndarray
    gaps: np.ndarray
    moving: np.ndarray
    losses: np.ndarray  # (2, n): baseline, candidate, moving means over the pairs
    grad_ratios: np.ndarray  # (pairs, n), NaN where unknown
    phases: list[Phase]
    final: Phase
    validation: Interval | None
    validation_step: int | None
    extra: list[float | None]  # percent more tokens for equal loss: at the mean gap, at both ends of its interval
    views: list[View]
    baseline_events: Events
    candidate_events: Events
    verdict: str
    reason: str
    notes: list[str]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]


def analyse(pairs: list[Pair], settings: Settings) -> Comparison:
    """Compare; raises NotComparable when the pairs have too few finite steps in common."""
    steps, rows = _common(pairs)
    unit = settings.limit.unit
    baseline, candidate = _column(rows, 0, "loss"), _column(rows, 1, "loss")
    gaps = gap_percent(candidate, baseline, unit)
    first_final = len(steps) - max(MIN_STEPS // 3, round(settings.final * len(steps)))
    diverged = _diverged(baseline[:, first_final:], candidate[:, first_final:])
    if not diverged and (np.isfinite(gaps[:, first_final:]).sum(axis=1) < MIN_STEPS // 3).any():
        raise NotComparable(
            f"not comparable: fewer than {MIN_STEPS // 3} of the final steps have a finite loss on both sides"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _column(rows, 1, "grad_norm") / _column(rows, 0, "grad_norm")
    parts = [("final", first_final, len(steps)), *_phases(pairs[0].baseline, steps, settings)]
    final, *phases = [_phase(part, steps, gaps, ratios, settings.confidence) for part in parts]
    window = settings.window or max(5, len(steps) // 20)
    behind = moving_mean(mean_of(candidate - baseline), window)
    loss_gap = (
        final.gap.mean
        if unit == "loss"
        else float(np.nanmean(gap_percent(candidate, baseline, "loss")[:, first_final:]))
    )
    trend = falling(filled(mean_of(baseline)))
    validation_step, validation = _validation(pairs, settings)
    verdict, reason = _verdict(final.gap, settings.limit, diverged)
    events = count_events(pairs)
    return Comparison(
        pairs=pairs,
        settings=settings,
        window=window,
        steps=steps,
        gaps=gaps,
        moving=moving_mean(gaps, window),
        losses=np.stack([moving_mean(mean_of(x), window) for x in (baseline, candidate)]),
        grad_ratios=ratios,
        phases=phases,
        final=final,
        validation=validation,
        validation_step=validation_step,
        extra=[extra_tokens(trend, steps, gap, unit) for gap in (final.gap.mean, final.gap.low, final.gap.high)],
        views=views(pairs, steps, loss_gap, trend, behind),
        baseline_events=events[0],
        candidate_events=events[1],
        verdict=verdict,
        reason=reason,
        notes=_notes(pairs, steps, final.gap, settings, verdict),
    )


def _common(pairs: Sequence[Pair]) -> tuple[np.ndarray, list[tuple[Curve, Curve, np.ndarray, np.ndarray]]]:
    """Steps (n,) that every run logged, and for each pair both curves with the places of these steps."""
    curves = [curve for p in pairs for curve in (p.baseline, p.candidate)]
    steps = curves[0].step
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.step)
    if len(steps) < MIN_STEPS:
        raise NotComparable(
            f"not comparable: all runs together have {len(steps)} steps in common; {MIN_STEPS} are needed"
        )
    places = [np.searchsorted(curve.step, steps) for curve in curves]
    return steps, [(p.baseline, p.candidate, places[2 * i], places[2 * i + 1]) for i, p in enumerate(pairs)]


def _column(rows: list[tuple[Curve, Curve, np.ndarray, np.ndarray]], side: int, name: str) -> np.ndarray:
    """(pairs, n): a column of the baselines (side 0) or candidates (1) at the common steps."""
    return np.stack([getattr(row[side], name)[row[2 + side]] for row in rows])


def _diverged(baseline: np.ndarray, candidate: np.ndarray) -> str:
    """Why the candidate has failed whatever its gap: most final losses, or the last, not finite; "" otherwise."""
    lost = ~np.isfinite(candidate) & np.isfinite(baseline)
    if not (lost.mean(axis=1) > 0.5).any() and not lost[:, -1].any():
        return ""
    return f"the candidate's loss is not finite in {int(lost.sum())} of {lost.size} final steps"


def _phase(part: tuple[str, int, int], steps: np.ndarray, gaps: np.ndarray, ratios: np.ndarray, level: float) -> Phase:
    name, begin, end = part
    inside = gaps[:, begin:end]
    enough = (np.isfinite(inside).sum(axis=1) >= 2).all()
    nothing = Interval(mean=math.nan, low=math.nan, high=math.nan, spread=math.nan, seeds=len(gaps), block=0)
    positive = ratios[:, begin:end]
    positive = positive[np.isfinite(positive) & (positive > 0)]
    return Phase(
        name=name,
        first=int(steps[begin]),
        last=int(steps[end - 1]),
        gap=interval(list(inside), level) if enough else nothing,
        grad_ratio=float(np.exp(np.log(positive).mean())) if positive.size else None,
    )


def _phases(curve: Curve, steps: np.ndarray, settings: Settings) -> list[tuple[str, int, int]]:
    """(name, begin, end) into `steps`: warm-up, stable, decay, those that have a step."""
    schedule, train = curve.recipe.get("schedule", {}), curve.recipe.get("train", {})
    found = {"train.steps": train.get("steps", 1), **{f"schedule.{k}": schedule.get(k, 0) for k in ("warmup", "decay")}}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
            raise NotComparable(f"not comparable: {key} is {value!r} in the resolved.yaml of {curve.source}")
    total = int(train.get("steps", steps[-1]))
    kind = schedule.get("kind", "wsd")
    decay = {"constant": 0.0, "wsd": schedule.get("decay", 0.2)}.get(
        kind, total
    )  # cosine and linear fall from the warm-up on
    warmup = _in_steps(schedule.get("warmup", 0.05) if settings.warmup is None else settings.warmup, total)
    start = max(warmup, total - _in_steps(decay if settings.decay is None else settings.decay, total))
    edges = [0, *np.searchsorted(steps, [warmup, start], side="right").tolist(), len(steps)]
    named = zip(("warm-up", "stable", "decay"), edges, edges[1:], strict=False)
    return [(name, begin, end) for name, begin, end in named if end > begin]


def _in_steps(length: float, steps: int) -> int:
    return round(length * steps) if length < 1 else round(length)


def _validation(pairs: Sequence[Pair], settings: Settings) -> tuple[int | None, Interval | None]:
    """Gap of the last validation that every run has; without an interval for one seed."""
    finite = [
        {step for step, loss in curve.validation.items() if math.isfinite(loss)}
        for p in pairs
        for curve in (p.baseline, p.candidate)
    ]
    shared = set.intersection(*finite)
    if not shared:
        return None, None
    step = max(shared)
    losses = np.array([[p.baseline.validation[step], p.candidate.validation[step]] for p in pairs])
    return step, t_interval(gap_percent(losses[:, 1], losses[:, 0], settings.limit.unit), settings.confidence)


def _verdict(gap: Interval, limit: Limit, diverged: str) -> tuple[str, str]:
    """(verdict, why)."""
    if diverged:
        return "outside", diverged
    reach = f"{gap.low:+.2f} to {gap.high:+.2f} %"
    if gap.low > limit.percent:
        return "outside", f"the whole interval, {reach}, is above the limit of {limit}"
    if gap.high <= limit.percent:
        return "within", f"the whole interval, {reach}, is at or below the limit of {limit}"
    return "undecided", f"the interval, {reach}, reaches over the limit of {limit}"


def seeds_to_decide(gap: Interval, limit: float, confidence: float) -> int | None:
    """Seeds whose interval would clear the limit, if mean and spread stayed as they are; None for more than 30."""
    distance = abs(limit - gap.mean)
    level = (1 + confidence) / 2
    enough = (n for n in range(2, 31) if t_quantile(level, n - 1) * gap.spread / math.sqrt(n) < distance)
    return next(enough, None)


def _notes(pairs: Sequence[Pair], steps: np.ndarray, gap: Interval, settings: Settings, verdict: str) -> list[str]:
    notes = [note for p in pairs for note in p.notes]
    if len(pairs) == 1:
        notes.append("one pair: the interval covers the noise of its steps, not what another seed would give")
    elif verdict == "undecided":
        wanted = seeds_to_decide(gap, settings.limit.percent, settings.confidence)
        notes.append(f"about {wanted or 'more than 30'} seeds with this mean and spread would decide")
    for curve in (curve for p in pairs for curve in (p.baseline, p.candidate)):
        if curve.step[-1] > steps[-1]:
            notes.append(f"{curve.source} goes on to step {curve.step[-1]}; compared up to step {steps[-1]}")
    if not pairs[0].baseline.recipe and (settings.warmup is None or settings.decay is None):
        notes.append(
            "phases are assumed (warm-up 5 %, decay the last 20 %): no recipe tells them; --warmup and --decay"
        )
    return notes
