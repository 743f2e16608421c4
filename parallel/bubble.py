"""How long a pipeline schedule takes, and how much of it ranks wait: simulated from the times of its stages."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from parallel.mesh import SINGLE, ParallelConfig, Schedule
from parallel.pipeline import SCHEDULES, rank_of, stages_of

Work = tuple[str, int, int]  # F, B (all of the backward), I (of the input) or W (of the weights); stage; micro-batch


@dataclass(frozen=True)
class Times:
    """Seconds of one stage for one micro-batch: forward, backward of the input, backward of the weights."""

    forward: float
    backward_input: float
    backward_weight: float


def simulate(config: ParallelConfig, micro_batches: int, times: Sequence[Times], transfer: float = 0.0) -> float:
    """Seconds of one step under a schedule, from the times of each stage.

    transfer: seconds that a tensor travels between two ranks. The order of every rank's work is that of torch's
    schedules; a rank works on one thing at a time and starts the next as soon as its input is there.
    """
    orders = work_orders(config.schedule, config.pp, config.stages, micro_batches)
    homes = [rank_of(stage, config) for stage in range(config.stages)]
    done: dict[Work, float] = {}
    clocks, at = dict.fromkeys(orders, 0.0), dict.fromkeys(orders, 0)
    while any(at[rank] < len(orders[rank]) for rank in orders):
        moved = False
        for rank, order in orders.items():
            while at[rank] < len(order):
                kind, stage, batch = order[at[rank]]
                start = _ready(kind, stage, batch, homes, done, transfer)
                if start is None:
                    break
                clocks[rank] = max(clocks[rank], start) + _duration(kind, times[stage])
                done[kind, stage, batch] = clocks[rank]
                at[rank], moved = at[rank] + 1, True
        assert moved, "the schedule waits for itself"
    return max(clocks.values())


def bubble(config: ParallelConfig, micro_batches: int, times: Sequence[Times], transfer: float = 0.0) -> float:
    """Share of the ranks' time in a step in which they have nothing to do."""
    total = simulate(config, micro_batches, times, transfer)
    work = micro_batches * sum(time.forward + time.backward_input + time.backward_weight for time in times)
    return 1.0 - work / (config.pp * total)


def _duration(kind: str, times: Times) -> float:
    parts = {"F": times.forward, "I": times.backward_input, "W": times.backward_weight}
    return parts["I"] + parts["W"] if kind == "B" else parts[kind]


def _ready(
    kind: str, stage: int, batch: int, homes: Sequence[int], done: Mapping[Work, float], transfer: float
) -> float | None:
    """When the input of a piece of work is there; None: not yet known. homes: the rank of each stage."""
    if kind == "W":
        return done.get(("I", stage, batch))
    if kind == "F":
        sources, neighbour = [("F", stage - 1, batch)], stage - 1
        if stage == 0:
            return 0.0
    else:
        neighbour = stage + 1
        sources = [("B", neighbour, batch), ("I", neighbour, batch)]
        if stage == len(homes) - 1:
            sources, neighbour = [("F", stage, batch)], stage
    found = next((done[source] for source in sources if source in done), None)
    if found is None:
        return None
    return found + (transfer if homes[neighbour] != homes[stage] else 0.0)


@functools.cache
def work_orders(schedule: Schedule, pp: int, stages: int, micro_batches: int) -> dict[int, list[Work]]:
    """Each pipeline rank's work in the order of torch's schedules."""
    if schedule in SINGLE:
        return {rank: _single_order(schedule, rank, pp, micro_batches) for rank in range(pp)}
    config = ParallelConfig(pp=pp, schedule=schedule, stages_per_rank=stages // pp)
    fakes: list[Any] = [_Fake(index, stages, pp) for index in stages_of(0, config)]
    planned = SCHEDULES[schedule](fakes, micro_batches, loss_fn=lambda y, _: y).pipeline_order
    found: dict[int, list[Work]] = {rank: [] for rank in planned}
    for rank, actions in planned.items():
        for action in (action for action in actions if action is not None):
            for each in action.sub_actions or (action,):
                if (kind := each.computation_type.value) in "FBIW":
                    found[rank].append((kind, each.stage_index, each.microbatch_index))
    return found


def _single_order(schedule: Schedule, rank: int, pp: int, micro_batches: int) -> list[Work]:
    """gpipe: all forwards, then all backwards; 1f1b: as few forwards ahead as the later stages need."""
    ahead = micro_batches if schedule == "gpipe" else min(micro_batches, pp - rank)
    order = [("F", rank, batch) for batch in range(ahead)]
    for batch in range(micro_batches):
        order.append(("B", rank, batch))
        if ahead + batch < micro_batches:
            order.append(("F", rank, ahead + batch))
    return order


class _Fake:
    """What a schedule asks of a stage when it only plans, on pipeline rank 0."""

    def __init__(self, index: int, stages: int, pp: int) -> None:
        self.stage_index, self.num_stages, self.group_rank, self.group_size = index, stages, 0, pp
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.submod, self.device, self.dw_builder, self.has_backward = nn.Identity(), torch.device("cpu"), None, True
        self.stage_index_to_group_rank: dict[int, int] = {}
