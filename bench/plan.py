"""Plans against runs on this machine: bytes and seconds of a step that were predicted, over those that were measured.

Every layout is planned as `train.py --plan --gpu cpu` does, with rates that as many processes measure together, before
the run and after it, and trained by the code of a run (run/local.py, the engine, the pipeline), in eager mode, on one
thread a rank. Bytes are the most that live tensors hold during a step: a dispatch mode sees every operation, notes the
storages that it makes and, through weak references, when they die; a storage counts once. On one rank the CPU
allocator's own records (torch.profiler) are a second witness. Seconds are the median of the steps after the first two,
without either, of the half of them in which other processes had least of the machine; they want a machine with nothing
else to do.

    LAYOUT_bytes, LAYOUT_seconds                predicted over measured
    LAYOUT_mib, LAYOUT_step_ms                  measured
    LAYOUT_planned_mib, LAYOUT_planned_ms       predicted; LAYOUT_planned_PART_ms: of the step's parts
    LAYOUT_others                               share of the machine that others had meanwhile
    LAYOUT_allocator_mib                        measured by the allocator (one rank only)
    within                                      whether all bytes are within 10 % and all seconds within 25 %

    python -m bench.plan [--only bytes] [--layouts NAME ...] [--steps N] [--json FILE|-]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from bench.common import Figures, on_ranks, parser, report
from data.stream import Batch
from parallel.mesh import build_mesh
from recipe import Recipe, load
from report.flops import faster_gemm
from report.plan.calibrate import measure_cpu, together
from report.plan.hardware import Machine
from report.plan.plan import Planner
from run.environment import keep_memory
from run.local import DTYPES, Local, build_local, initial_weights

CPU = torch.device("cpu")
UNMEASURED = Machine(  # enough for bytes
    name="cpu", device="cpu", peaks={"bf16": 1.0}, memory=1e12, bandwidth=1.0, intra=1.0, cores=1,
    rates={"update": [(1.0, 1.0)]},
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A recipe on so many ranks."""

    recipe: str
    ranks: int
    overrides: tuple[str, ...] = ()


BYTES_WITHIN, SECONDS_WITHIN = 0.10, 0.25
TP, PP, BATCH, MICRO = "parallel.tp=2", "parallel.pp=2", "train.global_batch=8", "train.micro_batch=2"
LAYOUTS = {
    "recompute": Case("nvfp4_10m", 1, (BATCH, "train.micro_batch=4", "model.recompute=full")),
    "dp2_zero1": Case("mxfp8_10m", 2, (BATCH, MICRO, "zero.stage=1")),
    "dp2_zero2": Case("bf16_10m", 2, (BATCH, MICRO, "zero.stage=2")),
    "tp2_sp": Case("nvfp4_10m", 2, (BATCH, "train.micro_batch=4", TP, "parallel.sp=true")),
    "pp2": Case("bf16_10m", 2, (BATCH, MICRO, PP)),
    "tp2_pp2_lean": Case("nvfp4_lean_10m", 4, (BATCH, MICRO, TP, PP, "model.hidden_size=512", "model.ffn_size=1024")),
}
COLUMNS = ("planned_mib", "mib", "bytes", "planned_ms", "step_ms", "seconds", "others")


class Storages(TorchDispatchMode):
    """Bytes of storages that operations have made since it was entered, and that are alive; their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self._hold(leaf.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@dataclass(frozen=True)
class Usage:
    """CPU seconds so far: of the whole machine, busy and at all; of the ranks here together. Linux, collective."""

    busy: float
    total: float
    own: float

    @classmethod
    def now(cls) -> Usage:
        own = torch.tensor(time.process_time(), dtype=torch.float64)
        dist.all_reduce(own)
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        second = os.sysconf("SC_CLK_TCK")
        return cls((sum(ticks) - ticks[3] - ticks[4]) / second, sum(ticks) / second, float(own))

    def others(self, before: Usage) -> float:
        """Share of the machine that other processes have had since; the same on all ranks, which rank 0 decides."""
        used = self.busy - before.busy - (self.own - before.own)
        share = torch.tensor(max(0.0, used / (self.total - before.total)))
        dist.broadcast(share, src=0)
        return float(share)


class Rehearsal:
    """The step of a run, on random tokens."""

    def __init__(self, recipe: Recipe, gemm_dtype: torch.dtype) -> None:
        self.recipe, self.mesh = recipe, build_mesh(recipe.parallel)
        self.local: Local = build_local(recipe, self.mesh, CPU, gemm_dtype)
        self.local.engine.fill_weights(initial_weights(recipe))

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        sizes = self.recipe.train
        tokens = torch.randint(self.recipe.model.vocab_size, (sizes.global_batch // self.mesh.dp, sizes.seq_len + 1))
        for i, rows in enumerate(tokens.split(sizes.micro_batch)):
            yield i * sizes.micro_batch * sizes.seq_len, Batch(rows[:, :-1], rows[:, 1:], None, None)

    def step(self, step: int) -> float:
        """Seconds of one step."""
        local, batches = self.local, list(self._batches())
        dist.barrier()
        start = time.perf_counter()
        local.precision.begin_step(step)
        if local.pipeline is not None:
            local.pipeline.step(iter(batches))
        else:
            for row, batch in batches:
                local.precision.at(row)
                local.engine.backward(local.engine(batch.tokens, batch.labels, None, None).loss)
        local.engine.step(1e-4)
        local.precision.end_step(self.mesh.stage_group)
        dist.barrier()
        return time.perf_counter() - start


def measure(rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """One layout on the ranks of the default group: a run's bytes, then its seconds."""
    keep_memory()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # as train.py
    case: Case = options.case
    recipe: Recipe = options.recipe_of_case
    tracker = Storages()
    with tracker:
        run = Rehearsal(recipe, options.gemm_dtype)
        run.step(0)
        tracker.peak = tracker.live
        run.step(1)
    everyone: list[Any] = [None] * case.ranks
    dist.all_gather_object(everyone, tracker.peak)
    found: dict[str, Any] = {"peak": max(everyone)}
    if case.ranks == 1:
        found["allocated"] = _allocated(recipe, options.gemm_dtype)
    return found if options.only == "bytes" else found | _timed(run, options)


