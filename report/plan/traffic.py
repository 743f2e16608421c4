"""What ranks send each other in a step, by kind, group and payload, within nodes and between them; and its seconds.

    kind              bytes that a rank sends of b that it gives      of those, between N nodes (m members on each)
    all_reduce        2 b (n - 1) / n                                 2 b (N - 1) / N / m       rings over all links
    reduce_scatter    b (n - 1) / n                                   b (N - 1) / N / m
    all_gather        b (n - 1)                                       b (N - 1)
    all_to_all        b (n - 1) / n                                   b (n - m) / n             how gradients travel
    send              b                                               b, if the ranks are on two nodes

Seconds are a latency, and the bytes over their links. Ranks are numbered as parallel/mesh.py does: tensor-parallel
ranks are neighbours, pipeline ranks farthest apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lowprec.payload import Payload, parse_payload
from report.plan.engine import Engine
from report.plan.hardware import Machine
from report.plan.layout import Layout
from report.plan.trace import COLLECTIVES, Op
from report.plan.units import Unit

TRAVELS = frozenset(COLLECTIVES.values())


@dataclass(frozen=True)
class Link:
    """A group of ranks. here: its members on one node (or in one domain of fast links)."""

    members: int
    here: int
    machine: Machine

    @property
    def nodes(self) -> int:
        return -(-self.members // self.here)

    def sent(self, kind: str, given: float) -> tuple[float, float]:
        """(bytes that a rank sends, those of them that leave the node)."""
        n, nodes, here = self.members, self.nodes, self.here
        if n == 1:
            return 0.0, 0.0
        away = given * (nodes - 1) / nodes / here
        return {
            "all_reduce": (2 * given * (n - 1) / n, 2 * away),
            "reduce_scatter": (given * (n - 1) / n, away),
            "all_gather": (given * (n - 1), given * (nodes - 1)),
            "all_to_all": (given * (n - 1) / n, given * (n - here) / n),
            "send": (given, given if nodes > 1 else 0.0),
        }[kind]

    def seconds(self, kind: str, given: float) -> float:
        """Of one collective to which every rank gives so many bytes."""
        if self.members == 1:
            return 0.0
        machine, (sent, away) = self.machine, self.sent(kind, given)
        if rate := machine.rate(kind, given):
            return machine.latency + sent / rate
        return machine.latency * self.nodes + (sent - away) / machine.intra + away / machine.inter


@dataclass(frozen=True)
class Links:
    """The groups of a layout."""

    tensor: Link
    data: Link
    pipeline: Link

    @classmethod
    def of(cls, layout: Layout, machine: Machine) -> Links:
        tp, dp, node = layout.tp, layout.dp, machine.domain or layout.per_node
        neighbours = min(tp, node)
        replicas = max(1, min(dp, node // tp))
        apart = layout.pp > 1 and tp * dp >= node or layout.world > node and tp * dp * 2 > node
        return cls(Link(tp, neighbours, machine), Link(dp, replicas, machine), Link(2, 1 if apart else 2, machine))


@dataclass(frozen=True)
class Transfer:
    """One kind of traffic of the rank that sends most of it, in a step.

    sent, between: bytes; those that leave the node. exposed: seconds that nothing hides, of `seconds`
    """

    what: str
    group: str
    kind: str
    payload: str
    members: int
    nodes: int
    count: int
    sent: int
    between: int
    seconds: float
    exposed: float


def transfer(
    what: str,
    group: str,
    kind: str,
    payload: str,
    link: Link,
    given: Iterable[float],
    times: int = 1,
    hidden: float = 0.0,
) -> Transfer:
    """given: bytes of each collective, all of them so many times. hidden: seconds during which nothing waits for it."""
    counts = Counter(given)
    sent = [(times * count, link.sent(kind, each)) for each, count in counts.items()]
    seconds = sum(times * count * link.seconds(kind, each) for each, count in counts.items())
    return Transfer(
        what=what,
        group=group,
        kind=kind,
        payload=payload,
        members=link.members,
        nodes=link.nodes,
        count=times * counts.total(),
        sent=round(sum(count * all_ for count, (all_, _) in sent)),
        between=round(sum(count * away for count, (_, away) in sent)),
        seconds=seconds,
        exposed=max(0.0, seconds - hidden),
    )


def tensor_traffic(parts: Sequence[Unit], layout: Layout, link: Link) -> Iterator[Transfer]:
    """Of the collectives in the traces of one rank's parts."""
    given: dict[tuple[str, str, str], list[float]] = {}
    config, dtype = layout.recipe.parallel, layout.recipe.model.dtype
    for unit in parts:
        for direction, phase in (("forward", unit.forward), ("backward", unit.backward), ("weights", unit.weights)):
            for op in phase.ops:
                if op.kind in TRAVELS:
                    payload = dtype if op.packed is None else config.sp_payload
                    payload = payload if op.width == (2 if dtype == "bf16" else 4) else "fp32"
                    given.setdefault((direction, op.kind, payload), []).append(float(given_bytes(op)))
    for (direction, kind, payload), each in given.items():
        yield transfer(f"activations, {direction}", "tensor", kind, payload, link, each, layout.micro_batches)


def given_bytes(op: Op) -> int:
    """What a rank gives to a traced collective."""
    return op.reads[0][1] if op.packed is None else op.packed


def gradient_bytes(engine: Engine) -> list[float]:
    """Bytes of each exchange of one reduction: all parts of a bucket, the rank's own included."""
    return [
        float(part.sent + part.received // max(engine.flat.dp, 1))
        for parts in engine.buckets()
        for part in parts
        if part.elements
    ]


def weights_given(engine: Engine) -> list[float]:
    """Bytes of this rank's updated weights, one number a flat buffer."""
    recipe, dp = engine.layout.recipe, engine.flat.dp
    exact = "bf16" if recipe.model.dtype == "bf16" else "fp32"
    payload: Payload = parse_payload(exact if recipe.zero.gather == "exact" else recipe.zero.gather)
    return [float(payload.message_bytes(((0, group.size // dp),))) for group in engine.flat.groups]
