"""Pipeline parallelism: which blocks a stage has, which stages a rank has, and their schedule (torch's).

    stages  0 .. n - 1 hold consecutive blocks; stage 0 also the embedding, the last one norm, logits and loss
    ranks   stage s is on pipeline rank s mod pp; V-shaped schedules go back: stage 2 pp - 1 - s beside stage s

The loss of a micro-batch is divided by their number, so that gradients need no scaling afterwards (a parameter that two
stages of one rank share would be scaled twice). Shapes between stages are given, not inferred: torch would infer them
with a forward and a backward on garbage, which would enter amax histories and queues. Every rank loads every
micro-batch of its data-parallel rank: positions and document borders are needed in all stages.

Schedules with a split backward compute dx first and weight gradients later. `PipelineStage(dw_builder=...)` is torch's
public seam: linears queue their weight gradients (lowprec.linear.Shared.deferred), and the runner drains the queue of
one micro-batch into the gradients' accumulator. Each GEMM runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from parallel.mesh import SINGLE, SPLIT_BACKWARD, V_SHAPED, Mesh, ParallelConfig

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


def balance(costs: Sequence[float], stages: int, ends: tuple[float, float] = (0, 0)) -> tuple[int, ...]:
    """Blocks of each stage, such that the slowest one is as fast as can be, then the next slowest.

    costs: of each block, in order; ends: what the embedding costs the first stage, and norm, logits and loss the last
    one, in the same unit. Of equally good splits it takes the one with more blocks in earlier stages.
    """
    blocks = len(costs)
    assert 1 <= stages <= blocks, (blocks, stages)
    before = [0, *accumulate(costs)]
    # Blocks so far -> the best split of them into the stages so far: (loads, slowest first; minus counts).
    best: dict[int, tuple[list[float], tuple[int, ...]]] = {0: ([], ())}
    for stage in range(stages):
        extra = ends[0] * (stage == 0) + ends[1] * (stage == stages - 1)
        best = {
            end: min(
                (sorted([*loads, before[end] - before[begin] + extra], reverse=True), (*counts, begin - end))
                for begin, (loads, counts) in best.items()
                if begin < end
            )
            for end in range(stage + 1, blocks - (stages - 1 - stage) + 1)
        }
    return tuple(-count for count in best[blocks][1])


def stages_of(rank: int, config: ParallelConfig) -> tuple[int, ...]:
    """The stages of pipeline rank `rank`, in ascending order."""
    if config.pp > 1 and config.schedule in V_SHAPED:
        return rank, 2 * config.pp - 1 - rank
    return tuple(range(rank, config.stages, config.pp))


def rank_of(stage: int, config: ParallelConfig) -> int:
    """The pipeline rank that has a stage."""
    return next(rank for rank in range(config.pp) if stage in stages_of(rank, config))


def stage_range(stage: int, counts: Sequence[int]) -> range:
    """The blocks of a stage."""
    first = sum(counts[:stage])
    return range(first, first + counts[stage])


class MicroBatch(Protocol):
    """What the first, the last and all stages need: tokens, labels [B, S]; positions, document_ids [B, S] or None."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor | None: ...
    @property
    def document_ids(self) -> Tensor | None: ...


class Hidden(NamedTuple):
    """What travels between stages. sequence: positions a rank has (a share of them with sequence parallelism)."""

    micro_batch: int
    sequence: int
    size: int
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty(self.micro_batch, self.sequence, self.size, dtype=self.dtype, device=self.device)


