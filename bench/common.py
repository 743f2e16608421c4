"""What every bench shares: interleaved repetitions, a table, and one flat JSON object.

Repetitions of the variants alternate, so that a slow moment of the machine meets all of them; the
median is shown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.queues import Queue
from pathlib import Path

import torch
import torch.distributed as dist

Figures = dict[str, float | int | str]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Parser with the option that all benches have."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--json", metavar="FILE|-", help="also write one flat JSON object; - only that")
    return made


def interleaved(variants: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds of each function, called in turns; one call each before, not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions + 1):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def fastest(
    variants: Mapping[str, Callable[[], object]], repetitions: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Least seconds of each function, called in turns after one uncounted call each.

    On a GPU the time is the device's own, of a few calls in a row: what waits for the host between them counts.
    """
    clock = _device_seconds if torch.device(device).type == "cuda" else _seconds
    best = dict.fromkeys(variants, float("inf"))
    for repetition in range(repetitions + 1):
        for name, function in variants.items():
            taken = clock(function)
            if repetition:
                best[name] = min(best[name], taken)
    return best


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _device_seconds(function: Callable[[], object], calls: int = 5) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls / 1e3


def report(figures: Figures, json_target: str | None) -> None:
    """Print figures as a table, and write them as JSON to a file; or with "-" print the JSON
    alone."""
    if json_target == "-":
        print(json.dumps(figures))
        return
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {f'{value:,.4g}' if isinstance(value, float) else value}")
    if json_target:
        Path(json_target).write_text(json.dumps(figures) + "\n")


def on_ranks(
    measure: Callable[[int, argparse.Namespace], Figures], ranks: int, threads: int, options: argparse.Namespace
) -> Figures:
    """`measure(rank, options)` on so many gloo processes of so many threads; the figures of rank 0."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results: Queue[Figures] = context.Queue()
        meeting = f"file://{Path(folder) / 'rendezvous'}"
        arguments = (meeting, ranks, threads, measure, options, results)
        processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"ranks ended with {[process.exitcode for process in processes]}")
        return results.get()


def _rank(
    rank: int,
    meeting: str,
    ranks: int,
    threads: int,
    measure: Callable[[int, argparse.Namespace], Figures],
    options: argparse.Namespace,
    results: Queue[Figures],
) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    figures = measure(rank, options)
    if rank == 0:
        results.put(figures)
    dist.destroy_process_group()
