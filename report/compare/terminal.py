"""The comparison as tables on a terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from report.compare.analysis import Comparison
from report.compare.intervals import Interval
from report.compare.measures import mean_of

COLOURS = {"within": "green", "outside": "red", "undecided": "yellow"}


def percent(value: float | None) -> str:
    """ "+0.31 %", or "-" for nothing."""
    return "-" if value is None or not math.isfinite(value) else f"{value:+.2f} %"


def between(gap: Interval) -> str:
    """ "+0.10 to +0.52 %", or "-" where one seed gives no interval."""
    return f"{gap.low:+.2f} to {gap.high:+.2f} %" if math.isfinite(gap.low) and math.isfinite(gap.high) else "-"


def phase_rows(comparison: Comparison) -> list[list[str]]:
    """Phase, steps, gap, interval, gradient norms: of each phase, of the final steps, and of the validation."""
    rows = [
        [
            p.name,
            f"{p.first}-{p.last}",
            percent(p.gap.mean),
            between(p.gap),
            "-" if p.grad_ratio is None else f"{p.grad_ratio:.3f}",
        ]
        for p in (*comparison.phases, comparison.final)
    ]
    if comparison.validation is not None:
        gap = comparison.validation
        rows.append(["validation", str(comparison.validation_step), percent(gap.mean), between(gap), ""])
    return rows


def pair_rows(comparison: Comparison) -> list[list[str]]:
    """Pair, final gap, correlation of the changes of the loss, baseline, candidate."""
    final = mean_of(comparison.gaps[:, comparison.steps >= comparison.final.first].T)
    return [
        [p.label, percent(gap), f"{p.order:.3f}", p.baseline.source, p.candidate.source]
        for p, gap in zip(comparison.pairs, final, strict=True)
    ]


def view_rows(comparison: Comparison) -> list[list[str]]:
    """View, steps of both runs, gap of the loss, remark; last the tokens for equal loss."""
    rows = [
        [v.name, _count(v.baseline_step), _count(v.candidate_step), percent(v.gap), v.why] for v in comparison.views
    ]
    mean, *ends = comparison.extra
    reach = " to ".join("beyond the baseline's curve" if end is None else f"{end:+.1f} %" for end in ends)
    rows.append(["tokens for equal loss", "", "", "-" if mean is None else f"{mean:+.1f} %", f"interval {reach}"])
    return rows


def event_rows(comparison: Comparison) -> list[list[str]]:
    """Spikes (shared ones apart), NaN and skipped steps of both sides."""
    return [
        [side, str(e.spikes), str(e.shared_spikes), str(e.nan), str(e.skipped)]
        for side, e in (("baseline", comparison.baseline_events), ("candidate", comparison.candidate_events))
    ]


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of every table, for the terminal and for the page."""
    gap, level = f"gap of the {comparison.settings.limit.unit}", f"{100 * comparison.settings.confidence:g} % interval"
    return [
        ("Gap by phase", ["phase", "steps", gap, level, "gradient norms"], phase_rows(comparison)),
        ("Pairs", ["pair", "final gap", "same order", "baseline", "candidate"], pair_rows(comparison)),
        (
            "At equal steps, tokens, time",
            ["", "baseline at", "candidate at", "gap of the loss", ""],
            view_rows(comparison),
        ),
        ("Spikes and NaN", ["side", "spikes", "on both sides", "NaN steps", "skipped"], event_rows(comparison)),
    ]


def how(comparison: Comparison) -> str:
    """How the interval was made, in one sentence."""
    gap = comparison.final.gap
    if not gap.block:
        return "No interval: too few of the final steps have a finite loss on both sides."
    over = f"{gap.seeds} seeds (spread {gap.spread:.2f} %)" if gap.seeds > 1 else "one pair"
    steps = f"final steps {comparison.final.first} to {comparison.final.last}"
    return f"Interval over {over} and steps in blocks of {gap.block}; {steps}."


def show(comparison: Comparison, console: Console) -> None:
    """Print every table, then the verdict."""
    for title, header, rows in tables(comparison):
        table = Table(title=title, title_justify="left", title_style="bold")
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if comparison.pairs[0].differences:
        console.print("Differs: " + "; ".join(comparison.pairs[0].differences), markup=False)
    console.print(how(comparison), markup=False)
    for note in comparison.notes:
        console.print(f"Note: {note}", markup=False)
    verdict = comparison.verdict
    console.print(f"[bold {COLOURS[verdict]}]{verdict}[/]: {comparison.reason}")
