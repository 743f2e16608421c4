"""What every bench shares: interleaved repetitions, a table, and one flat JSON object.

Repetitions of the variants alternate, so that a slow moment of the machine meets all of them; the
median is shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def parser(description: str | None) -> argparse.ArgumentParser:
    """Parser with the option that all benches have."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--json", metavar="FILE|-", help="also write one flat JSON object; - only that")
    return made


def interleaved(variants: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds of each function, called in turns; one call each before, not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions + 1):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(figures: dict[str, float | int | str], json_target: str | None) -> None:
    """Print figures as a table, and write them as JSON to a file; or with "-" print the JSON
    alone."""
    if json_target == "-":
        print(json.dumps(figures))
        return
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {f'{value:,.4g}' if isinstance(value, float) else value}")
    if json_target:
        Path(json_target).write_text(json.dumps(figures) + "\n")
