"""Run one function on several gloo ranks and bring back what each returned, or why one failed.

    def work(rank, value):                 # a top-level function of a test module: it is pickled by name
        total = torch.tensor([value * rank])
        dist.all_reduce(total)
        return total.item()

    assert run_ranks(work, 4, 10) == [60, 60, 60, 60]

Each rank is a process with one CPU thread and an initialised default process group. It is forked from a server that
has done nothing but import the project (`SERVED`): a fork of pytest would inherit OpenMP threads, and a process from
nothing would import for six seconds. The ranks meet at a file, not at a port, so parallel test runs cannot collide.
When a rank fails, the others would wait for it until their own timeout: the parent collects what arrives within
a short grace, kills its own processes and raises `RankError` with the traceback of every rank that reported one.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SERVED = multiprocessing.get_context("forkserver")
SERVED.set_forkserver_preload(["train"])
GRACE_S = 1.0  # how long the tracebacks of the other ranks may follow the first one


class RankError(AssertionError):
    """At least one rank raised, died or did not finish in time; the message holds their tracebacks."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` gloo ranks; return their results in rank order.

    `fn`, `args` and the results are pickled. `timeout` [s] bounds the whole call, process start included, and each
    collective. Raises RankError.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'rendezvous'}"
        pipes: dict[Connection, int] = {}
        processes = []
        for rank in range(world_size):
            receiver, sender = SERVED.Pipe(duplex=False)
            process = SERVED.Process(
                target=_rank_main,
                args=(sender, meeting, rank, world_size, timeout, fn, args),
                daemon=True,
            )
            process.start()
            sender.close()  # the child's copy is now the only one: its death is an end of file here
            pipes[receiver] = rank
            processes.append(process)
        try:
            results, failures = _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(0.0 if pipes else 10.0)  # an empty `pipes`: all are about to end
                if process.is_alive():
                    process.kill()
                    process.join()
    if failures:
        codes = [process.exitcode for process in processes]
        raise RankError(f"{fn.__name__} on {world_size} ranks, exit codes {codes}:\n\n" + "\n".join(failures))
    return [results[rank] for rank in range(world_size)]


def _collect(pipes: dict[Connection, int], deadline: float) -> tuple[dict[int, Any], list[str]]:
    """Results by rank and tracebacks in order of arrival; pipes that answered are removed from `pipes`."""
    results: dict[int, Any] = {}
    failures: list[str] = []
    while pipes:
        ready = wait(list(pipes), max(0.0, deadline - time.monotonic()))
        if not ready:
            if not failures:
                failures.append(f"ranks {sorted(pipes.values())} did not finish in time")
            return results, failures
        for pipe in ready:
            rank = pipes.pop(pipe)
            try:
                ok, payload = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ok, payload = False, "the process died without a traceback"
            if ok:
                results[rank] = payload
            else:
                failures.append(f"--- rank {rank} ---\n{payload}")
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return results, failures


def _rank_main(
    sender: Connection,
    meeting: str,
    rank: int,
    world_size: int,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as a launcher would; DeepSpeed insists on it
    try:
        dist.init_process_group(
            "gloo",
            init_method=meeting,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        # Plain pickle copies tensors; torch's reducers would share memory that dies with this process.
        message = pickle.dumps((True, fn(rank, *args)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(message)
    if dist.is_initialized():
        dist.destroy_process_group()
