"""Is a recipe as good as BF16? Final validation losses against the BF16 baseline, paired by seed.

    python -m bench.curves mxfp8_10m nvfp4_10m [--seeds 3] [--jobs 2] [--out runs/curves] [--json FILE|-] [a.b=c ...]

Every run of a seed starts from the same weights and sees the same data, so a difference is the recipe's, up to the
noise of chaotic training; the spread over seeds shows that noise. SMALL shrinks the `*_10m` recipes to what 2 cores
train in minutes. Runs that the output folder already holds are not run again. The losses of the baseline are kept in
bench/baselines/ with a hash of everything that decides them (--keep-baseline), and are reused while the hash fits.
"""

from __future__ import annotations

import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.common import parser, report
from report.compare.launch import config_hash, run_all, training

BASELINE = "bf16_10m"
BASELINES = Path(__file__).parent / "baselines"
SMALL = (
    "model.vocab_size=2048",
    "model.hidden_size=128",
    "model.num_layers=4",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.ffn_size=384",
    "train.steps=500",
    "train.global_batch=8",
    "train.micro_batch=8",
    "eval.interval=500",
    "checkpoint.interval=0",
)


def train(name: str, seed: int, overrides: tuple[str, ...], out: Path) -> list[dict]:
    """The records of a finished run, after running it if `out` does not hold it. Raises UsageError if it fails."""
    run = training(name, seed, overrides, out)
    for _ in run_all([run], jobs=1):
        pass
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def curve(name: str, seed: int, overrides: tuple[str, ...], out: Path) -> dict:
    """{"validation": last validation loss, "losses": training loss of each step} of one run."""
    digest = config_hash(name, (*overrides, f"train.seed={seed}"))
    kept = BASELINES / f"{name}_{digest}_seed{seed}.jsonl"
    records = (
        [json.loads(line) for line in kept.read_text().splitlines()]
        if kept.exists()
        else train(name, seed, overrides, out)
    )
    return {
        "file": kept,
        "validation": [r["validation_loss"] for r in records if "validation_loss" in r][-1],
        "losses": [r["loss"] for r in records if "loss" in r],
    }


def keep(result: dict) -> None:
    """Write one baseline to bench/baselines: a line a step, the validation loss last."""
    BASELINES.mkdir(exist_ok=True)
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(result["losses"], 1)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"validation_loss": result["validation"]}])
    result["file"].write_text(text)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("recipes", nargs="+", metavar="RECIPE|a.b=c")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    made.add_argument("--out", type=Path, default=Path("runs/curves"))
    made.add_argument("--keep-baseline", action="store_true", help="write the baseline's losses to bench/baselines")
    options = made.parse_args()
    names = [BASELINE, *(word for word in options.recipes if "=" not in word)]
    overrides = (*SMALL, *(word for word in options.recipes if "=" in word))
    jobs = [(name, seed) for seed in range(options.seeds) for name in names]
    out = options.out.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        curves = pool.map(lambda job: curve(job[0], job[1], overrides, out), jobs)
        found = dict(zip(jobs, curves, strict=True))
    figures: dict[str, float | int | str] = {"seeds": options.seeds, "overrides": " ".join(overrides)}
    base = [found[BASELINE, seed] for seed in range(options.seeds)]
    if options.keep_baseline:
        for result in base:
            keep(result)
    figures["baseline_validation"] = statistics.mean(result["validation"] for result in base)
    figures["baseline_spread_percent"] = 100 * _spread([r["validation"] for r in base]) / figures["baseline_validation"]
    for name in names[1:]:
        gaps = [100 * (found[name, s]["validation"] / base[s]["validation"] - 1) for s in range(options.seeds)]
        figures[f"{name}_gap_percent"], figures[f"{name}_gap_spread"] = statistics.mean(gaps), _spread(gaps)
    report(figures, options.json)


def _spread(values: list[float]) -> float:
    """Standard deviation over seeds; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
