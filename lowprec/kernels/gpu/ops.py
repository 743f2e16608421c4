"""Launching the Triton kernels, as operators of torch's library: torch.ops.lowprec_gpu, with fake versions.

A spec travels through an operator's schema as text (`spec_text`), random words as five integers. The operators are
registered for CUDA, and for the CPU where Triton's interpreter runs the kernels.

Products and sums are not contracted into one rounding, which would change results (enable_fp_fusion=False).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from lowprec.formats import QuantSpec
from lowprec.kernels.gpu.programs import amax_kernel, quantize_kernel, unpack_kernel
from lowprec.kernels.gpu.support import Job, job
from lowprec.quantized import Axis

SCHEMAS = (
    "operand(Tensor x, Tensor? amax, Tensor? scale, int[] words, str spec, int axis, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    "pack(Tensor x, Tensor? amax, Tensor? scale, int[] words, str spec, int axis) -> (Tensor, Tensor, Tensor)",
    "unpack(Tensor codes, Tensor scales, str spec, int length, ScalarType dtype) -> Tensor",
    "amax(Tensor x, int[] words, str spec, int axis) -> Tensor",
)


@cache
def _text(spec: QuantSpec) -> str:
    return json.dumps(asdict(spec))


@torch.compiler.assume_constant_result
def spec_text(spec: QuantSpec) -> str:
    """A spec as an operator takes it; a constant to compiled graphs."""
    return _text(spec)


@cache
def _spec(text: str) -> QuantSpec:
    return QuantSpec(**json.loads(text))


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were imported)."""
    return knobs.runtime.interpret


def _launch(kernel: Any, work: Job, shape: tuple[int, int], *arguments: Any) -> None:
    """Run one program of `kernel` for each tile of a matrix of `shape`; the first argument says on which device."""
    programs = -(-shape[0] // work.tile_rows) * -(-shape[1] // work.tile_cols)
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, work, num_warps=work.warps, enable_fp_fusion=False)


