"""Fused quantization kernels: the same results as lowprec/reference.py, bit for bit, at about the speed of a copy.

`supports` says what a kernel can do (None) or the reason why not; a caller takes the reference then, and says so. They
are C++ operators for CPUs (cpu/*.cpp, built on first use by build.py) in three versions, AVX-512, AVX2 and portable,
that the processor decides between at run time and that give equal results. As operators of torch's library
(torch.ops.lowprec_cpu) with versions for meta and fake tensors they may stand in compiled graphs.

The row and the column copy of a matrix are two passes, in a linear over 128 rows at a time (linear.py). One that writes
both was tried and is slower (MXFP8, 4 M numbers: 2.1 ms against 0.7 + 0.8): the tile that the column scales need makes
both results strided.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.formats import QuantSpec
from lowprec.hadamard import sign_vector
from lowprec.kernels import build
from lowprec.kernels.support import Use, integers
from lowprec.kernels.support import supports as _supports
from lowprec.philox import RandomKey
from lowprec.quantized import Axis, Operand, QuantizedTensor, check_operand_dtype, in_epilogue

__all__ = ["amax", "available", "operand", "quantize", "supports", "unavailable_because", "unpack"]


@cache
def unavailable_because() -> str | None:
    """None if the kernels can run; else why not. The first call builds them if need be."""
    reason = build.load()
    if reason is None:
        _register_fakes()
    return reason


def available() -> bool:
    """Whether the kernels can run. The first call builds them if need be."""
    return unavailable_because() is None


def supports(spec: QuantSpec, axis: Axis, dtype: torch.dtype, key: RandomKey | None = None) -> str | None:
    """None if a kernel can quantize a CPU matrix of `dtype` so; else why not, in words for a table or a receipt."""
    if reason := _supports(spec, axis, dtype):
        return f"no kernel for {reason}"
    if spec.rounding == "stochastic" and key is not None and key.column % 16:
        return f"no kernel for random bits from column {key.column}, which is no multiple of 16"
    if reason := unavailable_because():
        return f"no kernels: {reason}"
    return None


def _register_fakes() -> None:
    def padded(x: Tensor, spec: list[int]) -> tuple[torch.SymInt | int, torch.SymInt | int]:
        columns, size = spec[14], max(spec[15], 1)
        rows, cols = x.shape
        return (-(-rows // size) * size, cols) if columns else (rows, -(-cols // size) * size)

    def operand(x: Tensor, amax, scale, signs, random, spec: list[int], dtype: torch.dtype):  # noqa: ANN001
        return x.new_empty(padded(x, spec), dtype=dtype), *(x.new_empty((), dtype=torch.float32) for _ in range(2))

    def pack(x: Tensor, amax, scale, signs, random, spec: list[int]):  # noqa: ANN001
        rule, block_rows, block_cols, columns, upright = spec[7], *spec[12:15], spec[16]
        lines, length = padded(x, spec)
        if columns and not upright:
            lines, length, block_rows, block_cols = length, lines, block_cols, block_rows
        shape = (1, 1) if rule == 0 else (-(-lines // block_rows), -(-length // block_cols))
        codes = x.new_empty((lines, -(-length // 2) if spec[2] == 3 else length), dtype=torch.uint8)
        scales = x.new_empty(shape, dtype=torch.float32 if rule in (0, 6, 7) else torch.uint8)
        return codes, scales, *(x.new_empty((), dtype=torch.float32) for _ in range(2))

    def unpack(codes: Tensor, scales: Tensor, spec: list[int], length: int, dtype: torch.dtype) -> Tensor:
        return codes.new_empty((codes.shape[0], length), dtype=dtype)

    def amax(x: Tensor, signs: Tensor | None, axis: int) -> Tensor:
        return x.new_empty((), dtype=torch.float32)

    for function in (operand, pack, unpack, amax):
        torch.library.register_fake(f"lowprec_cpu::{function.__name__}", function)


class _Call(NamedTuple):
    """What follows from a spec, an axis and a use, found once: linears call often, and between GEMMs Python is slow."""

    integers: tuple[int, ...]
    signs: Tensor | None  # those that are always the same
    has_scale: bool
    has_amax: bool

    def drawn(self, spec: QuantSpec, key: RandomKey | None) -> tuple[Tensor | None, Tensor | None]:
        """Signs, and the words of the random bits."""
        if not spec.draws:
            return self.signs, None
        signs = self.signs
        if spec.hadamard and signs is None:
            signs = _divided(sign_vector(spec.hadamard, spec.signs, key))
        if spec.rounding != "stochastic":
            return signs, None
        assert key is not None, "stochastic rounding needs a key"
        return signs, torch.tensor([*key.words(), key.step, key.row, key.column])


def _divided(signs: Tensor) -> Tensor:
    """By sqrt(size): the rotation multiplies by them first."""
    return signs * signs.numel() ** -0.5


@cache
def _call(spec: QuantSpec, axis: Axis, use: Use) -> _Call:
    fixed = spec.hadamard and spec.signs not in ("run", "call")
    signs = _divided(sign_vector(spec.hadamard, spec.signs)) if fixed else None
    has_amax = spec.two_level or spec.block == "tensor"
    return _Call(integers(spec, axis, use), signs, has_amax or spec.three_quarters, has_amax)


def operand(
    x: Tensor,
    spec: QuantSpec,
    *,
    axis: Axis = -1,
    key: RandomKey | None = None,
    amax: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Operand:
    """Quantize and decode for a GEMM; equal to `reference.operand`, for what `supports` allows.

    x:      [rows, cols] float32 or bfloat16 on the CPU (or meta); made contiguous if it is not
    key:    for stochastic rounding and random signs
    amax:   FP32 scalar instead of the tensor's own amax (NVFP4 and per-tensor FP8)
    scale:  FP32 scalar, encode scale of delayed scaling; the amax of x is then found in the same pass
    dtype:  of the values, bfloat16 or float32; UsageError if it cannot hold them
    """
    check_operand_dtype(spec, dtype)
    call = _call(spec, axis, "operand")
    signs, random = call.drawn(spec, key)
    values, after, found = torch.ops.lowprec_cpu.operand.default(
        x.contiguous(), amax, scale, signs, random, call.integers, dtype
    )
    return Operand(values, after if call.has_scale else None, found if call.has_amax else None)


def quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    axis: Axis = -1,
    key: RandomKey | None = None,
    amax: Tensor | None = None,
    scale: Tensor | None = None,
    upright: bool = False,
) -> QuantizedTensor:
    """Quantize into packed codes and scales; equal to `reference.quantize`. Arguments as `operand`.

    upright: in the layout of that name (`QuantizedTensor`), which takes less time to make and to decode
    """
    call = _call(spec, axis, "save" if upright else "pack")
    signs, random = call.drawn(spec, key)
    codes, scales, _, found = torch.ops.lowprec_cpu.pack.default(
        x.contiguous(), amax, scale, signs, random, call.integers
    )
    rows, cols = x.shape
    # square blocks need no columns: what they give along the rows is turned afterwards
    turn = axis == 0 and not upright and isinstance(spec.block, tuple) and spec.block[0] != 1
    if turn and spec.format.bits == 4:
        one_a_byte = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[:, :cols].T
        one_a_byte = torch.nn.functional.pad(one_a_byte, (0, rows % 2))
        codes = one_a_byte[:, ::2] | (one_a_byte[:, 1::2] << 4)
    elif turn:
        codes = codes.T
    if turn:
        codes, scales = codes.contiguous(), scales.T.contiguous()
    return QuantizedTensor(codes, scales, found if call.has_amax else None, spec, axis, (rows, cols), upright)


def unpack(packed: QuantizedTensor, dtype: torch.dtype = torch.bfloat16) -> Operand:
    """The GEMM operand of packed codes; equal to `packed.operand(dtype)`.

    Values of axis 0 are a transposed view, unless the codes are upright.
    """
    spec, axis = packed.spec, packed.axis
    check_operand_dtype(spec, dtype)
    length = packed.shape[1] if axis == -1 or packed.upright else packed.shape[0]
    if axis == -1 or not packed.upright:
        length += -length % max(spec.hadamard, 1)
    layout = integers(spec, axis, "save") if packed.upright else integers(spec, -1, "pack")
    values = torch.ops.lowprec_cpu.unpack.default(packed.codes, packed.scales, layout, length, dtype)
    scale = None
    if in_epilogue(spec):
        scale = packed.scales.squeeze()
    elif spec.two_level:
        assert packed.amax is not None
        scale = packed.amax / (spec.scale_max * spec.format.max)
    elif spec.three_quarters:
        scale = torch.tensor(4.0 / 3.0)
    return Operand(values.T if axis == 0 and not packed.upright else values, scale, packed.amax)


def amax(x: Tensor, spec: QuantSpec | None = None, *, axis: Axis = -1, key: RandomKey | None = None) -> Tensor:
    """FP32 scalar: the largest magnitude of x, or of what `spec` rotates x into. NaN if there is one."""
    signs = None
    if spec is not None and spec.hadamard:
        signs = _divided(sign_vector(spec.hadamard, spec.signs, key))
    return torch.ops.lowprec_cpu.amax(x.contiguous(), signs, axis)
