"""What ZeRO gives to a rank: its part of the flat parameters, the states in it, and how gradients are reduced.

The arithmetic of lowprec/zero.py and zero_optimizer.py on sizes alone: two groups (matrices, the rest), every parameter
filled up to whole units of 256 elements, equal parts for the data-parallel ranks, buckets of gradients in the order in
which they are reduced.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowprec.codecs import UNIT
from lowprec.optim import OptimizerConfig
from lowprec.payload import Payload


@dataclass(frozen=True)
class Parameter:
    """One parameter as a rank's module has it. shape: logical; dims: of the module's tensor."""

    name: str
    shape: tuple[int, ...]
    dims: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """Parameters that lie in one flat buffer, with their places; size: fillers included."""

    parameters: tuple[Parameter, ...]
    places: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Partition:
    """The flat buffers of a rank's parameters over `dp` ranks, and this rank's place among them (stages 0 to 2)."""

    groups: tuple[Group, ...]
    dp: int
    rank: int = 0

    @property
    def elements(self) -> int:
        """Of the working weights, fillers included."""
        return sum(group.size for group in self.groups)

    @property
    def owned(self) -> int:
        """Of the states, fillers included."""
        return self.elements // self.dp

    def fragments(self) -> Iterator[tuple[Parameter, int]]:
        """(parameter, elements of it) in this rank's part."""
        for group in self.groups:
            size = group.size // self.dp
            for parameter, place in zip(group.parameters, group.places, strict=True):
                low, high = max(place, self.rank * size), min(place + parameter.count, (self.rank + 1) * size)
                if low < high:
                    yield parameter, high - low


def partition(parameters: Sequence[Parameter], dp: int, rank: int = 0) -> Partition:
    """Lay parameters out as lowprec/zero.py does. dp: ranks that share the states; 1 at stage 0."""
    groups = []
    matrices = tuple(p for p in parameters if p.dims >= 2)
    vectors = tuple(p for p in parameters if p.dims < 2)
    for members in filter(None, (matrices, vectors)):
        places, at = [], 0
        for parameter in members:
            places.append(at)
            at += -(-parameter.count // UNIT) * UNIT
        groups.append(Group(members, tuple(places), -(-at // (UNIT * dp)) * UNIT * dp))
    return Partition(tuple(groups), dp, rank)


def states(fragments: Sequence[tuple[Parameter, int]], owned: int, config: OptimizerConfig) -> dict[str, int]:
    """Bytes of the optimizer's tensors on a rank, by kind as `Engine.memory` names them: master, exp_avg, ..., scales.

    owned: elements of the FP32 partition, which is one tensor with its fillers
    """
    update, found = config.storage, Counter[str]()
    found["master"] = {"fp32": 4 * owned, "none": 0}.get(config.master, 2 * sum(count for _, count in fragments))
    for parameter, count in fragments:
        for kind, part in update.parts(parameter.shape).items():
            name = "scales" if part.per not in (1, 2) else kind.split(".")[0]
            found[name] += part.size(count) * part.dtype.itemsize
    return {kind: count for kind, count in found.items() if count}


@dataclass(frozen=True)
class Reduction:
    """One bucket on its way.

    elements: numbers in it
    owned:    those that this rank owns, as every rank sends them: `received` bytes come
    sent:     bytes for other ranks
    left:     numbers of gradients that wait for a later bucket
    """

    elements: int
    owned: int
    sent: int
    received: int
    left: int


def reductions(
    layout: Partition, order: Sequence[Parameter], bucket: int, payload: Payload
) -> Iterator[tuple[Reduction, ...]]:
    """The buckets of one reduction of all gradients, in order; each one's groups are reduced one after the other.

    bucket: elements that fit; a larger parameter is reduced alone
    """
    left = sum(parameter.count for parameter in order)
    places = {p.name: (g, at) for g in layout.groups for p, at in zip(g.parameters, g.places, strict=True)}
    waiting: list[Parameter] = []
    held = 0
    for parameter in [*order, None]:
        if parameter is None or held + parameter.count > bucket:
            if waiting:
                left -= held
                yield tuple(
                    _reduction(layout, group, [(places[p.name][1], p.count) for p in members], payload, left)
                    for group in layout.groups
                    if (members := [p for p in waiting if places[p.name][0] is group])
                )
            waiting, held = [], 0
        if parameter is not None:
            waiting.append(parameter)
            held += parameter.count


def _reduction(
    layout: Partition, group: Group, spans: Sequence[tuple[int, int]], payload: Payload, left: int
) -> Reduction:
    size, dp = group.size // layout.dp, layout.dp
    per_owner = Counter[int]()
    for place, count in spans:
        for owner in range(place // size, (place + count - 1) // size + 1):
            per_owner[owner] += min(place + count, (owner + 1) * size) - max(place, owner * size)
    lengths = {owner: payload.message_bytes(((0, count),)) for owner, count in per_owner.items()}
    mine = lengths.get(layout.rank, 0)
    return Reduction(
        elements=sum(per_owner.values()),
        owned=per_owner.get(layout.rank, 0),
        sent=sum(lengths.values()) - mine,
        received=mine * dp,
        left=left,
    )
