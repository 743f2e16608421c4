"""What torch.compile would make of a traced part: a model of its fusion, from the trace of the eager code.

    level   how many GEMMs, attentions, quantizers or collectives an operation has to wait for, one after the other
    kernel  all pointwise operations, reductions, look-ups and copies of one level

Inside a kernel nothing is read or written; a kernel reads what comes from elsewhere once, and writes what other
kernels, GEMMs or the backward read. What a backward would read of a kernel's results is computed again where the
kernel's inputs are fewer bytes (the partitioner of AOTAutograd minimizes the same). Real kernels split long reductions
and spill, so this is a bound from below, on time and on bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from report.plan.trace import Op, Phase
from report.plan.units import Unit

FUSED = frozenset({"pointwise", "transcendental", "reduction", "copy", "gather"})


@dataclass(frozen=True)
class _Flow:
    """Where the tensors of a phase come from. levels: of each operation; made: tensor -> level of the kernel that wrote
    it; sizes: most bytes of each tensor that the phase writes; inside: tensors that never leave their kernel."""

    levels: tuple[int, ...]
    made: Mapping[int, int]
    sizes: Mapping[int, int]
    inside: frozenset[int]


def _flow(ops: Sequence[Op], alive: frozenset[int]) -> _Flow:
    level_of: dict[int, int] = {}
    made: dict[int, int] = {}
    sizes: dict[int, int] = {}
    levels: list[int] = []
    leaves: set[int] = set(alive)
    for op in ops:
        level = max((level_of.get(number, 0) for number, _ in op.reads), default=0)
        levels.append(level)
        fused = op.kind in FUSED
        leaves |= {number for number, _ in op.reads if not fused or made.get(number, level) != level}
        for number, count in op.writes:
            level_of[number] = max(level_of.get(number, 0), level if fused else level + 1)
            sizes[number] = max(sizes.get(number, 0), count)
            if fused and made.get(number, level) == level:
                made[number] = level
            else:
                made.pop(number, None)
                leaves.add(number)
    return _Flow(tuple(levels), made, sizes, frozenset(made.keys() - leaves))


def _fused(ops: Sequence[Op], flow: _Flow) -> tuple[Op, ...]:
    """The operations with the bytes that their kernels move; those of one kernel become one."""
    kernels: dict[int, tuple[dict[int, int], dict[int, int], int]] = {}
    found: list[Op] = []
    for op, level in zip(ops, flow.levels, strict=True):
        if op.kind not in FUSED:
            found.append(op)
            continue
        reads, writes, width = kernels.get(level, ({}, {}, 0))
        for number, count in op.reads:
            if flow.made.get(number) != level:
                reads[number] = max(reads.get(number, 0), count)
        for number, count in op.writes:
            if number not in flow.inside:
                writes[number] = max(writes.get(number, 0), count)
        kernels[level] = (reads, writes, max(width, op.width))
    found += [Op("fused", width, tuple(r.items()), tuple(w.items())) for r, w, width in kernels.values()]
    return tuple(found)


def _roots(ops: Sequence[Op], flow: _Flow) -> dict[int, dict[int, int]]:
    """Tensor that a kernel wrote -> what it could be computed from again, with bytes."""
    found: dict[int, dict[int, int]] = {}
    for op in ops:
        if op.kind not in FUSED:
            continue
        inputs: dict[int, int] = {}
        for number, count in op.reads:
            inputs |= found.get(number, {number: count}) if op.kind != "reduction" else {number: count}
        if op.kind == "reduction":  # its small results are kept
            inputs = {number: count for number, count in op.writes}
        for number, _ in op.writes:
            found[number] = found.get(number, {}) | inputs
    return found


def _kept(forward: Phase, flow: _Flow, given: frozenset[int]) -> dict[int, int]:
    """What the backward gets of a forward: tensor -> bytes."""
    written = {number: flow.sizes[number] for number in forward.alive if number in flow.sizes}
    kept = {number: count for number, count in written.items() if number not in flow.made}
    roots = _roots(forward.ops, flow)
    for number, count in sorted(written.items(), key=lambda pair: -pair[1]):
        if number in kept:
            continue
        needed = {root: size for root, size in roots.get(number, {}).items() if root not in kept and root not in given}
        small = {root for root in needed if root == number}
        if small or sum(needed.values()) >= count:
            kept[number] = count
        else:
            kept |= needed
    return kept


def _peak(ops: Sequence[Op], flow: _Flow, start: Mapping[int, int], end: frozenset[int]) -> int:
    """The most bytes alive at once: from the first write to the last read, or to the end."""
    last: dict[int, int] = {}
    for place, op in enumerate(ops):
        for number, _ in (*op.reads, *op.writes):
            last[number] = place
    alive = {number: count for number, count in start.items() if number in last}
    live = most = sum(alive.values())
    dies: dict[int, list[int]] = {}
    for number, place in last.items():
        if number not in end:
            dies.setdefault(place, []).append(number)
    for place, op in enumerate(ops):
        for number, _ in op.writes:
            if number not in alive and number not in flow.inside:
                alive[number] = flow.sizes[number]
                live += alive[number]
        most = max(most, live)
        for number in dies.get(place, ()):
            live -= alive.pop(number, 0)
    return most


def compiled(unit: Unit) -> Unit:
    """The part as torch.compile would run it. A split backward's weight gradients stay as they are."""
    forward, backward = unit.forward, unit.backward
    given = frozenset(number for op in forward.ops for number, _ in op.reads)
    there = _flow(forward.ops, forward.alive)
    given = frozenset(given - there.sizes.keys())
    kept = _kept(forward, there, given)
    there = _flow(forward.ops, frozenset(kept))
    back = _flow(backward.ops, backward.alive)
    total = sum(kept.values())
    return replace(
        unit,
        forward=replace(
            forward,
            ops=_fused(forward.ops, there),
            kept=min(total, forward.kept),
            peak=min(forward.peak, _peak(forward.ops, there, {}, frozenset(kept))),
        ),
        backward=replace(
            backward,
            ops=_fused(backward.ops, back),
            peak=min(backward.peak, _peak(backward.ops, back, kept, backward.alive)),
        ),
    )
