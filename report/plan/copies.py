"""Bytes of a quantized matrix: codes, scales, amax; as native kernels hold it, and as the emulation does.

native     codes and scales, packed; a weight's copies for the forward and for the backward are two, since each
           kernel reads along its own reduction axis
emulated   the decoded numbers, in BF16 where that holds them exactly, else in FP32; one copy where both directions
           see the same numbers (square blocks, one scale for the tensor)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lowprec.formats import QuantSpec
from lowprec.quantized import Axis
from lowprec.slots import same_both_ways
from report.plan.hardware import Machine

ELEMENTS = {8: "fp8", 6: "fp6", 4: "fp4"}  # bits of a floating-point element -> the multiplication that takes it


def kind_of(spec: QuantSpec) -> str:
    """What a GPU must be able to multiply: mxfp8, mxfp6, mxfp4, nvfp4, fp8_tensor, fp8_row, fp8_block; or a name for
    what none does."""
    form = spec.format
    name = ELEMENTS.get(form.bits, f"{form.bits}-bit") if form.exponent else f"int{form.bits}"
    if spec.scale == "e8m0":
        return f"mx{name}" if spec.block in ((1, 32), (32, 32)) else f"{name}_e8m0"
    if spec.two_level and spec.scale == "e4m3" and spec.element == "e2m1" and not spec.row_amax:
        return "nvfp4"
    if spec.block in ("tensor", "row"):
        return f"{name}_{spec.block}"
    return f"{name}_block" if 128 in spec.block else f"{name}_{spec.scale}"


def packed_shapes(spec: QuantSpec, axis: Axis, rows: int, cols: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    """(shape of codes in bytes, shape of scales, bytes of a scale) of lowprec/quantized.py's layout."""
    lines, length = (rows, cols) if axis == -1 else (cols, rows)
    length += -length % max(spec.hadamard, 1)
    codes = (lines, -(-length // 2) if spec.format.bits == 4 else length)
    wide = 4 if spec.scale in ("fp32", "pow2") else 1
    if spec.block == "tensor":
        return codes, (1, 1), wide
    if spec.block == "row":
        return codes, (lines, 1), wide
    down, along = spec.block
    return codes, (-(-lines // down), -(-length // along)), wide


@dataclass(frozen=True)
class Held:
    """Bytes of one quantized matrix."""

    codes: int
    scales: int
    amax: int

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.amax


def native_bytes(spec: QuantSpec, axis: Axis, rows: int, cols: int) -> Held:
    """A matrix as a native kernel reads it; 6-bit elements lie packed."""
    codes, scales, wide = packed_shapes(spec, axis, rows, cols)
    count = math.prod(codes) * (3 if spec.format.bits == 6 else 4) // 4
    amax = 4 * (codes[0] if spec.row_amax else 1) if spec.takes_amax else 0
    return Held(count, math.prod(scales) * wide, amax)


def emulated_bytes(spec: QuantSpec, axis: Axis, rows: int, cols: int, gemm_width: int) -> Held:
    """The same decoded for a GEMM whose operands have `gemm_width` bytes."""
    lines, length = (rows, cols) if axis == -1 else (cols, rows)
    length += -length % max(spec.hadamard, 1)
    scalars = 4 * (2 if spec.takes_amax else 0)
    return Held(lines * length * (gemm_width if spec.exact_in_bf16 else 4), 0, scalars)


def weight_copies(
    specs: Mapping[str, QuantSpec | None], rows: int, cols: int, machine: Machine, *, native: bool, gemm_width: int
) -> dict[str, Held]:
    """What is held of one weight [rows, cols] beside itself: "row" (fprop.b) and "column" (dgrad.b) copies.

    native: each GEMM runs natively where the machine multiplies its operands
    """
    found: dict[str, Held] = {}
    natively = [native and multiplies_as(specs, leg, machine) != "bf16" for leg in ("fprop", "dgrad")]
    axes: tuple[tuple[str, str, Axis], ...] = (("row", "fprop.b", -1), ("column", "dgrad.b", 0))
    for (name, slot, axis), here in zip(axes, natively, strict=True):
        if (spec := specs[slot]) is None:
            continue
        if name == "column" and natively[0] == here and _one_copy(specs, here, machine.turns):
            continue
        found[name] = (
            native_bytes(spec, axis, rows, cols) if here else emulated_bytes(spec, axis, rows, cols, gemm_width)
        )
    return found


def multiplies_as(specs: Mapping[str, QuantSpec | None], leg: str, machine: Machine) -> str:
    """What the machine multiplies a linear's GEMM as."""
    a, b = specs.get(f"{leg}.a"), specs.get(f"{leg}.b")
    return machine.multiplies(*(None if spec is None else kind_of(spec) for spec in (a, b)))


def _one_copy(specs: Mapping[str, QuantSpec | None], native: bool, turns: bool) -> bool:
    """Whether forward and backward read the same copy of a weight."""
    if not same_both_ways(specs["fprop.b"], specs["dgrad.b"]):
        return False
    one = specs["fprop.b"]
    return not native or turns and one is not None and one.block == "tensor"
