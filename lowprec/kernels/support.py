"""What the fused CPU kernels can do, and the integers by which they are told what to do.

    element   sign and magnitude of at most 8 bits with at most 5 exponent bits, or int8
    scale     e8m0 (every rule), e4m3 of two levels (NVFP4), fp32 and pow2
    block     (1, c) and (r, c) with c of 16, 32, 64, 128 and r <= 128 (axis 0: r of those, too); "tensor"
    rounding  nearest (ties to even), stochastic with 8 random bits
    hadamard  every size; along rows of any block, along columns of (1, c) blocks and "tensor"
    dtype     float32 and bfloat16 matrices, on the CPU

Everything else goes to lowprec/reference.py, of which these kernels are bit-exact copies.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Literal

import torch

from lowprec.formats import QuantSpec
from lowprec.quantized import Axis

SIDES = (16, 32, 64, 128)
_RULES = {"rceil": 1, "floor": 2, "ceil": 3, "even": 4}  # enum Rule in cpu/job.h
_GIVEN, _TWO_LEVEL, _FP32, _POW2 = 0, 5, 6, 7


def _element_problem(spec: QuantSpec) -> str | None:
    form = spec.format
    if form.bits > 8 or form.exponent > 5:
        return f"element {spec.element} has more than 8 bits or 5 exponent bits"
    if spec.rounding not in ("nearest", "stochastic"):
        return f"rounding {spec.rounding}"
    if spec.rounding == "stochastic" and spec.random_bits != 8:
        return f"{spec.random_bits} random bits"
    return None


def _scale_problem(spec: QuantSpec) -> str | None:
    if spec.scale == "ue5m3" or spec.scale == "e4m3" and not spec.two_level:
        return f"scale {spec.scale}" + ("" if spec.two_level else " of one level")
    if spec.row_amax:
        return "an amax for each line"
    if spec.four_over_six:
        return "four_over_six"
    return None


def _block_problem(spec: QuantSpec, axis: Axis) -> str | None:
    if spec.block == "tensor":
        return "block 'tensor' with scale e8m0" if spec.scale == "e8m0" else None
    if spec.block == "row":
        return "block 'row'"
    lines, along = spec.block
    assert isinstance(lines, int) and isinstance(along, int)
    if along not in SIDES or lines > 128 or (axis == 0 and lines != 1 and lines not in SIDES):
        return f"block {spec.block}"
    if axis == 0 and lines != 1 and spec.hadamard:
        return f"a rotation of block {spec.block} along axis 0"
    return None


@cache
def supports(spec: QuantSpec, axis: Axis, dtype: torch.dtype) -> str | None:
    """None if the kernels can quantize a matrix of `dtype` so; else what they cannot do."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"input {dtype}"
    return _element_problem(spec) or _scale_problem(spec) or _block_problem(spec, axis)


def _bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _rule(spec: QuantSpec) -> int:
    if spec.block == "tensor":
        return _GIVEN
    if spec.two_level:
        return _TWO_LEVEL
    return _RULES[spec.scale_rule] if spec.scale == "e8m0" else {"fp32": _FP32, "pow2": _POW2}[spec.scale]


Use = Literal["operand", "pack", "save"]  # values; codes, those of axis 0 transposed; codes as the matrix lies


def _block(spec: QuantSpec, axis: Axis, use: Use) -> tuple[int, int, bool]:
    """Rows and columns of a block in the matrix's own orientation, and whether it is a part of a column."""
    if spec.block == "tensor":
        # the scale is known, blocks are only portions of work; transposed codes and rotated columns need columns
        columns = axis == 0 and (use == "pack" or spec.hadamard > 0)
        return (128, 1, True) if columns else (1, 128, False)
    lines, along = spec.block
    assert isinstance(lines, int) and isinstance(along, int)
    if axis == -1:
        return lines, along, False
    return along, lines, lines == 1


@cache
def integers(spec: QuantSpec, axis: Axis, use: Use) -> tuple[int, ...]:
    """`Spec` of cpu/ops.cpp. Only for what `supports` allows."""
    form = spec.format
    nan = -1 if form.nan is None else form.nan
    inf = (((1 << form.exponent) - 1) << form.mantissa) if form.special == "ieee" else -1
    rows, cols, columns = _block(spec, axis, use)
    return (
        *(form.mantissa, form.emin, form.bits - 1, nan, inf, int(form.twos_complement), _bits(form.max)),
        *(_rule(spec), form.emax, int(spec.scale == "pow2"), _bits(spec.scale_max), int(spec.three_quarters)),
        *(rows, cols, int(columns), spec.hadamard, int(use == "save")),
    )
