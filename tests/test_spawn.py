"""`run_ranks` of the multi-process tests: results in order, tracebacks of failed ranks, no hang."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.spawn import RankError, run_ranks


def _sum(rank: int, value: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([rank * value])
    dist.all_reduce(total)
    return rank, total


def _fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("planted")
    dist.barrier()


def _die_or_wait(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    time.sleep(60)


def _sleep(rank: int) -> None:
    time.sleep(60)


def test_results_come_back_in_rank_order() -> None:
    results = run_ranks(_sum, 2, 10)
    assert results == [(0, torch.tensor([10])), (1, torch.tensor([10]))]


def test_traceback_of_the_failed_rank_is_raised_here() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 ---.*ValueError: planted"):
        run_ranks(_fail_on_one, 2)


def test_a_dead_rank_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 ---\nthe process died"):
        run_ranks(_die_or_wait, 2)
    assert time.monotonic() - start < 40


def test_timeout() -> None:
    with pytest.raises(RankError, match="did not finish in time"):
        run_ranks(_sleep, 1, timeout=0.5)
