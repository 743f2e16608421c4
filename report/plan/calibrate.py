"""Measure this machine as a `Machine`: the rate of each kind of operation that a plan has, at the sizes that it has.

A CPU has no data sheet that a plan could use: the rate of a GEMM, of a pass over a tensor, of a quantizer depends on
size, cache and instructions. So each kind is run, alone, at up to SIZES of its sizes, on memory that has been touched,
into memory that has left the cache.
Ranks that share the machine measure at the same time, as they will train; then they measure their links. Seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from lowprec import dispatch
from lowprec.adamw import Hyper
from lowprec.codecs import UNIT, Extent
from lowprec.optim import OptimizerConfig
from lowprec.philox import RandomKey
from report.flops import cpu_name
from report.plan.costs import rate_name, rate_size
from report.plan.hardware import Machine
from report.plan.trace import Op
from report.plan.traffic import TRAVELS
from report.plan.units import Units
from run.environment import keep_memory

SIZES = 3
SECONDS = 0.04  # for each size of each kind
KEPT, MOST_KEPT = 1 << 26, 64  # bytes, and number, of an operation's last results that stay while it is measured
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.int64}
MEETINGS = 50
MESSAGES = (1 << 10, 1 << 18, 1 << 22)  # bytes
ELEMENTS = 1 << 20  # of the optimizer's fragment

Rates = dict[str, list[tuple[float, float]]]


def measure_cpu(traced: Iterable[Units], optimizer: OptimizerConfig, group: dist.ProcessGroup | None = None) -> Machine:
    """This machine, for plans made of these traces. Collective where a process group exists."""
    ops = [op for units in traced for op in _ops(units)]
    rates: Rates = {}
    with torch.no_grad():
        for name, chosen in _chosen(ops).items():
            rates[name] = [(rate_size(op), _rate(op)) for op in chosen]
        for name, pairs in _passes().items():
            rates.setdefault(name, []).extend(pairs)
        rates["update"] = [(ELEMENTS, _update_rate(optimizer))]
        threads, ranks = torch.get_num_threads(), dist.get_world_size(group) if dist.is_initialized() else 1
        cores = max(1, len(os.sched_getaffinity(0)) // threads)
        sharing = max(1.0, ranks / cores)  # what was measured by more ranks than cores is a share of a core's rate
        rates = {name: [(size, rate * sharing) for size, rate in pairs] for name, pairs in rates.items()}
        launch, latency, waiting = _launch() / sharing, 0.0, 0.0
        if ranks > 1:
            links, latency = _links(group, time.perf_counter if sharing == 1.0 else time.process_time)
            rates |= links
            waiting = _waiting(group, latency) if sharing == 1.0 else 0.0
    gemm = max((rate for name, pairs in rates.items() if name.startswith("gemm/") for _, rate in pairs), default=1e9)
    copy = max(rate for _, rate in rates["copy/4"])
    source = f"measured on {cpu_name()}, {threads} thread{'s' * (threads > 1)} a rank"
    return Machine(
        name="cpu",
        device=cpu_name(),
        peaks={"bf16": gemm, "fp32": gemm},
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        bandwidth=copy,
        intra=copy / 2,
        inter=copy / 2,
        latency=latency,
        waiting=waiting,
        launch=launch,
        attained_gemm=1.0,
        attained_memory=1.0,
        rates=rates,
        cores=cores,
        sources=dict.fromkeys(("peaks", "memory", "bandwidth", "intra", "attained_gemm", "attained_memory"), source),
    )


def _ops(units: Units) -> Iterable[Op]:
    for unit in {id(u): u for u in (units.first, *units.blocks, units.last)}.values():
        for phase in (unit.prepare, unit.forward, unit.backward, unit.weights):
            yield from phase.ops


def _chosen(ops: Iterable[Op]) -> dict[str, list[Op]]:
    """Of each kind the sizes that weigh most."""
    weights: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    examples: dict[tuple[str, float], Op] = {}
    for op in ops:
        if op.kind in TRAVELS or not op.writes:
            continue
        name, size = rate_name(op), rate_size(op)
        weights[name][size] += size
        examples.setdefault((name, size), op)
    return {
        name: [examples[name, size] for size in sorted(sizes, key=lambda s: -sizes[s])[:SIZES]]
        for name, sizes in weights.items()
    }


def _rate(op: Op) -> float:
    """Of the operation as a step has it: its results go to memory that no cache holds, for they are kept."""
    run, written = _runner(op), sum(count for _, count in op.writes)
    kept: deque[object] = deque(maxlen=min(max(KEPT // written, 1), MOST_KEPT))
    for _ in range(kept.maxlen or 0):
        kept.append(run())
    return rate_size(op) / seconds_of(lambda: kept.append(run()))


def seconds_of(run: Callable[[], object]) -> float:
    """The mean, as a step has slow ones too, of the calls that fit into SECONDS, at least three after one."""
    run()
    found, end = [], time.perf_counter() + SECONDS
    while len(found) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.mean(found)


def _values(*shape: int, width: int) -> Tensor:
    return torch.randn(*shape).to(DTYPES[width])


def _runner(op: Op) -> Callable[[], object]:
    """What does the same as the operation, on numbers of its size."""
    if op.spec is not None:
        return _quantization(op)
    if op.kind == "gemm":
        batch, m, k, n = op.shape
        a, b = _values(batch, m, k, width=op.width), _values(batch, n, k, width=op.width)
        return (lambda: a[0] @ b[0].T) if batch == 1 else (lambda: a @ b.mT)
    if op.kind.startswith("attention"):
        return _attention(op)
    return _pass(op.kind, op.width, op.nbytes)


def _attention(op: Op) -> Callable[[], object]:
    batch, heads, kv_heads, length, size = op.shape
    q, k, v = (_values(batch, n, length, size, width=op.width) for n in (heads, kv_heads, kv_heads))
    if not op.kind.endswith("backward"):
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    y, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return lambda: backward(y, q, k, v, y, log_sums, 0.0, True)


def _quantization(op: Op) -> Callable[[], object]:
    assert op.spec is not None
    spec, axis, key = op.spec, op.axis, RandomKey(seed=0, tensor="calibration")
    numbers = max(op.nbytes // 4, 1 << 14)  # about: of BF16 in and out
    columns = 256
    x = _values(max(numbers // columns // 128, 1) * 128, columns, width=2)
    scale = torch.ones(()) if spec.amax_history else None
    packed = dispatch.save(x, spec, axis, key, scale)
    dtype = torch.bfloat16 if spec.exact_in_bf16 else torch.float32
    if op.kind == "decode":
        return lambda: dispatch.decode(packed, dtype, torch.bfloat16)
    if op.packed == sum(count for _, count in op.writes):
        return lambda: dispatch.save(x, spec, axis, key, scale)
    return lambda: dispatch.operand(x, spec, axis, key, scale, dtype)


def _pass(kind: str, width: int, nbytes: int) -> Callable[[], object]:
    """One pass over tensors that moves about so many bytes."""
    if kind == "reduction":
        x = _values(max(nbytes // width // 256, 1), 256, width=width)
        return lambda: x.sum(-1)
    if kind == "gather":
        table, rows = _values(8192, 256, width=max(width, 2)), max(nbytes // (2 * 256 * max(width, 2)), 1)
        index = torch.randint(8192, (rows,))
        return lambda: F.embedding(index, table)
    if kind == "copy":
        x = _values(max(nbytes // (2 * width), 1), width=width)
        return lambda: x.clone()
    x = _values(max(nbytes // ((2 if kind == "transcendental" else 3) * width), 1), width=width)
    if kind == "transcendental":
        return (lambda: F.silu(x)) if width == 2 else (lambda: x.exp())
    y = x.clone()
    return lambda: x * y


def _passes() -> Rates:
    """Passes over large tensors that the engine makes, in bytes/s."""
    sizes, found = (1 << 20, 1 << 25), Rates()
    for name in ("pointwise/4", "copy/4", "copy/2"):
        kind, width = name.split("/")
        found[name] = [(size, size / seconds_of(_pass(kind, int(width), size))) for size in sizes]
    x = torch.randn(1 << 20)
    found["norm"] = [(x.nbytes, x.nbytes / seconds_of(lambda: torch.linalg.vector_norm(x, dtype=torch.float64)))]
    return found


def _update_rate(config: OptimizerConfig) -> float:
    """Elements a second of the optimizer's update, and of writing the working weights."""
    update, extent = config.storage, Extent((ELEMENTS // UNIT, UNIT), 0, ELEMENTS)
    dtype = {"fp32": torch.float32, "fp16_scaled": torch.float16}.get(config.master, torch.bfloat16)
    master, working = torch.randn(ELEMENTS).to(dtype), torch.empty(ELEMENTS, dtype=torch.bfloat16)
    tensors = {"weight": master} | update.allocate(extent, master)
    grad, key = torch.randn(ELEMENTS), RandomKey(seed=0, tensor="calibration", step=1)
    hyper = Hyper(lr=1e-4, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, step=1)

    def run() -> None:
        if (sums := update.sums(extent, grad, hyper)) is not None:
            update.advance(extent, tensors, sums, hyper)
        statistics = update.statistics(extent, tensors, grad, hyper)
        update.apply(extent, tensors, grad, hyper, statistics, key, update.measured)
        if config.master != "none":
            update.write_working(tensors, working)

    return ELEMENTS / seconds_of(run)


@torch.enable_grad()
def _launch() -> float:
    """Seconds of an operation on next to nothing, its part in autograd included."""
    x = torch.ones(8, requires_grad=True)
    return seconds_of(lambda: ((x * x) * (x * x)).sum().backward()) / 12


def _links(group: dist.ProcessGroup | None, clock: Callable[[], float]) -> tuple[Rates, float]:
    """Bytes sent a second by kind of collective, and the latency of one. The same on all ranks: the slowest counts.

    clock:  of the process where ranks share cores: while one waits, another computes
    """
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    found: Rates = {}
    latency = 0.0
    for nbytes in MESSAGES:
        x = torch.zeros(nbytes // 4 // n * n)
        whole, part = x.new_empty(x.numel() * n), x.new_empty(x.numel() // n)
        to, of = (rank + 1) % n, (rank - 1) % n

        y = x.clone()

        def pass_on(x: Tensor = x, y: Tensor = y, to: int = to, of: int = of) -> None:
            works = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, to), dist.P2POp(dist.irecv, y, of)])
            for work in works:
                work.wait()

        runs: Mapping[str, tuple[Callable[[], object], float]] = {
            "all_reduce": (lambda x=x: dist.all_reduce(x, group=group), 2 * (n - 1) / n),
            "all_gather": (lambda x=x, whole=whole: dist.all_gather_single(whole, x, group=group), n - 1),
            "reduce_scatter": (lambda x=x, part=part: dist.reduce_scatter_single(part, x, group=group), (n - 1) / n),
            "all_to_all": (lambda x=x: dist.all_to_all_single(x.clone(), x, group=group), (n - 1) / n),
            "send": (pass_on, 1.0),
        }
        for kind, (run, share) in runs.items():
            seconds = _slowest(_seconds_together(run, group, clock), group)
            if nbytes == MESSAGES[0]:
                latency = seconds if kind == "all_reduce" else latency
            else:
                found.setdefault(kind, []).append((x.nbytes, x.nbytes * share / max(seconds - latency, 1e-6)))
    return found, latency


def _seconds_together(
    run: Callable[[], object], group: dist.ProcessGroup | None, clock: Callable[[], float], calls: int = 5
) -> float:
    found = []
    for _ in range(calls):
        dist.barrier(group)
        start = clock()
        run()
        found.append(clock() - start)
    return sorted(found)[calls // 2]


def _waiting(group: dist.ProcessGroup | None, latency: float) -> float:
    """Seconds that ranks wait for each other for each second of work, if they meet every few milliseconds."""
    x, met, worked = torch.randn(512, 512), torch.zeros(8), 0.0
    dist.barrier(group)
    begin = time.perf_counter()
    for _ in range(MEETINGS):
        start = time.perf_counter()
        x.mm(x).add_(x.mm(x))
        worked += time.perf_counter() - start
        dist.all_reduce(met, group=group)
    sums = torch.tensor([worked, time.perf_counter() - begin - MEETINGS * latency])
    dist.all_reduce(sums, group=group)
    return max(0.0, float(sums[1] / sums[0]) - 1.0)


def _slowest(seconds: float, group: dist.ProcessGroup | None) -> float:
    value = torch.tensor(seconds)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return float(value)


def measure_together(units: Units, optimizer: OptimizerConfig, ranks: int) -> Machine:
    """`measure_cpu` on so many processes at once, one thread each, or on one with all threads."""
    if ranks == 1:
        return measure_cpu([units], optimizer)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'rendezvous'}"
        results: Any = context.Queue()
        arguments = (meeting, ranks, units, optimizer, results)
        processes = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise UserError(f"measuring this machine with {ranks} processes failed; their messages are above")
        return results.get()


def _rank(rank: int, meeting: str, ranks: int, units: Units, optimizer: OptimizerConfig, results: Any) -> None:
    keep_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    machine = measure_cpu([units], optimizer)
    if rank == 0:
        results.put(machine)
    dist.barrier()
    dist.destroy_process_group()


def together(machines: Sequence[Machine]) -> Machine:
    """Several measurements of one machine as one: the median of each rate."""
    first = machines[0]
    rates = {
        name: [(size, statistics.median(m.rates[name][i][1] for m in machines)) for i, (size, _) in enumerate(pairs)]
        for name, pairs in first.rates.items()
    }
    numbers = ("bandwidth", "intra", "inter", "latency", "waiting", "launch")
    medians = {name: statistics.median(getattr(m, name) for m in machines) for name in numbers}
    peaks = {name: statistics.median(m.peaks[name] for m in machines) for name in first.peaks}
    return replace(first, rates=rates, peaks=peaks, **medians)
