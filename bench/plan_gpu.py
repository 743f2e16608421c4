"""Plans against runs on one GPU: memory and time of a step that `train.py --plan` predicts, over those of a run.

Every case is a run of `train.py` on shapes of FP8-LM's 125M model and of a 1.3B one, and the plan of the same recipe on
a GPU of the stated name; no layout needs a second GPU. Memory is the most that PyTorch's allocator handed out, time the
median of the steps after the first five.

    CASE_bytes, CASE_seconds    predicted over measured
    CASE_gib, CASE_step_ms      measured
    CASE_mfu                    measured, of the GPU's dense BF16 peak as the run knows it

    python -m bench.plan_gpu {--gpu h100 | --only runs} [--cases NAME ...] [--runs DIR] [--json FILE|-]

`--runs` keeps the runs; those that it holds to their end are not run again, so that plans can be made where no GPU is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.common import Figures, parser, report

ROOT = Path(__file__).parent.parent
STEPS, WARM = 25, 5
SHAPE = (
    *("parallel.ranks=1", "train.global_batch=16", "train.micro_batch=8", f"train.steps={STEPS}"),
    *("model.vocab_size=8192", "eval.interval=0", "checkpoint.interval=0", "schedule.warmup=2"),
)
LARGE = ("model.hidden_size=2048", "model.num_layers=24", "model.num_heads=16", "model.ffn_size=8192")
EMULATED = "precision.backend=emulate"
CASES: dict[str, tuple[str, ...]] = {
    "bf16": ("bf16_125m",),
    "bf16_eager": ("bf16_125m", "train.compile=false"),
    "bf16_recompute": ("bf16_125m", "model.recompute=full"),
    "bf16_1.3b": ("bf16_125m", *LARGE),
    "fp8lm_emulated": ("fp8lm_125m", EMULATED),
    "mxfp8_emulated": ("bf16_125m", "precision.policy=mxfp8", EMULATED),
    "nvfp4_emulated": ("bf16_125m", "precision.policy=nvfp4", EMULATED),
    "fp8lm_te": ("fp8lm_125m", "precision.backend=te"),
    "fp8_1.3b_te": ("bf16_125m", *LARGE, "precision.policy=fp8_delayed", "precision.backend=te"),
}


def trained(case: str, folder: Path) -> list[dict[str, float]]:
    """Records of the steps of a run in `folder`, which is made if it is not there."""
    name, *overrides = CASES[case]
    where = folder / case
    if not (where / "metrics.jsonl").exists():
        command = [sys.executable, "train.py", "--recipe", name, *SHAPE, *overrides, "device=cuda", f"run.dir={where}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{case}: {' '.join(command)} ended with {done.returncode}\n{done.stderr[-3000:]}")
    records = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    if len(steps) != STEPS:
        raise SystemExit(f"{case}: {where} holds {len(steps)} steps of {STEPS}; delete it to run it again")
    return steps


def planned(case: str, gpu: str) -> dict[str, float]:
    """What `train.py --plan` says of the case."""
    name, *overrides = CASES[case]
    command = [sys.executable, "train.py", "--recipe", name, *SHAPE, *overrides]
    command += ["--plan", "--gpu", gpu, "--nodes", "1", "--gpus-per-node", "1", "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case}: {' '.join(command)} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def compare(case: str, options: argparse.Namespace, folder: Path) -> Figures:
    """Measured figures of a case and, unless only runs are asked for, planned over measured."""
    steps = trained(case, folder)[WARM:]
    seconds = statistics.median(step["step_time_s"] for step in steps)
    figures: Figures = {"gib": steps[-1]["mem_gib"], "step_ms": 1e3 * seconds}
    if steps[-1]["mfu"] is not None:
        figures["mfu"] = statistics.median(step["mfu"] for step in steps)
    if options.only == "runs":
        return figures
    plan = planned(case, options.gpu)
    figures["bytes"] = plan["bytes_per_rank"] / 2**30 / steps[-1]["mem_gib"]
    figures["seconds"] = steps[-1]["tokens"] / steps[-1]["step"] / plan["tokens_per_second"] / seconds
    return figures


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--gpu", help="name of the GPU for --plan; not with --only runs")
    made.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    made.add_argument("--runs", type=Path, help="directory of the runs")
    made.add_argument("--only", choices=["runs"], help="measure, plan elsewhere")
    options = made.parse_args()
    if (options.gpu is None) != (options.only == "runs"):
        made.error("give either --gpu or --only runs")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or Path(temporary)
        found = {case: compare(case, options, folder.resolve()) for case in options.cases}
    report({f"{case}_{key}": value for case, each in found.items() for key, value in each.items()}, options.json)


if __name__ == "__main__":
    main()
