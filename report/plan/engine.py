"""Bytes that gradients, their reduction and the optimizer's step need on a rank, at each moment of a step.

Stages 0 to 2 follow lowprec/zero_optimizer.py and exchange.py line by line. Stage 3 is DeepSpeed's own optimizer, of
which only the large tensors are known: gradients and masters of a partition, and the copy that its step makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowprec.payload import Payload, parse_payload
from report.plan.layout import Layout
from report.plan.partition import Parameter, Partition, Reduction, reductions

ACCUMULATORS = {"fp32": 4, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Costs:
    """Temporary bytes of the optimizer's code for each element of the fragment at hand.

    norm:   of the gradient's norm: a copy in FP64
    update: of the update, where no kernel fuses it
    """

    norm: float
    update: float


@dataclass(frozen=True)
class Engine:
    """Stages 0 to 2 on one rank. overlap: reductions run beside the backward (on GPUs, without a pipeline)."""

    layout: Layout
    flat: Partition
    parameters: Sequence[Parameter]
    overlap: bool
    costs: Costs

    @property
    def _stage(self) -> int:
        return self.layout.recipe.zero.stage

    @property
    def _width(self) -> int:
        return ACCUMULATORS[self.layout.recipe.gradients.accumulate]

    @property
    def accumulated(self) -> int:
        """Bytes of the accumulators when all micro-batches have added up."""
        return self.gradient_bytes(self.parameters)

    def gradient_bytes(self, parameters: Sequence[Parameter]) -> int:
        """Bytes that the accumulators keep of these parameters' gradients; at stage 2 of all that this rank owns."""
        if self._stage == 2:
            return self._width * sum(count for _, count in self.flat.fragments())
        return self._width * sum(p.count for p in parameters)

    @property
    def bucket(self) -> int:
        """Bytes of the buffers in which gradients wait for their reduction."""
        elements = min(self.layout.recipe.zero.reduce_bucket, self.flat.elements)
        return 4 * elements * (2 if self.overlap else 1)

    def in_backward(self) -> int:
        """Bytes of reductions that run while a backward does."""
        early = self._stage == 2 or self.overlap
        return max([self._exchange(parts) for parts in self.buckets()][:-1] if early else [], default=0)

    def moments(self) -> dict[str, int]:
        """Reduction, update, gathering: bytes beside what is held."""
        owned = [count for _, count in self.flat.fragments()]
        mine, largest = self._width * sum(owned), max(owned, default=0)
        decoded = 0 if self._width == 4 else 4 * largest
        found = {"reduction": self._reduction(mine)}
        found["update"] = mine + decoded + int(max(self.costs.norm, self.costs.update) * largest)
        found["gathering"] = mine + max((self._gathered(group.size) for group in self.flat.groups), default=0)
        return found

    def buckets(self) -> Iterator[tuple[Reduction, ...]]:
        recipe = self.layout.recipe
        if self._stage == 2 or self.overlap:  # as gradients come
            order = list(reversed(self.parameters))
        else:  # after the backward, group by group
            order = [p for group in self.flat.groups for p in group.parameters]
        limit = min(recipe.zero.reduce_bucket, self.flat.elements)
        return reductions(self.flat, order, limit, parse_payload(recipe.gradients.payload))

    def _reduction(self, mine: int) -> int:
        """After the last backward: what still waits, the bucket on its way, and what has arrived."""
        most, arrived = 0, 0
        for parts in self.buckets():
            waiting = 0 if self._stage == 2 else self._width * parts[0].left
            held = mine if self._stage == 2 else arrived
            most = max(most, waiting + self.bucket + held + self._exchange(parts))
            arrived += self._width * sum(part.owned for part in parts)
        return most

    def _exchange(self, parts: Sequence[Reduction]) -> int:
        """Copies of a bucket while one of its groups travels: in order of destination, as bytes, received, added up."""
        gradients = self.layout.recipe.gradients
        payload, most = parse_payload(gradients.payload), 0
        for part in parts:
            message = 0 if payload.name == "fp32" else part.sent + part.received // self.flat.dp
            residual = 6 * part.elements if gradients.error_feedback else 0
            most = max(most, 4 * part.elements + 2 * message + part.received + 4 * part.owned + residual)
        return most

    def _gathered(self, size: int) -> int:
        """Copies of one flat buffer while updated weights travel."""
        recipe, dp = self.layout.recipe, self.flat.dp
        width = 2 if recipe.model.dtype == "bf16" else 4
        if recipe.zero.gather == "exact":
            return 0 if dp == 1 else 2 * width * size
        payload: Payload = parse_payload(recipe.zero.gather)
        message = payload.message_bytes(((0, size // dp),))
        return 2 * message + dp * message + width * size


@dataclass(frozen=True)
class Engine3:
    """Stage 3: FP32 gradients of a partition, a bucket, and the step's copy of the former."""

    layout: Layout
    parameters: Sequence[Parameter]

    @property
    def accumulated(self) -> int:
        return 4 * sum(-(-p.count // self.layout.dp) for p in self.parameters)

    def gradient_bytes(self, parameters: Sequence[Parameter]) -> int:
        return self.accumulated

    @property
    def bucket(self) -> int:
        elements = min(self.layout.recipe.zero.reduce_bucket, sum(p.count for p in self.parameters))
        return 4 * elements

    def in_backward(self) -> int:
        return self.bucket

    def moments(self) -> dict[str, int]:
        return {"reduction": self.accumulated + 2 * self.bucket, "update": 2 * self.accumulated}
