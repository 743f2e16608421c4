"""Seconds of traced operations on a machine: a roofline, operation by operation.

    GEMM, attention     the larger of FLOPs / (peak x attained) and bytes / (bandwidth x attained)
    quantizing          bytes read, and written as the kernel at hand writes them: packed, or decoded where it emulates
    everything else     bytes / (bandwidth x attained)
    each                and the machine's launch time

A measured machine has rates of its own for kinds of operations (calibrate.py), which take the place of peaks.
Collectives take the time of their links (traffic.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lowprec.formats import QuantSpec
from parallel.bubble import Times
from report.plan.copies import kind_of
from report.plan.hardware import Machine
from report.plan.trace import Op, Phase
from report.plan.traffic import TRAVELS, Link, given_bytes
from report.plan.units import Linear, Unit

LEGS = ("fprop", "dgrad", "wgrad")


def rate_name(op: Op) -> str:
    """Under which name a measured machine has the rate of an operation."""
    if op.spec is None:
        return f"{op.kind}/{op.width}"
    spec, packed = op.spec, op.packed == sum(count for _, count in op.writes)
    words = [op.kind, kind_of(spec), "rows" if op.axis == -1 else "columns", spec.rounding]
    return " ".join([*words, *(["hadamard"] if spec.hadamard else []), *(["packed"] if packed else [])])


def rate_size(op: Op) -> float:
    """What a rate is so many a second of: FLOPs of a product, else bytes."""
    return op.flops or float(op.nbytes)


@dataclass
class Pricing:
    """native: quantized GEMMs run in native kernels where the machine has them. tensor: the tensor-parallel group."""

    machine: Machine
    native: bool
    tensor: Link
    _known: dict[int, Times] = field(default_factory=dict)

    def element(self, a: str | None, b: str | None) -> str:
        """What a GEMM of these kinds of operands is multiplied as."""
        return self.machine.multiplies(a, b) if self.native else "bf16"

    def seconds(self, op: Op) -> float:
        """Of one operation."""
        machine = self.machine
        if op.kind in TRAVELS:
            return self.tensor.seconds(op.kind, given_bytes(op))
        native = self.native and op.spec is not None and kind_of(op.spec) in machine.native
        if native and op.kind == "decode":
            return 0.0  # a native GEMM reads the codes
        if rate := machine.rate(rate_name(op), rate_size(op)):
            return machine.launch + rate_size(op) / rate
        written = sum(count for _, count in op.writes)
        moved = op.nbytes - written + (op.packed if native and op.packed is not None else written)
        memory = moved / (machine.bandwidth * machine.attained_memory)
        return machine.launch + max(memory, op.flops / self._flops(op) if op.flops else 0.0)

    def _flops(self, op: Op) -> float:
        """FLOP/s of a product."""
        return self.machine.peaks[self._element(op)] * self.machine.attained_gemm

    def _element(self, op: Op) -> str:
        """What a product is multiplied as."""
        if op.width != 2:
            return "fp32"
        return "bf16" if op.product is None else self.element(op.product.a, op.product.b)

    def per_byte(self, name: str, size: float) -> float:
        """Seconds a byte of operations that a measured machine has under `name`; others move it at their bandwidth."""
        if rate := self.machine.rate(name, size):
            return 1.0 / rate
        return 1.0 / (self.machine.bandwidth * self.machine.attained_memory)

    def phase(self, phase: Phase) -> float:
        return sum(map(self.seconds, phase.ops))

    def by_kind(self, unit: Unit) -> Counter[str]:
        """Seconds of one micro-batch by what they go to."""
        found = Counter[str]()
        for phase in (unit.forward, unit.backward, unit.weights):
            for op in phase.ops:
                found[self._name(op)] += self.seconds(op)  # pyright: ignore[reportArgumentType] (seconds, not a count)
        return found

    def _name(self, op: Op) -> str:
        if op.kind == "gemm":
            return f"GEMMs in {self._element(op).upper()}"
        if op.kind.startswith("attention"):
            return "attention"
        if op.kind in TRAVELS:
            return "tensor-parallel traffic"
        return "quantizing" if op.spec is not None else "everything else, by bytes"

    def times(self, unit: Unit) -> Times:
        """Of one micro-batch."""
        if id(unit) not in self._known:
            self._known[id(unit)] = Times(*(self.phase(p) for p in (unit.forward, unit.backward, unit.weights)))
        return self._known[id(unit)]


def added(times: Iterable[Times]) -> Times:
    """Of several parts one after the other."""
    given = list(times)
    return Times(
        sum(each.forward for each in given),
        sum(each.backward_input for each in given),
        sum(each.backward_weight for each in given),
    )


@dataclass(frozen=True)
class Share:
    """FLOPs of one kind in a step of the whole model.

    leg:     fprop, dgrad, wgrad of the linears, or what else it is
    a, b:    kinds of the operands; None: not quantized
    element: what it is multiplied as
    """

    leg: str
    a: str | None
    b: str | None
    element: str
    flops: float


def flops_by_precision(
    linears: Iterable[Linear], tokens: int, total: float, pricing: Pricing, *, width: int
) -> list[Share]:
    """Model FLOPs of `tokens` tokens by GEMM leg and operands. total: of all, per token, by the model's convention.

    What no linear multiplies is attention, scan and logits of tied embeddings. Recomputation is not counted.
    """
    found: Counter[tuple[str, str | None, str | None, str]] = Counter()
    plain = "bf16" if width == 2 else "fp32"
    for linear in linears:
        for leg in LEGS:
            a, b = (_kind(linear.specs, f"{leg}.{side}") for side in "ab")
            element = pricing.element(a, b) if a or b else plain
            found[leg, a, b, element] += 2 * linear.whole * tokens
    rest = total * tokens - sum(found.values())
    in_order = sorted(found.items(), key=lambda pair: LEGS.index(pair[0][0]))
    shares = [Share(*key, float(count)) for key, count in in_order]
    return [*shares, Share("attention, scan, tied logits", None, None, plain, rest)] if rest > 0 else shares


def _kind(specs: Mapping[str, QuantSpec | None], slot: str) -> str | None:
    spec = specs.get(slot)
    return None if spec is None else kind_of(spec)
