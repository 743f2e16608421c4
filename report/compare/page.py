"""The comparison as one HTML page: no script, nothing loaded from anywhere, light and dark, any width."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

import numpy as np

from report.compare.analysis import Comparison
from report.compare.charts import Band, Line, chart
from report.compare.intervals import moving_mean
from report.compare.measures import mean_of
from report.compare.terminal import between, how, percent, tables

STYLE = Path(__file__).with_name("page.css")


def render(comparison: Comparison) -> str:
    """The whole page."""
    c = comparison
    gap = c.final.gap
    summary = f"{percent(gap.mean)} of the {c.settings.limit.unit} over the final steps" + (
        f", {100 * c.settings.confidence:g} % interval {between(gap)}" if math.isfinite(gap.high - gap.low) else ""
    )
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{c.verdict}: {escape(percent(gap.mean))}</title><style>{STYLE.read_text()}</style></head><body>",
        f'<h1>{escape(_name(c, 1))} against {escape(_name(c, 0))}</h1><p class="verdict {c.verdict}">{c.verdict}</p>',
        f"<p>{escape(summary)}: {escape(c.reason)}.</p>",
        *_figures(c),
        *(_table(*table) for table in tables(c)),
        f"<h2>How</h2><p>{escape(how(c))}</p>",
        _list("What differs", c.pairs[0].differences),
        _list("Notes", c.notes),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part)


def _name(c: Comparison, side: int) -> str:
    """Name of the recipe, or the path of the first run."""
    curve = c.pairs[0].candidate if side else c.pairs[0].baseline
    return str(curve.recipe.get("name", curve.source))


def _figures(c: Comparison) -> list[str]:
    gap, limit = c.final.gap, c.settings.limit
    ends = (c.final.first, c.final.last)
    flat = np.full(len(c.steps), limit.percent)
    inside = (
        [Band(name="interval of the final steps", x=ends, y=(gap.low, gap.high))]
        if math.isfinite(gap.high - gap.low)
        else []
    )
    lines = [Line(name="one pair", y=moving, style="faint") for moving in c.moving] if len(c.moving) > 1 else []
    lines += [Line(name="mean", y=mean_of(c.moving), style="a"), Line(name="limit", y=flat, style="limit")]
    figures = [
        chart(f"Gap of the {limit.unit}, mean over {c.window} logged steps", c.steps, lines, inside, " %"),
        chart(
            f"Loss, nats a token, mean over {c.window} logged steps",
            c.steps,
            [Line(name="baseline", y=c.losses[0], style="a"), Line(name="candidate", y=c.losses[1], style="b")],
        ),
    ]
    if np.isfinite(c.grad_ratios).any():
        ratio = Line(name="mean over pairs", y=moving_mean(mean_of(c.grad_ratios), c.window), style="a")
        figures.append(chart("Gradient norm, candidate over baseline", c.steps, [ratio]))
    return figures


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<h2>{escape(title)}</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _list(title: str, items) -> str:
    return f"<h2>{title}</h2><ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""