def _timed(run: Rehearsal, options: argparse.Namespace) -> dict[str, Any]:
    rounds: list[tuple[float, float]] = []  # share of the machine that others had; seconds
    for step in range(options.steps):
        began = Usage.now()
        seconds = run.step(2 + step)
        rounds.append((Usage.now().others(began), seconds))
    calm = sorted(rounds)[: max(options.steps // 2, 1)]
    return {"took": statistics.median(seconds for _, seconds in calm), "others": calm[-1][0]}


def machine_of(rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """The machine as so many ranks see it, in processes of their own: measuring leaves the heap as no step does."""
    keep_memory()
    measured = [measure_cpu([options.units], options.recipe_of_case.optimizer) for _ in range(2)]
    return {"machine": together(measured)}


def compare(case: Case, options: argparse.Namespace) -> Figures:
    """What was planned over what was measured."""
    recipe = load(case.recipe, (*case.overrides, "train.compile=false"), case.ranks)
    gemm_dtype = faster_gemm(DTYPES[recipe.model.dtype], CPU)
    planner = Planner(recipe, UNMEASURED, case.ranks, gemm_dtype)
    options.case, options.recipe_of_case, options.gemm_dtype = case, recipe, gemm_dtype
    options.units = planner.units(recipe, ())
    measured: list[Any] = []
    if options.only != "bytes":
        measured.append(on_ranks(machine_of, case.ranks, 1, options)["machine"])
    found: dict[str, Any] = on_ranks(measure, case.ranks, 1, options)
    if measured:
        measured.append(on_ranks(machine_of, case.ranks, 1, options)["machine"])
        planner.machine = together(measured)
    plan = planner.in_bytes(recipe, case.ranks)
    figures: Figures = {
        "bytes": plan.fullest.peak / found["peak"],
        "mib": found["peak"] / 2**20,
        "planned_mib": plan.fullest.peak / 2**20,
    }
    if "allocated" in found:
        figures["allocator_mib"] = found["allocated"] / 2**20
    if options.only == "bytes":
        return figures
    step = planner.timed(plan).step
    figures |= {"seconds": step.seconds / found["took"], "step_ms": 1e3 * found["took"], "others": found["others"]}
    figures["planned_ms"] = 1e3 * step.seconds
    return figures | {f"planned_{name.replace(' ', '_')}_ms": 1e3 * s for name, s in step.parts.items()}


def _allocated(recipe: Recipe, gemm_dtype: torch.dtype) -> int:
    """The same peak from the allocator's records of a run from its beginning."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run = Rehearsal(recipe, gemm_dtype)
        run.step(0)
        begin = time.time_ns()
        run.step(1)
    live = peak = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    records: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for record in sorted(records, key=lambda e: e.start_ns()):
        live += record.nbytes()
        if record.start_ns() >= begin:
            peak = max(peak, live)
    return peak


def line(name: str, cells: Iterable[str]) -> None:
    """One line of the table, at once: a layout takes a while."""
    print(f"{name:<16}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def within(found: Mapping[str, Figures]) -> bool:
    """Whether every plan is as near to its run as is claimed."""
    limits = {"bytes": BYTES_WITHIN, "seconds": SECONDS_WITHIN}
    shares = [
        (float(figures[key]), limit) for figures in found.values() for key, limit in limits.items() if key in figures
    ]
    return all(abs(share - 1) <= limit for share, limit in shares)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME")
    made.add_argument("--steps", type=int, default=6, help="that are timed (%(default)s)")
    made.add_argument("--only", choices=["bytes"], help="what a busy machine does not change")
    options = made.parse_args()
    if options.steps < 1:
        made.error(f"--steps is {options.steps}; it must be at least 1")
    train.read_launch()  # sets what DeepSpeed insists on
    alone = options.json == "-"
    if not alone:
        line("layout", COLUMNS)
    found: dict[str, Figures] = {}
    for name in options.layouts:
        found[name] = compare(LAYOUTS[name], options)
        if not alone:
            line(name, (f"{found[name][column]:,.3f}" if column in found[name] else "" for column in COLUMNS))
    figures: Figures = {f"{name}_{key}": value for name, each in found.items() for key, value in each.items()}
    report(figures | {"within": int(within(found))}, options.json)


if __name__ == "__main__":
    main()
