"""Which ranks are slower than the others: a step is as slow as the slowest of them, and looks the same on all.

What differs is the time up to the end of a step's last backward: reading data, forwards, backwards. Afterwards every
rank waits for the slowest in the reduction of the gradients. Ranks of one tensor-parallel group or pipeline wait for
each other within that time, too, so a slow one shows together with its group. On CUDA the time is that between two
events of the stream, which costs no synchronisation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sections import WatchConfig


@dataclass(frozen=True)
class Report:
    """Mean seconds of each rank over `steps` steps, their median, and the slow ones: rank -> multiple of it."""

    steps: int
    seconds: list[float]
    median: float
    slow: dict[int, float]

    def describe(self, ranks_per_node: int) -> str:
        """One line for people; nodes are numbered as the ranks lie on them."""
        named = (f"{rank} (node {rank // ranks_per_node}) {ratio:.2f}x" for rank, ratio in self.slow.items())
        return f"stragglers over {self.steps} steps: rank {', '.join(named)} the median {self.median:.3f} s"


class Stragglers:
    """Times this rank's part of each step and compares the ranks from time to time."""

    def __init__(self, config: WatchConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self._last, self._sum, self._steps = 0.0, 0.0, -1  # the first step compiles

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around what a rank does before it waits for the others."""
        began = time.perf_counter()
        if self._events:
            self._events[0].record()
        yield
        if self._events:
            self._events[1].record()
        self._last = time.perf_counter() - began

    def step_done(self, step: int) -> Report | None:
        """When `step` is done on the device; every `straggler_every` steps the comparison, which is collective."""
        self._steps += 1
        if self._steps:
            self._sum += self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events else self._last
        every, ranks = self._config.straggler_every, dist.get_world_size()
        if not every or step % every or not self._steps or ranks == 1:
            return None
        mine = torch.tensor([self._sum / self._steps], dtype=torch.float64, device=self._device)
        everyone = torch.empty(ranks, dtype=torch.float64, device=self._device)
        dist.all_gather_single(everyone, mine)
        steps, self._sum, self._steps = self._steps, 0.0, 0
        seconds = everyone.tolist()
        median = sorted(seconds)[(ranks - 1) // 2]
        limit = self._config.straggler_factor * median
        slow = {rank: each / median for rank, each in enumerate(seconds) if each > limit}
        return Report(steps, seconds, median, slow)
