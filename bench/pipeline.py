"""Bubble of every pipeline schedule: measured, and simulated from the measured times of its stages.

Two ranks of one thread train one model under each schedule in turns. Timers around each stage's forward, backward and
weight gradients give its times; what a rank does not spend in them, of the step's time without the optimizer, is its
bubble (waiting for the other rank, sending and receiving). The simulator gets the median times of the stages.

    NAME_step_ms, NAME_bubble              measured
    NAME_simulated_ms, NAME_simulated_bubble
    NAME_formula                           (p - 1) / (v m + p - 1) of equal stages, v stages a rank, m micro-batches;
                                           0 for zbv and dualpipev

    python -m bench.pipeline [--recipe NAME] [--steps N] [section.key=value ...] [--json FILE|-]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import train
from bench.common import Figures, on_ranks, parser, report
from data.stream import Batch
from parallel.bubble import Times, bubble, simulate
from parallel.mesh import SPLIT_BACKWARD, V_SHAPED, build_mesh
from parallel.pipeline import SCHEDULES, Pipeline
from recipe import Recipe, load
from run.local import build_local, initial_weights

RANKS = 2
METHODS = {"F": "forward_one_chunk", "B": "backward_one_chunk", "W": "backward_weight_one_chunk"}


class Timers:
    """Seconds of each stage's work, by kind: F forward; B all of the backward; I its input's part, W its weights'."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
        for stage in pipeline.stages:
            for kind, name in METHODS.items():
                setattr(stage, name, self._timed(getattr(stage, name), stage.stage_index, kind))

    def _timed(self, function: Callable[..., Any], stage: int, kind: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                part = "I" if kind == "B" and not kwargs.get("full_backward", True) else kind
                self.seconds[stage, part].append(time.perf_counter() - start)

        return timed

    @property
    def busy(self) -> float:
        return sum(map(sum, self.seconds.values()))

    def medians(self) -> dict[int, Times]:
        """Of each stage. A backward that is never split counts as its input's part."""
        found = {key: statistics.median(seconds) for key, seconds in self.seconds.items()}
        stages = {stage for stage, _ in found}
        return {s: Times(found[s, "F"], found.get((s, "I")) or found[s, "B"], found.get((s, "W"), 0.0)) for s in stages}


def measure(rank: int, options: argparse.Namespace) -> Figures:
    figures: Figures = {"ranks": RANKS, "threads": 1}
    for name in SCHEDULES:
        overrides = (*options.overrides, f"parallel.pp={RANKS}", f"parallel.schedule={name}", "zero.stage=0")
        recipe = load(options.recipe, (*overrides, "train.compile=false"), RANKS)
        for key, value in _measure(recipe, options.steps).items():
            figures[f"{name}_{key}"] = value
    return figures


def _measure(recipe: Recipe, steps: int) -> Figures:
    mesh, sizes = build_mesh(recipe.parallel), recipe.train
    local = build_local(recipe, mesh, torch.device("cpu"), torch.float32)
    local.engine.fill_weights(initial_weights(recipe))
    assert local.pipeline is not None
    timers, walls, micro_batches = Timers(local.pipeline), [], sizes.global_batch // sizes.micro_batch
    busy = 0.0
    for step in range(steps + 1):
        tokens = torch.randint(recipe.model.vocab_size, (sizes.global_batch, sizes.seq_len + 1))
        batches = [Batch(rows[:, :-1], rows[:, 1:], None, None) for rows in tokens.split(sizes.micro_batch)]
        local.precision.begin_step(step)
        dist.barrier()
        start = time.perf_counter()
        local.pipeline.step((i * sizes.micro_batch * sizes.seq_len, batch) for i, batch in enumerate(batches))
        dist.barrier()
        walls.append(time.perf_counter() - start)
        local.engine.step(1e-4)
        if step == 0:  # the first one starts connections and caches
            walls.clear()
            timers.seconds.clear()
        busy = timers.busy
    return _compare(recipe, micro_batches, walls, busy, timers)


def _compare(recipe: Recipe, micro_batches: int, walls: list[float], busy: float, timers: Timers) -> Figures:
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, (busy, timers.medians()))
    medians = {stage: times for _, found in everyone for stage, times in found.items()}
    times = [medians[stage] for stage in range(recipe.parallel.stages)]
    virtual = recipe.parallel.stages // RANKS
    ideal = (RANKS - 1) / (virtual * micro_batches + RANKS - 1)
    return {
        "step_ms": 1e3 * statistics.median(walls),
        "simulated_ms": 1e3 * simulate(recipe.parallel, micro_batches, times),
        "bubble": 1.0 - sum(each for each, _ in everyone) / (RANKS * sum(walls)),
        "simulated_bubble": bubble(recipe.parallel, micro_batches, times),
        "formula": 0.0 if recipe.parallel.schedule in V_SHAPED else ideal,
        "split_backward": int(recipe.parallel.schedule in SPLIT_BACKWARD),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--recipe", default="bf16_10m")
    made.add_argument("--steps", type=int, default=5)
    made.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = made.parse_args()
    train.read_launch()  # sets what DeepSpeed insists on
    report(on_ranks(measure, RANKS, 1, options), options.json)


if __name__ == "__main__":
    main()
