"""What the numerics probe costs: a sample over the steps between two samples, in one run.

    python -m bench.probe [--recipe mxfp8_10m] [--steps 8] [--every 100] [--json FILE|-] [section.key=value ...]

Steps and samples alternate in one process, so that a slow moment of the machine meets both; medians. `overhead` is the
time of a sample over that of `--every` steps. `off_us` is what a step pays where the probe is off, the call that finds
it so; `update_norm` is the time of AdamW that also tallies the norm of its update, over that of one that does not, and
`update_norm_share` what that is of a step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable

import torch

import train
from bench.common import interleaved, parser, report
from lowprec.codecs import Extent
from lowprec.optim import OptimizerConfig
from lowprec.stepping import Hyper
from recipe import load
from run.build import build

ELEMENTS = 1 << 22


def adamw() -> dict[str, float]:
    """Seconds of an FP32 AdamW step of ELEMENTS weights, with its tally and without."""
    update = OptimizerConfig().storage
    extent = Extent((ELEMENTS,), 0, ELEMENTS)
    weight, gradient = torch.randn(ELEMENTS), torch.randn(ELEMENTS)
    tensors = {"weight": weight} | update.allocate(extent, weight)
    hyper = Hyper(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=10)
    variants = {
        name: lambda measure=measure: update.apply(extent, tensors, gradient, hyper, measure=measure)
        for name, measure in (("plain", False), ("tallied", True))
    }
    return interleaved(variants, 15)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--recipe", default="mxfp8_10m")
    made.add_argument("--steps", type=int, default=8, help="steps and samples that are timed")
    made.add_argument("--every", type=int, default=100, help="steps from sample to sample that the overhead is of")
    made.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = made.parse_args()
    seconds: dict[str, list[float]] = {"step": [], "sample": [], "without_gradients": [], "off": []}
    with tempfile.TemporaryDirectory() as folder:
        fixed = (
            f"run.dir={folder}",
            "eval.interval=0",
            "eval.bigram=false",
            "probe.interval=1",
            "metrics.log_interval=1000",
        )
        recipe = load(options.recipe, (*options.overrides, *fixed))
        with build(recipe, train.read_launch(), "never") as run:
            prober = run.prober
            assert prober is not None
            for repetition in range(options.steps + 2):  # the first two compile, and fill caches
                times = {"step": timed(lambda: train.train_step(run)), "sample": timed(lambda: prober.sample(run))}
                high, prober.gradients = prober.gradients, False
                times["without_gradients"] = timed(lambda: prober.sample(run))
                prober.gradients, run.prober = high, None
                times["off"] = timed(run.probe)
                run.prober = prober
                if repetition > 1:
                    for name, value in times.items():
                        seconds[name].append(value)
            micro = recipe.train.global_batch // recipe.train.micro_batch
    found = {name: statistics.median(values) for name, values in seconds.items()}
    tally = adamw()
    updates = (tally["tallied"] - tally["plain"]) * recipe.model.parameter_count() / ELEMENTS
    report(
        {
            "recipe": options.recipe,
            "micro_batches": micro,
            "step_s": found["step"],
            "sample_s": found["sample"],
            "overhead": found["sample"] / (options.every * found["step"]),
            "overhead_without_gradients": found["without_gradients"] / (options.every * found["step"]),
            "off_us": 1e6 * found["off"],
            "update_norm": tally["tallied"] / tally["plain"],
            "update_norm_share": updates / found["step"],
            "threads": torch.get_num_threads(),
        },
        options.json,
    )


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
