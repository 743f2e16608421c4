"""Sizes that native kernels want to be multiples of, after tensor parallelism has split the matrices.

hard   what a kernel refuses, or our emulation pads: 16 for FP8 with one scale and NVFP4, 32 for MX, 128 for blocks of
       128 (Transformer Engine's own checks); a rotation's group along the axis that it turns
soft   128: tiles of scales are laid out by 128 rows; other sizes run, with tiles that are partly empty, and some
       libraries refuse them (torchtitan's NVFP4)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lowprec.policy import together
from report.plan.copies import kind_of
from report.plan.units import Linear

MULTIPLES = {"fp8_tensor": 16, "fp8_row": 16, "fp8_block": 128, "mxfp8": 32, "mxfp6": 32, "mxfp4": 32, "nvfp4": 16}
TILE = 128


@dataclass(frozen=True)
class Constraint:
    """Linears (with their side) whose size is no multiple. hard: a kernel refuses it."""

    where: str
    size: int
    multiple: int
    hard: bool


def constraints(linears: Iterable[Linear], tokens: int) -> list[Constraint]:
    """Everything that fails; hard ones first. tokens: rows that enter a linear in a micro-batch."""
    linears = list(linears)
    found: dict[tuple[int, int, bool], list[tuple[str, str]]] = {}
    for linear in linears:
        for side, size, multiple, hard in _failing(linear, tokens):
            found.setdefault((size, multiple, hard), []).append((linear.name, side))
    lines = [
        Constraint(where, size, multiple, hard)
        for (size, multiple, hard), pairs in found.items()
        for where in together(pairs)
    ]
    return sorted(lines, key=lambda line: not line.hard)


def _failing(linear: Linear, tokens: int) -> Iterator[tuple[str, int, int, bool]]:
    specs = [spec for spec in linear.specs.values() if spec is not None]
    if not specs:
        return
    needed = math.lcm(*(MULTIPLES.get(kind_of(spec), 1) for spec in specs))
    turned = [spec.hadamard for slot in ("wgrad.a", "wgrad.b") if (spec := linear.specs[slot]) and spec.hadamard]
    for side, size in (("out features", linear.rows), ("in features", linear.cols)):
        if size % needed:
            yield side, size, needed, True
        elif size % TILE:
            yield side, size, TILE, False
    if tokens % (rows := math.lcm(needed, *turned)):
        yield "tokens of a micro-batch", tokens, rows, True
