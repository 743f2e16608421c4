"""Line charts as self-contained HTML: an SVG that stretches, with labels in HTML, readable at any width.

Colours are variables of the page's style (light and dark), from Okabe & Ito's palette, which colour-blind people tell
apart; lines differ in their dashes as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 1000, 300  # units of the SVG's own coordinates; the page stretches them
MAX_POINTS = 600  # of a line: more than a screen shows


@dataclass(frozen=True, kw_only=True)
class Line:
    """y (n,) over the chart's x (n,); NaN breaks the line. style: a class of the page (a, b, faint, limit)."""

    name: str
    y: np.ndarray
    style: str


@dataclass(frozen=True, kw_only=True)
class Band:
    """A shaded area: x from..to (None: the whole width), y from..to (None: the whole height)."""

    name: str
    x: tuple[float, float] | None = None
    y: tuple[float, float] | None = None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values in [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= count)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def bounds(lines: Sequence[Line], bands: Sequence[Band]) -> tuple[float, float]:
    """y range: the middle 99 % of all lines and every band, a little wider; spikes may be cut off."""
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    extremes = [v for band in bands if band.y for v in band.y if math.isfinite(v)]
    ends = np.quantile(values, [0.005, 0.995]).tolist() if len(values) else [0.0, 1.0]
    low, high = min([ends[0], *extremes]), max([ends[1], *extremes])
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def chart(title: str, x: np.ndarray, lines: Sequence[Line], bands: Sequence[Band] = (), unit: str = "") -> str:
    """A figure of `lines` over x (n,), increasing; unit: written after the numbers on the left."""
    left, right = float(x[0]), float(x[-1])
    low, high = bounds(lines, bands)

    def across(value: float) -> float:
        return (value - left) / (right - left) * WIDTH

    def down(value: float) -> float:
        return (high - min(max(value, low), high)) / (high - low) * HEIGHT

    shapes = []
    for band in bands:
        x0, x1 = map(across, band.x or (left, right))
        y1, y0 = map(down, band.y or (low, high))
        shapes.append(
            f'<rect class="band" x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{max(y1 - y0, 1):.1f}"/>'
        )
    rows = ticks(low, high)
    shapes += [f'<line class="grid" x1="0" x2="{WIDTH}" y1="{down(v):.1f}" y2="{down(v):.1f}"/>' for v in rows]
    shapes += [f'<path class="{line.style}" d="{_path(x, line.y, across, down)}"/>' for line in lines]
    columns = [v for v in ticks(left, right, 4) if v == int(v)]
    labels = [f'<span class="y" style="top:{100 * down(v) / HEIGHT:.1f}%">{v:g}{escape(unit)}</span>' for v in rows]
    labels += [f'<span class="x" style="left:{100 * across(v) / WIDTH:.1f}%">{v:,.0f}</span>' for v in columns]
    named = {line.name: line.style for line in lines} | {band.name: "band" for band in bands}
    keys = "".join(f'<li class="{style}"><i></i>{escape(name)}</li>' for name, style in named.items())
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="plot">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f'{"".join(shapes)}</svg>{"".join(labels)}</div><ul class="key">{keys}</ul></figure>'
    )


def _path(x: np.ndarray, y: np.ndarray, across, down) -> str:
    """SVG path through at most MAX_POINTS of the points; a gap of NaN starts a new piece."""
    chosen = (
        np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(int)) if len(x) > MAX_POINTS else range(len(x))
    )
    parts, pen = [], "M"
    for i in chosen:
        if not math.isfinite(y[i]):
            pen = "M"
            continue
        parts.append(f"{pen}{across(float(x[i])):.1f} {down(float(y[i])):.1f}")
        pen = "L"
    return "".join(parts)
