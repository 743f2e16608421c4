"""README's table of recipes: hardware, tokens/s, bytes a parameter, loss gap; from a bench and from finished runs.

    python -m report.table RUN... --speed step.json [--baseline bf16_10m] [--write README.md]

RUN: run directories (of `bench.curves`, or any that trained recipes and their baseline with the same seeds). The gap is
that of the final fifth of the steps with its 95 % interval over seeds (docs/comparing.md); bytes are those that rank 0
measured. --speed: what `python -m bench.step --recipes ... --json step.json` wrote. Without --write the table is
printed; with it, it replaces what stands between the two markers in the file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import UsageError
from report.compare.analysis import Settings, analyse
from report.compare.curves import Curve
from report.compare.limits import Limit
from report.compare.pairing import pair
from report.compare.readers import read_curve

BEGIN, END = "<!-- report.table: begin -->", "<!-- report.table: end -->"
HEAD = "| recipe | hardware | tokens/s | bytes a parameter | loss gap, 95 % interval |\n|---|---|---|---|---|\n"
ANY = Limit(percent=math.inf, unit="loss", source="none: a table judges nothing")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 with a message."""
    made = argparse.ArgumentParser(prog="python -m report.table", description=(__doc__ or "").splitlines()[0])
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run directories")
    made.add_argument("--baseline", default="bf16_10m", metavar="RECIPE", help="whose runs gaps refer to (bf16_10m)")
    made.add_argument("--speed", type=Path, required=True, metavar="FILE", help="of bench.step --recipes ... --json")
    made.add_argument("--write", type=Path, metavar="FILE", help="replace the table between its markers")
    options = made.parse_args(arguments)
    try:
        table = HEAD + "".join(rows(options.runs, options.baseline, read_speed(options.speed)))
        if options.write is None:
            print(table, end="")
        else:
            write(options.write, table)
    except UsageError as error:
        print(f"report.table: {error}", file=sys.stderr)
        return UsageError.exit_code
    return 0


def read_speed(path: Path) -> dict[str, Any]:
    """Figures of bench.step. Raises UsageError."""
    try:
        figures = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON of bench.step: {error}") from None
    if not isinstance(figures, dict) or not isinstance(figures.get("hardware"), str):
        raise UsageError(f"{path} does not say its hardware: write it with bench.step --recipes ... --json FILE")
    return figures


def rows(runs: Sequence[Path], baseline: str, speed: dict[str, Any]) -> list[str]:
    """Lines of the table, the baseline first, the others by name. Raises UsageError."""
    curves: dict[str, list[Curve]] = {}
    for run in runs:
        if not (run / "metrics.jsonl").is_file() or not (run / "resolved.yaml").is_file():
            raise UsageError(f"{run} holds no metrics.jsonl and resolved.yaml; give run directories of this repository")
        curve = read_curve(run)
        name = curve.recipe["name"]
        curves.setdefault(name, []).append(curve)
    if baseline not in curves:
        raise UsageError(f"no run of the baseline {baseline} is among them; they are of {', '.join(sorted(curves))}")
    memory = {name: bytes_a_parameter([Path(curve.source) for curve in found]) for name, found in curves.items()}
    lines = []
    for name in [baseline, *sorted(curves.keys() - {baseline})]:
        tokens = speed.get(f"{name}_tokens_per_s")
        shown = "not measured" if tokens is None else f"{tokens:,.0f}"
        gap = "" if name == baseline else gap_with_interval(curves[baseline], curves[name])
        lines.append(f"| `{name}` | {speed['hardware']} | {shown} | {memory[name]:.2f} | {gap} |\n")
    return lines


def gap_with_interval(baselines: Sequence[Curve], candidates: Sequence[Curve]) -> str:
    """Gap of the final steps in percent of the loss; of the seeds that the candidate has."""
    seeds = {curve.seed for curve in candidates}
    pairs = pair([curve for curve in baselines if curve.seed in seeds], candidates)
    gap = analyse(pairs, Settings(limit=ANY)).final.gap
    return f"{gap.mean:+.2f} % ({gap.low:+.2f} to {gap.high:+.2f}, seeds: {gap.seeds})"


def bytes_a_parameter(runs: Sequence[Path]) -> float:
    """What rank 0 of the first run that has a record measured after its first step. Raises UsageError if none has."""
    for run in runs:
        for line in (run / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record.get("kind") == "memory":
                return sum(record["bytes"].values()) / record["parameters"]
    raise UsageError(f"{runs[0]} has no record of memory; every run of this version writes one after its first step")


def write(path: Path, table: str) -> None:
    """Replace what stands between the markers. Raises UsageError if they are not there once each, in order."""
    text = path.read_text()
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended or BEGIN in after or END in after:
        raise UsageError(f"{path} needs the lines {BEGIN} and {END}, once each, where the table shall stand")
    path.write_text(f"{before}{BEGIN}\n{table}{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
