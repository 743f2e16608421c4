"""What `import lowprec` offers: the functions of reference.py, run by the fused kernels wherever these can.

The kernels are bit-equal to the reference, so which of the two runs is a matter of speed alone.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowprec import reference
from lowprec.dispatch import kernels_of
from lowprec.formats import QuantSpec, resolve_spec
from lowprec.philox import RandomKey
from lowprec.quantized import Axis, Operand, QuantizedTensor
from lowprec.reference import Inputs, checked


def quantize(
    x: Tensor,
    spec: str | QuantSpec,
    *,
    axis: int = -1,
    seed: int | RandomKey | None = None,
    amax: Tensor | None = None,
    encode_scale: Tensor | None = None,
    **options: Any,
) -> QuantizedTensor:
    """Quantize a matrix into packed codes and scales.

    x:        [rows, cols] float32, bfloat16 or float16
    spec:     a name (`lowprec.SPECS`) or a QuantSpec; `options` replace its fields
    axis:     the reduction axis that blocks lie along: -1, or 0 (codes and scales are then those of x.T)
    seed:     for stochastic rounding and random signs: an int, or the RandomKey that says where in a run x is
    amax:     FP32 amax instead of x's own, e.g. reduced over ranks: scalar, or one a line (row_amax)
    encode_scale:  FP32 encode scale of delayed scaling

    Raises UsageError for a wrong spec, shape, dtype or missing seed.
    """
    resolved, along, inputs = checked(x, spec, axis, seed, amax, encode_scale, options)
    kernels = _kernels(x, resolved, along, inputs)
    if kernels is None:
        return reference.quantize(x, resolved, axis=axis, seed=inputs.key, amax=amax, encode_scale=encode_scale)
    return kernels.quantize(x.detach(), resolved, axis=along, key=inputs.key, amax=amax, scale=encode_scale)


def operand(
    x: Tensor,
    spec: str | QuantSpec,
    *,
    axis: int = -1,
    seed: int | RandomKey | None = None,
    amax: Tensor | None = None,
    encode_scale: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Operand:
    """Quantize and decode a matrix for a GEMM: exact values in `dtype`, and the FP32 scale for the epilogue.

    Arguments as `quantize`. BF16 holds element * block scale exactly (QuantSpec.exact_in_bf16) but for magnitudes below
    2^-126, where BF16 rounds to multiples of 2^-133; specs that BF16 cannot hold need dtype=torch.float32.

    Raises UsageError as `quantize`, and where `dtype` cannot hold the values.
    """
    resolved, along, inputs = checked(x, spec, axis, seed, amax, encode_scale, options)
    kernels = _kernels(x, resolved, along, inputs)
    if kernels is None:
        key = inputs.key
        return reference.operand(x, resolved, axis=axis, seed=key, amax=amax, encode_scale=encode_scale, dtype=dtype)
    return kernels.operand(x.detach(), resolved, axis=along, key=inputs.key, amax=amax, scale=encode_scale, dtype=dtype)


def fake_quantize(
    x: Tensor,
    spec: str | QuantSpec,
    *,
    axis: int = -1,
    seed: int | RandomKey | None = None,
    amax: Tensor | None = None,
    encode_scale: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Tensor:
    """Quantize and dequantize: values * scale of `operand` in FP32, rounded once to `dtype`, in x's orientation.

    Bit-equal to quantize(...).dequantize(dtype). Arguments as `quantize`. With a Hadamard rotation the result is in
    rotated coordinates, padded to whole groups. For NVFP4 and FP8 the tensor scale makes the last rounding inexact in
    BF16: a GEMM takes `operand` instead.
    """
    resolved = resolve_spec(spec, **options)
    direct = dtype == torch.bfloat16 and resolved.exact_in_bf16 and resolved.scale == "e8m0"
    within = torch.bfloat16 if direct and not resolved.three_quarters else torch.float32
    found = operand(x, resolved, axis=axis, seed=seed, amax=amax, encode_scale=encode_scale, dtype=within)
    return (found.values if found.scale is None else found.values.mul_(found.scale)).to(dtype)


def _kernels(x: Tensor, spec: QuantSpec, axis: Axis, inputs: Inputs) -> ModuleType | None:
    """The fused kernels that can do this, or None."""
    found = kernels_of(x.device.type)
    return None if found is None or found.supports(spec, axis, x.dtype, inputs.key) else found