class _Module(nn.Module):
    """A stage as the schedule calls it: says where its tokens are before it runs."""

    def __init__(self, part: nn.Module, at: Callable[[int], None]) -> None:
        super().__init__()
        self.part, self._at = part, at

    def forward(self, x: Tensor, *, row: Tensor, positions: Tensor, document_ids: Tensor | None = None) -> Tensor:
        self._at(int(row[0]))
        return self.part(x, None, positions, document_ids)


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What the pipeline needs of the run.

    at:    the next micro-batch starts at this global row
    queue: where linears put their deferred weight gradients: (parameter, what computes it); None: nowhere
    add:   accumulate a weight gradient
    """

    at: Callable[[int], None]
    queue: list[tuple[nn.Parameter, Callable[[], Tensor]]] | None
    add: Callable[[nn.Parameter, Tensor], None]


class Pipeline:
    """This rank's stages under one schedule. `parts`: their modules, in the order of `stages_of`."""

    def __init__(
        self,
        config: ParallelConfig,
        mesh: Mesh,
        parts: Sequence[Any],
        hidden: Hidden,
        micro_batches: int,
        callbacks: Callbacks,
    ) -> None:
        self.config, self.mesh, self.hidden, self.micro_batches = config, mesh, hidden, micro_batches
        self._callbacks = callbacks
        self._parts = dict(zip(stages_of(mesh.pp_rank, config), parts, strict=True))
        self._cross_entropies: list[Tensor] = []
        self.stages = [self._stage(index, part) for index, part in self._parts.items()]
        self._schedule = SCHEDULES[config.schedule](
            self.stages[0] if config.schedule in SINGLE else self.stages,
            micro_batches,
            loss_fn=self._loss,
            scale_grads=False,
        )

    @property
    def first(self) -> bool:
        """Whether this rank has the first stage."""
        return 0 in self._parts

    @property
    def last(self) -> bool:
        """Whether this rank has the last stage, and so the loss."""
        return self.config.stages - 1 in self._parts

    def step(self, batches: Iterator[tuple[int, MicroBatch]]) -> list[Tensor]:
        """Forward and backward of all micro-batches, (global row, batch); the cross-entropies on the last stage."""
        rows, given = zip(*batches, strict=True)
        keywords = _keywords(rows, given)
        arguments = (torch.cat([batch.tokens for batch in given]),) if self.first else ()
        target = torch.cat([batch.labels for batch in given]) if self.last else None
        self._cross_entropies = []
        self._schedule.step(*arguments, target=target, return_outputs=False, **keywords)
        return self._cross_entropies

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor | None:
        """Forward alone: the cross-entropy on the last stage, None elsewhere. Collective over the pipeline."""
        keywords = _keywords([0], [batch])
        del keywords["row"]
        kept, found = None, None  # what a stage gives to the next one of the same rank; the result
        for stage, part in self._parts.items():
            x = batch.tokens if stage == 0 else kept
            if stage and rank_of(stage - 1, self.config) != self.mesh.pp_rank:
                x = self._received(stage - 1)
            y = part(x, None, **keywords)
            kept = None
            if stage == self.config.stages - 1:
                found = part.cross_entropy(y, batch.labels)[1]
            else:
                kept = y if rank_of(stage + 1, self.config) == self.mesh.pp_rank else None
                self._pass_on(stage + 1, y)
        return found

    def gradients(self, batch: MicroBatch) -> tuple[Tensor | None, dict[str, Tensor]]:
        """One micro-batch forth and back through all stages, one after the other, beside training: no accumulator sees
        it. Its cross-entropy on the last stage, None elsewhere; the gradients of this rank's parameters by name.
        """
        keywords = _keywords([0], [batch])
        del keywords["row"]
        passed: dict[int, tuple[Tensor, Tensor]] = {}  # stage -> what came in and what it made of it
        found: Tensor | None = None
        for stage, part in self._parts.items():
            x = self._receive(stage, stage - 1, batch.tokens, passed)
            y = part(x, None, **keywords)
            if stage == self.config.stages - 1:
                y, found = part.cross_entropy(y, batch.labels)
            else:
                self._pass_on(stage + 1, y)
            passed[stage] = x, y
        sums: dict[str, Tensor] = {}
        slope: Tensor | None = None  # what a stage gives to the one before it on the same rank
        for stage, part in reversed(self._parts.items()):
            x, y = passed.pop(stage)
            if stage < self.config.stages - 1 and rank_of(stage + 1, self.config) != self.mesh.pp_rank:
                slope = self._received(stage + 1)
            names, parameters = zip(*part.named_parameters(), strict=True)
            inputs = parameters if stage == 0 else (*parameters, x)
            made = torch.autograd.grad(y, inputs, slope if stage < self.config.stages - 1 else None)
            for name, gradient in zip(names, made, strict=False):  # an embedding may be in two stages of this rank
                sums[name] = sums[name] + gradient if name in sums else gradient
            slope = made[-1]
            if stage:
                self._pass_on(stage - 1, slope)
        return None if found is None else found.detach(), sums

    def _receive(self, stage: int, before: int, tokens: Tensor, passed: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """The input of `stage`, a leaf of its own graph."""
        if stage == 0:
            return tokens
        here = rank_of(before, self.config) == self.mesh.pp_rank
        return (passed[before][1].detach() if here else self._received(before)).requires_grad_()

    def _received(self, stage: int) -> Tensor:
        """What the rank that has `stage` sends."""
        x = self.hidden.empty()
        dist.recv(x, self._peer(stage), group=self.mesh.pp_group)
        return x

    def _pass_on(self, stage: int, x: Tensor) -> None:
        """Send to the rank that has `stage`, unless that is this one."""
        if rank_of(stage, self.config) != self.mesh.pp_rank:
            dist.send(x.detach().contiguous(), self._peer(stage), group=self.mesh.pp_group)

    def _peer(self, stage: int) -> int:
        """Global rank of the rank that has `stage`."""
        assert self.mesh.pp_group is not None
        return dist.get_global_rank(self.mesh.pp_group, rank_of(stage, self.config))

    def _stage(self, index: int, part: nn.Module) -> PipelineStage:
        last = index == self.config.stages - 1
        with torch.device("meta"):
            hidden = self.hidden._replace(device=torch.device("meta")).empty().requires_grad_()
            tokens = torch.empty(hidden.shape[:2], dtype=torch.int64)
        return PipelineStage(
            _Module(part, self._callbacks.at),
            index,
            self.config.stages,
            self.hidden.device,
            input_args=hidden if index else tokens,
            output_args=tokens if last else hidden,  # logits go nowhere: only their number counts
            group=self.mesh.pp_group,
            dw_builder=self._later if self.config.schedule in SPLIT_BACKWARD else None,
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss, cross_entropy = self._parts[self.config.stages - 1].cross_entropy(logits, labels)
        self._cross_entropies.append(cross_entropy.detach())
        return loss / self.micro_batches

    def _later(self) -> Callable[..., None]:
        """The weight gradients that one micro-batch's backward has queued, to be computed when the schedule says."""
        queue, add = self._callbacks.queue, self._callbacks.add
        assert queue is not None
        mine, queue[:] = list(queue), []

        def run(*_: Any) -> None:
            for parameter, compute in mine:
                add(parameter, compute())

        return run


def _keywords(rows: Sequence[int], batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    """What every stage gets beside its input; torch cuts it along the first dimension again."""
    tokens = batches[0].tokens
    count, length = tokens.shape
    positions = [
        torch.arange(length, device=tokens.device).expand(count, length) if batch.positions is None else batch.positions
        for batch in batches
    ]
    found = {"row": torch.tensor(rows).repeat_interleave(count), "positions": torch.cat(positions)}
    if batches[0].document_ids is not None:
        found["document_ids"] = torch.cat([b.document_ids for b in batches if b.document_ids is not None])
    return found