def _bits(x: Tensor) -> Tensor:
    """BF16 as the kernels read and write it."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _padded(x: Tensor, spec: QuantSpec, axis: int) -> tuple[int, int]:
    """Shape after the rotation, whose groups are whole."""
    rows, cols = x.shape
    size = max(spec.hadamard, 1)
    return (-(-rows // size) * size, cols) if axis == 0 else (rows, -(-cols // size) * size)


def _packed_shapes(x: Tensor, spec: QuantSpec, axis: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the codes and of the scales, quantization axis last."""
    rows, cols = _padded(x, spec, axis)
    lines, length = (cols, rows) if axis == 0 else (rows, cols)
    r, c = spec.block if isinstance(spec.block, tuple) else (lines, length)
    assert isinstance(r, int) and isinstance(c, int)
    return (lines, -(-length // 2) if spec.format.bits == 4 else length), (-(-lines // r), -(-length // c))


def _found_amax(x: Tensor, words: list[int], spec: QuantSpec, axis: Axis) -> Tensor:
    """FP32 amax of x after its rotation; a NaN is the largest of all."""
    work, out = job(spec, axis, x.dtype), _padded(x, spec, axis)
    found = torch.zeros((), dtype=torch.int32, device=x.device)
    _launch(amax_kernel, work, out, _bits(x), found, tuple(x.shape), out, *words)
    return found.view(torch.float32)


def _quantize(
    x: Tensor,
    amax: Tensor | None,
    scale: Tensor | None,
    words: list[int],
    work: Job,
    target: Tensor,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the quantizer into `target` (and `scales`); the factor left to the GEMM and the amax, FP32 scalars."""
    spec, axis = work.spec, 0 if work.columns else -1
    out, needs_amax = _padded(x, spec, axis), work.per_tensor or spec.two_level
    assert (scale is not None) == (spec.amax_history > 0), "delayed scaling, and only it, takes a scale"
    after = torch.full((), 4.0 / 3.0, device=x.device) if spec.three_quarters else x.new_empty((), dtype=torch.float32)
    in_passing = None
    if amax is not None:
        amax = amax.to(x.device, torch.float32).reshape(()).clone()  # an operator may not return its argument
    elif needs_amax and spec.amax_history:
        in_passing = torch.zeros((), dtype=torch.int32, device=x.device)
    elif needs_amax:
        amax = _found_amax(x, words, spec, axis)
    whole = (amax, None if scale is None else scale.float(), after, in_passing)
    _launch(quantize_kernel, work, out, _bits(x), _bits(target), scales, whole, tuple(x.shape), out, *words)
    found = amax if in_passing is None else in_passing.view(torch.float32)
    return after, torch.empty_like(after) if found is None else found


def operand(
    x: Tensor, amax: Tensor | None, scale: Tensor | None, words: list[int], spec: str, axis: Axis, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Decoded values in x's orientation, the factor left to the GEMM, the amax."""
    what = _spec(spec)
    values = x.new_empty(_padded(x, what, axis), dtype=dtype)
    return values, *_quantize(x, amax, scale, words, job(what, axis, x.dtype, dtype), values, None)


def pack(
    x: Tensor, amax: Tensor | None, scale: Tensor | None, words: list[int], spec: str, axis: Axis
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales (both with the quantization axis last) and the amax."""
    what = _spec(spec)
    codes, scales, _ = _empty_pack(x, what, axis)
    after, found = _quantize(x, amax, scale, words, job(what, axis, x.dtype), codes, scales)
    return codes, after.view(1, 1) if what.block == "tensor" else scales, found


def _empty_pack(x: Tensor, spec: QuantSpec, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    shape, blocks = _packed_shapes(x, spec, axis)
    kind = torch.float32 if spec.scale in ("fp32", "pow2") else torch.uint8
    return x.new_empty(shape, dtype=torch.uint8), x.new_empty(blocks, dtype=kind), x.new_empty((), dtype=torch.float32)


def unpack(codes: Tensor, scales: Tensor, spec: str, length: int, dtype: torch.dtype) -> Tensor:
    """Values [lines, length] of packed codes, without the factor left to the GEMM."""
    values = codes.new_empty((codes.shape[0], length), dtype=dtype)
    work = job(_spec(spec), -1, torch.float32, dtype)
    shape = (codes.shape[0], length)
    _launch(unpack_kernel, work, shape, codes, scales, _bits(values), shape)
    return values


def amax(x: Tensor, words: list[int], spec: str, axis: Axis) -> Tensor:
    """FP32 scalar: the largest magnitude of what `spec` rotates x into."""
    return _found_amax(x, words, _spec(spec), axis)


def _fake_operand(
    x: Tensor, amax: Tensor | None, scale: Tensor | None, words: list[int], spec: str, axis: Axis, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_empty(_padded(x, _spec(spec), axis), dtype=dtype)
    return values, x.new_empty((), dtype=torch.float32), x.new_empty((), dtype=torch.float32)


def _fake_pack(
    x: Tensor, amax: Tensor | None, scale: Tensor | None, words: list[int], spec: str, axis: Axis
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_pack(x, _spec(spec), axis)


def _fake_unpack(codes: Tensor, scales: Tensor, spec: str, length: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((codes.shape[0], length), dtype=dtype)


def _fake_amax(x: Tensor, words: list[int], spec: str, axis: Axis) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


@cache
def register() -> None:
    """Define the operators, once."""
    fakes = (_fake_operand, _fake_pack, _fake_unpack, _fake_amax)
    for schema, function, fake in zip(SCHEMAS, (operand, pack, unpack, amax), fakes, strict=True):
        name = f"lowprec_gpu::{function.__name__}"
        torch.library.define(name, schema.removeprefix(function.__name__))
        torch.library.impl(name, ("cuda", "cpu") if interpreted() else "cuda", function)
        torch.library.register_fake(name, fake)
