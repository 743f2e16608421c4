"""Validation loss: the mean cross-entropy over a fixed list of sequences, the same on any number of ranks.

The sequences are cut into units of one micro-batch. What is left over at the end becomes one unit a sequence, repeated
to fill the micro-batch (its mean is that sequence's loss), so that every forward has the shape that training compiled.
Units go round the data-parallel ranks; ranks that run out repeat a unit with weight 0, because with ZeRO 3 every
forward gathers weights and all ranks must take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from data.stream import Batch
from parallel.mesh import Mesh
from run.local import Local


class Samples(Protocol):
    """Sequences by index."""

    def batch(self, indices: Sequence[int]) -> Batch: ...


@dataclass(frozen=True)
class Replayed:
    """Samples from `first` on, numbered from 0."""

    stream: Samples
    first: int

    def batch(self, indices: Sequence[int]) -> Batch:
        return self.stream.batch([self.first + index for index in indices])


def _units(count: int, micro_batch: int) -> list[tuple[list[int], int]]:
    """(samples of one forward, weight) over samples 0 .. count - 1."""
    whole = count - count % micro_batch
    full = [(list(range(i, i + micro_batch)), micro_batch) for i in range(0, whole, micro_batch)]
    return full + [([i] * micro_batch, 1) for i in range(whole, count)]


def _share(units: list[tuple[list[int], int]], mesh: Mesh) -> Iterator[tuple[list[int], int]]:
    """This rank's units, as many on every rank."""
    for i in range(mesh.dp_rank, -(-len(units) // mesh.dp) * mesh.dp, mesh.dp):
        yield units[i] if i < len(units) else (units[0][0], 0)


@torch.no_grad()
def validation_loss(
    local: Local,
    stream: Samples,
    samples: int,
    micro_batch: int,
    mesh: Mesh,
    device: torch.device,
    beat: Callable[[], object] = lambda: None,
) -> float:
    """Mean cross-entropy [nats a token] of the first `samples` sequences of `stream`. Collective over the mesh.

    beat: called after every micro-batch: a validation may take longer than anything else, and is no hang
    """
    total = torch.zeros((), dtype=torch.float64)
    for part in local.parts:
        part.eval()
    try:
        for indices, weight in _share(_units(samples, micro_batch), mesh):
            batch = stream.batch(indices).to(device)
            if local.pipeline is not None:
                loss = local.pipeline.evaluate(batch)
            else:
                loss = local.engine(batch.tokens, batch.labels, batch.positions, batch.document_ids).cross_entropy
            if loss is not None and mesh.tp_rank == 0:
                total += weight * loss.double().cpu()
            beat()
    finally:
        for part in local.parts:
            part.train()
    total = total.to(device)
    dist.all_reduce(total)
    return float(total) / samples
