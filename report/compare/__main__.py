"""Compare runs with their baseline, or train both and compare.

    python -m report.compare BASELINE... --candidate RUN... [--out DIR] [--limit PERCENT]
    python -m report.compare --run nvfp4_10m --baseline bf16_10m [--seeds 3] [a.b=c ...]

A run is a run directory, metrics.jsonl, a Megatron-LM or torchtitan log, TensorBoard events or CSV. Exit code: 0 within
the limit, 1 outside, 2 not comparable or not decided, and why. docs/comparing.md says what each number means.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from errors import UsageError, UserError
from report.compare import files, terminal
from report.compare.analysis import Settings, analyse
from report.compare.limits import UNITS, choose_limit
from report.compare.pairing import pair
from report.compare.readers import read_curve


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m report.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("words", nargs="*", metavar="BASELINE|a.b=c", help="baseline runs; with --run overrides for both")
    made.add_argument("--candidate", nargs="+", metavar="RUN", help="one run for each baseline")
    made.add_argument("--run", metavar="RECIPE", help="train this recipe and --baseline, then compare")
    made.add_argument("--baseline", metavar="RECIPE", help="with --run: the recipe to compare with")
    made.add_argument("--seeds", type=_whole, metavar="N", help="with --run: seeds 0 to N-1 (3)")
    made.add_argument("--jobs", type=_whole, metavar="N", help="with --run: runs at a time (2)")
    made.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the report (runs/compare)")
    made.add_argument("--limit", type=_percent, metavar="PERCENT", help="largest gap (published for the precision)")
    made.add_argument("--unit", choices=UNITS, help="of the gap and its limit (as the limit; loss)")
    made.add_argument("--confidence", type=_level, default=95.0, metavar="PERCENT", help="of the interval (95)")
    made.add_argument(
        "--final", type=_share, default=0.2, metavar="SHARE", help="steps that the verdict is about (0.2)"
    )
    made.add_argument("--window", type=_whole, metavar="LINES", help="of the moving means (a twentieth)")
    made.add_argument("--warmup", type=_length, metavar="STEPS|SHARE", help="of the schedule, over the recipe's")
    made.add_argument("--decay", type=_length, metavar="STEPS|SHARE", help="of the schedule, over the recipe's")
    made.add_argument("--loss", metavar="NAME", help="name of the loss in logs, TensorBoard or CSV")
    made.add_argument("--same-data", action="store_true", help="vouch for equal data where no file tells")
    return made


def _number(text: str, low: float, high: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def _whole(text: str) -> int:
    value = _number(text, 1, 1e6, "a whole number, 1 or more")
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def _percent(text: str) -> float:
    return _number(text, 0, 1e6, "a percentage, 0 or more")


def _level(text: str) -> float:
    return _number(text, 50, 99.99, "a percentage from 50 to 99.99")


def _share(text: str) -> float:
    return _number(text, 0.01, 1, "a share from 0.01 to 1")


def _length(text: str) -> float:
    return _number(text, 0, 1e12, "a number of steps, or a share below 1")


def runs(options: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Baselines and candidates: those given, or those that --run has just trained. Raises UsageError."""
    if options.run is None:
        for name in ("baseline", "seeds", "jobs"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name} needs --run RECIPE; baseline runs are given without an option")
        if not options.words or not options.candidate:
            raise UsageError("give baseline runs and --candidate RUN..., or --run RECIPE --baseline RECIPE; see --help")
        return [Path(word) for word in options.words], [Path(word) for word in options.candidate]
    if options.candidate or options.baseline is None:
        raise UsageError("--run RECIPE trains the candidate: it needs --baseline RECIPE, and no --candidate")
    if wrong := [word for word in options.words if "=" not in word]:
        raise UsageError(f"with --run only overrides a.b=c may follow, not {', '.join(wrong)}")
    from report.compare import launch  # recipes need torch, which takes seconds; logs do not

    return launch.run_pairs(
        options.baseline,
        options.run,
        tuple(options.words),
        seeds=options.seeds or 3,
        jobs=options.jobs or 2,
        out=options.out,
    )


def compare(options: argparse.Namespace, console: Console) -> int:
    """Read, compare, report. Returns the exit code; raises UsageError."""
    baselines, candidates = ([read_curve(path, options.loss) for path in paths] for paths in runs(options))
    pairs = pair(baselines, candidates, options.same_data)
    policy = pairs[0].candidate.recipe.get("precision", {}).get("policy")
    settings = Settings(
        limit=choose_limit(policy, options.limit, options.unit),
        confidence=options.confidence / 100,
        final=options.final,
        window=options.window,
        warmup=options.warmup,
        decay=options.decay,
    )
    comparison = analyse(pairs, settings)
    terminal.show(comparison, console)
    console.print(files.write(comparison, options.out), markup=False, soft_wrap=True)
    return comparison.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; argparse itself exits with 2 on a wrong option."""
    options = parser().parse_args(arguments)
    try:
        return compare(options, Console(highlight=False))
    except UserError as error:
        print(f"report.compare: {error}", file=sys.stderr)
        return UsageError.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
