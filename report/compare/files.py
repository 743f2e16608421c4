"""The comparison as files: compare.json (every figure), compare.html, compare.png (needs matplotlib)."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from errors import UsageError
from report.compare import page
from report.compare.analysis import Comparison
from report.compare.measures import mean_of


def write(comparison: Comparison, out: Path) -> str:
    """Write the files to `out`, and say which. Raises UsageError where the folder cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.json").write_text(json.dumps(_plain(as_tree(comparison)), indent=1, allow_nan=False) + "\n")
        (out / "compare.html").write_text(page.render(comparison), encoding="utf-8")
        drawn = draw(comparison, out / "compare.png")
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from None
    names = ["compare.html", "compare.json", *(["compare.png"] if drawn else [])]
    missing = "" if drawn else "; compare.png is left out: it needs matplotlib (pip install -e '.[plot]')"
    return f"Written to {out}: {', '.join(names)}{missing}"


def as_tree(c: Comparison) -> dict[str, Any]:
    """Every figure by name. Gaps are in percent of the limit's unit; series have one entry a common step."""
    return {
        "verdict": c.verdict,
        "exit_code": c.exit_code,
        "reason": c.reason,
        "limit": dataclasses.asdict(c.settings.limit),
        "confidence": c.settings.confidence,
        "final": dataclasses.asdict(c.final),
        "phases": [dataclasses.asdict(p) for p in c.phases],
        "validation": c.validation and {"step": c.validation_step, **dataclasses.asdict(c.validation)},
        "extra_tokens_percent": dict(zip(("mean", "low", "high"), c.extra, strict=True)),
        "views": [dataclasses.asdict(v) for v in c.views],
        "events": {
            "baseline": dataclasses.asdict(c.baseline_events),
            "candidate": dataclasses.asdict(c.candidate_events),
        },
        "pairs": [
            {
                "label": p.label,
                "baseline": p.baseline.source,
                "candidate": p.candidate.source,
                "formats": [p.baseline.kind, p.candidate.kind],
                "order_correlation": p.order,
                "differences": p.differences,
                "gap": gaps,
            }
            for p, gaps in zip(c.pairs, c.gaps, strict=True)
        ],
        "steps": c.steps,
        "window": c.window,
        "notes": c.notes,
    }


def _plain(value: Any) -> Any:
    """JSON's own types; a figure that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(c: Comparison, path: Path) -> bool:
    """Gap and losses over the steps as PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 7), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for moving in c.moving if len(c.moving) > 1 else ():
        above.plot(c.steps, moving, color="#808080", linewidth=0.7)
    above.plot(c.steps, mean_of(c.moving), color="#0072b2", label="mean")
    above.axhline(c.settings.limit.percent, color="#d55e00", linestyle=":", label="limit")
    gap = c.final.gap
    if math.isfinite(gap.high - gap.low):
        label = f"{100 * c.settings.confidence:g} % interval of the final steps"
        above.fill_between([c.final.first, c.final.last], gap.low, gap.high, color="#0072b2", alpha=0.2, label=label)
    above.set_ylabel(f"gap of the {c.settings.limit.unit}, %")
    above.set_title(f"{c.verdict}: {gap.mean:+.2f} %, moving mean of {c.window} logged steps")
    below.plot(c.steps, c.losses[0], color="#0072b2", label="baseline")
    below.plot(c.steps, c.losses[1], color="#d55e00", linestyle="--", label="candidate")
    below.set_xlabel("step")
    below.set_ylabel("loss, nats a token")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
    return True
