"""What a run's numerics probe saw: python -m report.probe RUN [--last N] [--budget SHARE] [--out FILE] [--yaml FILE|-]

Reads RUN/probe.jsonl (recipe section `probe`), prints the worst GEMMs and weights and what to keep in BF16, and writes
one HTML page with a heat map layer x step of each statistic. Exit codes: 0, or 2 for a wrong option or a run without
samples.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from errors import UsageError, UserError
from lowprec.probe.damage import BUDGET, THRESHOLD, Leg, Weight, as_yaml, legs, proposal, shown, weights
from report.heatmap import Scale, heatmap

STYLE = Path(__file__).with_name("probe.css")
SHOWN = 12  # rows of a table
Records = list[dict[str, Any]]
Rows = list[list[str]]


def read(run: Path) -> Records:
    """The records of RUN/probe.jsonl, in order. Raises UsageError where there are none."""
    path = run / "probe.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; set probe.interval in the recipe to get samples"
        ) from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):  # the last one may be torn by a kill
                raise UsageError(f"{path}:{number} is not JSON; delete the line") from None
    if not any(record["kind"] == "gemm" for record in records):
        raise UsageError(f"{path} has no samples of quantized GEMMs; set probe.interval, and a policy that quantizes")
    return records


def last(records: Records, count: int) -> Records:
    """The records of the last `count` sampled steps."""
    steps = sorted({record["step"] for record in records if record["kind"] == "sample"})[-count:]
    return [record for record in records if record["step"] in steps]


def leg_rows(ranked: Sequence[Leg]) -> Rows:
    return [[leg.layer, leg.gemm, f"{leg.error:.2%}", f"{leg.typical:.2%}", leg.why or ""] for leg in ranked]


def weight_rows(ranked: Sequence[Weight]) -> Rows:
    return [[w.name, f"{w.ratio:.2f}", f"{w.cosine:.5f}", "below sqrt(3)" if w.drowned else ""] for w in ranked]


LEG_HEADER = ["linear", "GEMM", "error", "median of the GEMM", ""]
WEIGHT_HEADER = ["parameter", "gradient / noise", "cosine", ""]


def maps(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, dict[str, dict[int, float]], Scale]]:
    """(title, explanation, row -> step -> value, scale) of each heat map."""
    noise: dict[str, dict[int, float]] = defaultdict(dict)
    error: dict[str, dict[int, float]] = defaultdict(dict)
    under: dict[str, dict[int, float]] = defaultdict(dict)
    over: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        step = record["step"]
        if record["kind"] == "gradient":
            ratio = record["gradient_to_noise"]
            noise[record["parameter"]][step] = math.inf if ratio is None else ratio
        elif record["kind"] == "gemm":
            _raise(error[record["layer"]], step, record["relative_error"])
        elif record["kind"] == "operand":
            _raise(under[record["layer"]], step, record["underflow"])
            _raise(over[record["layer"]], step, record["overflow"])
    return [
        (
            "Gradient over quantization noise",
            "of each weight, on the held micro-batch; training stalls below the square root of 3",
            noise,
            Scale(fine=100.0, bad=1.0, limit=THRESHOLD),
        ),
        (
            "Error of the GEMMs",
            "relative, of the worst of each linear's three products",
            error,
            Scale(fine=0.01, bad=1.0, limit=1 / THRESHOLD, percent=True),
        ),
        (
            "Underflow",
            "numbers that are not zero and quantize to zero, worst operand of each linear",
            under,
            Scale(fine=1e-4, bad=1.0, percent=True),
        ),
        (
            "Overflow",
            "numbers that are clipped, worst operand of each linear",
            over,
            Scale(fine=1e-5, bad=0.1, percent=True),
        ),
    ]


def _raise(row: dict[int, float], step: int, value: float | None) -> None:
    row[step] = max(row.get(step, 0.0), math.inf if value is None else value)


def scales_map(records: Records) -> dict[str, dict[int, float]]:
    """Operand -> octave -> share of its block scales, of the last sample, those of the most underflow first."""
    step = max(record["step"] for record in records if record["kind"] == "operand")
    found = [r for r in records if r["kind"] == "operand" and r["step"] == step and len(r["scales"]) > 1]
    found.sort(key=lambda record: -record["underflow"])
    rows: dict[str, dict[int, float]] = {}
    for record in found[: 2 * SHOWN]:
        total = sum(record["scales"].values())
        octaves = {-128 if k == "zero" else int(k): n / total for k, n in record["scales"].items()}
        rows[f"{record['layer']} {record['slot']}"] = octaves
    return rows


def render(name: str, records: Records, recent: Records, chosen: Sequence[Leg]) -> str:
    """The whole page."""
    samples = [record for record in recent if record["kind"] == "sample"]
    text = as_yaml(chosen)
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>Numerics of {escape(name)}</title><style>{STYLE.read_text()}</style></head><body>",
        f"<h1>Numerics of {escape(name)}</h1><p>{escape(summary(samples))}</p>",
        "<h2>Keep in BF16</h2>",
        f"<p>Paste it into the recipe:</p><pre>{escape(text)}</pre>" if text else f"<p>{NOTHING}</p>",
        _table("Worst GEMMs", LEG_HEADER, leg_rows(legs(recent)[:SHOWN])),
    ]
    if noisy := weights(recent)[:SHOWN]:
        parts.append(_table("Noisiest gradients", WEIGHT_HEADER, weight_rows(noisy)))
    for title, words, values, scale in maps(records):
        if values:
            parts.append(f"<h2>{escape(title)}</h2><p>{escape(words)}</p>{heatmap(values, scale)}")
    if rows := scales_map(records):
        words = "share of an operand's blocks whose stored scale lies in [2^k, 2^(k+1)), last sample; -128: zero"
        scale = Scale(fine=0.001, bad=1.0, percent=True)
        parts.append(f"<h2>Block scales by octave</h2><p>{words}</p>{heatmap(rows, scale, 'k =')}")
    return "\n".join([*parts, "</body></html>"])


NOTHING = (
    "No GEMM stands out: none has a signal below sqrt(3) times its noise, or 10 % and twice the error of its kind."
)


def summary(samples: Sequence[Mapping[str, Any]]) -> str:
    """The last sample in a sentence."""
    newest = samples[-1]
    text = f"{len(samples)} samples, policy {newest['policy']}, the last at step {newest['step']}"
    text += f"; its loss {shown(newest['loss_low'], '.5f')}"
    if "cosine" not in newest:  # probe.gradients=false
        return text
    noise = newest["gradient_to_noise"]
    return (
        f"{text}, {shown(newest['loss_high'], '.5f')} in high precision; the whole gradient's cosine "
        f"{shown(newest['cosine'], '.5f')}, "
        f"over noise {math.inf if noise is None else noise:.2f}"
    )


def _table(title: str, header: Sequence[str], rows: Rows) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<h2>{escape(title)}</h2><div class="scroll"><table class="plain"><tr>{head}</tr>{body}</table></div>'


def _print_table(console: Console, title: str, header: Sequence[str], rows: Rows) -> None:
    table = Table(*header, title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m report.probe", description="What a run's numerics probe saw.")
    made.add_argument("run", type=Path, metavar="RUN")
    made.add_argument("--last", type=int, default=5, metavar="N", help="samples that the ranking takes medians of (5)")
    made.add_argument("--budget", type=float, default=BUDGET, metavar="SHARE", help="of all GEMMs, to propose (0.15)")
    made.add_argument("--out", type=Path, metavar="FILE", help="the page; by default RUN/probe.html")
    made.add_argument("--yaml", metavar="FILE|-", help="also write the proposal alone; - only that, to standard output")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; argparse itself exits with 2 on a wrong option."""
    made = parser()
    options = made.parse_args(arguments)
    if options.last < 1 or not 0 <= options.budget <= 1:
        made.error("--last is at least 1, --budget between 0 and 1")
    try:
        records = read(options.run)
        recent = last(records, options.last)
        ranked = legs(recent)
        chosen = proposal(ranked, options.budget)
        if options.yaml == "-":
            print(as_yaml(chosen), end="")
            return 0
        out = options.out or options.run / "probe.html"
        out.write_text(render(options.run.name, records, recent, chosen), encoding="utf-8")
        if options.yaml:
            Path(options.yaml).write_text(as_yaml(chosen), encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"report.probe: {error}", file=sys.stderr)
        return UsageError.exit_code
    console = Console(highlight=False)
    console.print(summary([record for record in recent if record["kind"] == "sample"]), markup=False)
    _print_table(console, "worst GEMMs", LEG_HEADER, leg_rows(ranked[:SHOWN]))
    if noisy := weights(recent)[:SHOWN]:
        _print_table(console, "noisiest gradients", WEIGHT_HEADER, weight_rows(noisy))
    console.print(f"to keep in BF16:\n{as_yaml(chosen)}" if chosen else NOTHING, markup=False, soft_wrap=True)
    console.print(str(out), markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
