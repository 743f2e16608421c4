"""The six slots of a linear's GEMMs: which matrix each one quantizes, along which axis, and what two of them share.

Under tensor parallelism a rank has some columns of x and w, or some rows of w and columns of dy (`Place`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist

from lowprec.formats import QuantSpec
from lowprec.policy import GEMMS, Slots
from lowprec.quantized import Axis, block_of

# slot -> (which matrix, the axis that its GEMM reduces)
SLOT_AXES: dict[str, tuple[str, Axis]] = {
    "fprop.a": ("x", -1),
    "fprop.b": ("w", -1),
    "dgrad.a": ("dy", -1),
    "dgrad.b": ("w", 0),
    "wgrad.a": ("dy", 0),
    "wgrad.b": ("x", 0),
}


@dataclass(frozen=True)
class Place:
    """Which part of the logical linear this rank has.

    outputs: the output features, rows of w and columns of dy, as runs of the logical ones: (first, count)
    inputs:  the input features, columns of x and w: (first, count)
    split:   the matrices of which other ranks have other parts: "x", "w", "dy"
    group:   those ranks
    """

    outputs: tuple[tuple[int, int], ...]
    inputs: tuple[int, int]
    split: frozenset[str]
    group: dist.ProcessGroup | None

    def columns(self, kind: str) -> tuple[tuple[int, int], ...]:
        """Runs of logical columns that the matrix `kind` has here."""
        return self.outputs if kind == "dy" else (self.inputs,)


def same_both_ways(one: QuantSpec | None, other: QuantSpec | None) -> bool:
    """Whether a matrix quantized to one along its rows and to the other along its columns gives the same numbers."""
    if one is None or one != other or one.hadamard or one.rounding == "stochastic":
        return False
    return one.block == "tensor" or isinstance(one.block, tuple) and one.block[0] == one.block[1]


def same_amax(one: QuantSpec | None, other: QuantSpec | None) -> bool:
    """Whether both scale a matrix by its own amax, which is then found once."""
    plain = (s is not None and s.takes_amax and not s.hadamard and not s.row_amax for s in (one, other))
    return all(plain)


def specs_of(slots: Slots) -> dict[str, QuantSpec | None]:
    """Slot -> what it quantizes to; None: nothing."""
    return {f"{gemm}.{side}": getattr(getattr(slots, gemm), side) for gemm in GEMMS for side in ("a", "b")}


def place_problems(slots: Slots, place: Place) -> list[str]:
    """What of a linear's quantization would differ from that of the whole matrix; empty if nothing would."""
    found, specs = [], specs_of(slots)
    for slot, (kind, axis) in SLOT_AXES.items():
        spec = specs[slot]
        if spec is None or kind not in place.split:
            continue
        along_features = kind == "w" or axis == -1
        if spec.row_amax or along_features and (spec.block == "row" or spec.block == "tensor" and not spec.takes_amax):
            found.append(f"{slot} has scales of whole lines, of which each rank has a part; set tp to 1")
            continue
        down, across = block_of(spec, axis, 1, 1)
        runs = {1: place.columns(kind), 0: place.outputs if kind == "w" else ()}
        unit = {0: down, 1: across}
        unit[axis % 2] = math.lcm(unit[axis % 2], spec.hadamard or 1)
        for dimension, parts in runs.items():
            if cut := [n for run in parts for n in run if n % unit[dimension]]:
                found.append(
                    f"{slot} has blocks of {unit[dimension]} features, but a rank's part begins or ends "
                    f"at {cut[0]}; choose a smaller parallel.tp, or sizes that divide"
                )
                break
    return found
