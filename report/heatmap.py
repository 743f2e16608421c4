"""A heat map as an HTML table, rows x steps: readable without a script, with a keyboard, and in black and white.

Ten colours of cividis (report/probe.css), dark for fine and bright for bad; what is beyond a limit has a cross as well.
Every cell says its number when it is pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

LEVELS = 10
MAX_COLUMNS = 80  # more than a screen shows


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Values to colours, evenly over the logarithm from `fine` (the darkest) to `bad` (the brightest).

    limit: values on its bad side get a cross; None: no such limit
    percent: how values are written
    """

    fine: float
    bad: float
    limit: float | None = None
    percent: bool = False

    def level(self, value: float) -> int:
        """0 .. LEVELS - 1; zero is below every positive number, infinity above."""
        if not 0 < value < math.inf:
            end = LEVELS - 1 if self.bad > self.fine else 0
            return end if value > 0 else LEVELS - 1 - end
        place = math.log(value / self.fine) / math.log(self.bad / self.fine)
        return min(LEVELS - 1, max(0, math.floor(place * LEVELS)))

    def beyond(self, value: float) -> bool:
        return self.limit is not None and (value > self.limit if self.bad > self.fine else value < self.limit)

    def words(self, value: float) -> str:
        return f"{100 * value:.3g} %" if self.percent else f"{value:.3g}"

    def borders(self) -> list[float]:
        """The value at which each level begins."""
        return [self.fine * (self.bad / self.fine) ** (level / LEVELS) for level in range(LEVELS)]


def columns(steps: Sequence[int]) -> list[int]:
    """The steps to show, at most MAX_COLUMNS, evenly spread, the first and the last among them."""
    if len(steps) <= MAX_COLUMNS:
        return list(steps)
    places = {round(i * (len(steps) - 1) / (MAX_COLUMNS - 1)) for i in range(MAX_COLUMNS)}
    return [steps[place] for place in sorted(places)]


def heatmap(values: Mapping[str, Mapping[int, float]], scale: Scale, what: str = "step") -> str:
    """values: row -> step -> number, in the order in which rows are shown; a missing number leaves its cell empty."""
    shown = columns(sorted({step for row in values.values() for step in row}))
    every = max(1, -(-len(shown) // 8))
    head = "".join(f"<th>{step if i % every == 0 else ''}</th>" for i, step in enumerate(shown))
    rows = []
    for name, row in values.items():
        cells = "".join(_cell(row.get(step), f"{what} {step}", scale) for step in shown)
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return (
        f'{_key(scale)}<div class="scroll"><table class="heat"><thead><tr><th>{escape(what)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(value: float | None, where: str, scale: Scale) -> str:
    if value is None or math.isnan(value):
        return "<td></td>"
    cross = "&times;" if scale.beyond(value) else ""
    return f'<td class="k{scale.level(value)}" title="{escape(where)}: {escape(scale.words(value))}">{cross}</td>'


def _key(scale: Scale) -> str:
    sign = "&ge;" if scale.bad > scale.fine else "&le;"
    items = [f'<li><i class="k{k}"></i>{sign} {escape(scale.words(b))}</li>' for k, b in enumerate(scale.borders())]
    if scale.limit is not None:
        side = "above" if scale.bad > scale.fine else "below"
        items.append(f"<li><i>&times;</i>{side} {escape(scale.words(scale.limit))}</li>")
    return f'<ul class="key">{"".join(items)}</ul>'
