"""A training step of bf16_10m on all cores: tokens/s, MFU against the measured BF16 GEMM peak, share of time in GEMMs.

    python -m bench.step [--steps 12] [--json FILE|-] [section.key=value ...]
    python -m bench.step --recipes bf16_10m mxfp8_10m nvfp4_10m     each as it runs, times over the first one's

Three variants, each in a process of its own because an allocator's setting cannot be taken back: eager with glibc's
default allocator, eager with memory kept (run/environment.py: keep_memory), and compiled with memory kept, which is
what a run does. Time is the median over the steps after the second; ratios are to the first variant.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

import torch
from torch.profiler import ProfilerActivity, profile

import run.build
import train
from bench.common import parser, report
from recipe import load
from report.flops import cpu_name

# name -> (train.compile, memory kept)
VARIANTS = {"eager_default_malloc": (False, False), "eager": (False, True), "compiled": (True, True)}
GEMMS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear_backward", "mkldnn::_linear_pointwise")


def measure(recipe_name: str, overrides: list[str], steps: int, compiled: bool, keep: bool) -> dict[str, float]:
    """Train `steps` steps in this process, then profile two more."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = (f"run.dir={folder}", f"train.compile={str(compiled).lower()}", "eval.interval=0", "eval.bigram=false")
        recipe = load(recipe_name, (*overrides, *fixed))
        if not keep:
            run.build.keep_memory = lambda: False
        with run.build.build(recipe, train.read_launch(), "never") as here:
            records = [train.train_step(here) for _ in range(steps)][2:]
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(2):
                    train.train_step(here)
            events = profiler.key_averages()
            gemm = sum(event.self_cpu_time_total for event in events if event.key in GEMMS)
            seconds = statistics.median(record.step_time_s for record in records)
            return {
                "step_ms": 1e3 * seconds,
                "tokens_per_s": recipe.train.global_batch * recipe.train.seq_len / seconds,
                "mfu": statistics.median(record.mfu or 0.0 for record in records),
                "gemm_share": gemm / sum(event.self_cpu_time_total for event in events),
                "memory_gib": records[-1].mem_gib,
                "peak_tflops": here.records.peak_flops / 1e12,
                "threads": torch.get_num_threads(),
            }


def measure_apart(options: argparse.Namespace, recipe: str, variant: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.step", "--child", variant, "--steps", str(options.steps)]
    command += ["--recipe", recipe, *options.overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> dict[str, float | int | str]:
    """Step time of each recipe over that of the first: two rounds in turns, the faster one of each counts."""
    rounds = [{name: measure_apart(options, name, "compiled") for name in options.recipes} for _ in range(2)]
    threads = rounds[0][options.recipes[0]]["threads"]
    figures: dict[str, float | int | str] = {"hardware": f"{cpu_name()}, {threads:g} threads"}
    for name in options.recipes:
        best = min((each[name] for each in rounds), key=lambda result: result["step_ms"])
        figures |= {f"{name}_{key}": best[key] for key in ("step_ms", "tokens_per_s", "mfu", "memory_gib")}
        figures[name] = best["step_ms"] / float(figures[f"{options.recipes[0]}_step_ms"])
    return figures


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--recipe", default="bf16_10m")
    made.add_argument("--recipes", nargs="+", metavar="RECIPE", help="compare recipes instead of variants of one")
    made.add_argument("--steps", type=int, default=12)
    made.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    made.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = made.parse_args()
    if options.child:
        compiled, keep = VARIANTS[options.child]
        print(json.dumps(measure(options.recipe, options.overrides, options.steps, compiled, keep)))
        return
    if options.recipes:
        report(compare(options), options.json)
        return
    figures: dict[str, float | int | str] = {"recipe": options.recipe}
    for name in VARIANTS:
        result = measure_apart(options, options.recipe, name)
        figures |= {f"{name}_{key}": value for key, value in result.items()}
        figures[f"{name}_speedup"] = float(figures["eager_default_malloc_step_ms"]) / result["step_ms"]
    report(figures, options.json)


if __name__ == "__main__":
    main()
