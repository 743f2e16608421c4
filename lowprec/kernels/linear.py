"""A linear's GEMMs and quantizers in one operator each way (cpu/linear_ops.cpp): the bits of lowprec/linear.py.

For linears whose six operands have fused CPU kernels and are whole on this rank. Only the calls are fewer: Python
between GEMMs, whose caches are full of matrices, takes as long as quantizing at the size of a 10 M model's linears.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.formats import QuantSpec
from lowprec.kernels import call_of
from lowprec.kernels.support import integers
from lowprec.philox import RandomKey
from lowprec.quantized import Axis, Operand, QuantizedTensor, check_operand_dtype


class Quantizer(NamedTuple):
    """One quantization as the operators take it.

    inputs:  [encode scale of delayed scaling, signs, random words], None where there are none
    dtype:   of the decoded operand
    """

    spec: QuantSpec
    axis: Axis
    inputs: list[Tensor | None]
    integers: tuple[int, ...]
    has_amax: bool
    dtype: torch.dtype


def quantizer(
    spec: QuantSpec,
    axis: Axis,
    key: RandomKey | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    *,
    packed: bool = False,
) -> Quantizer:
    """`packed`: into codes; else decoded at once. key: where `spec.draws`. Raises UsageError as `kernels.operand`."""
    check_operand_dtype(spec, dtype)
    call = call_of(spec, axis, "pack" if packed else "operand")
    return Quantizer(spec, axis, [scale, *call.drawn(spec, key)], call.integers, call.has_amax, dtype)


def forward(
    x: Tensor, a: Quantizer, w: Operand, bias: Tensor | None, saved: Quantizer, gemm_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, QuantizedTensor]:
    """y = Q(x) w^T + bias in x's dtype, the amax of Q(x) where its format has one, and the packed copy for wgrad.

    x [tokens, in]; w.values [out, in]; gemm_dtype: of products whose operands are both BF16.
    """
    y, amax, codes, scales, saved_amax = torch.ops.lowprec_cpu.linear_forward.default(
        *(x.contiguous(), a.inputs, a.integers, w.values, w.scale, bias),
        *(saved.inputs, saved.integers, a.dtype, gemm_dtype),
    )
    packed_amax = saved_amax if saved.has_amax else None
    shape = (x.shape[0], x.shape[1])
    packed = QuantizedTensor(codes, scales, packed_amax, saved.spec, saved.axis, shape)
    return y, amax if a.has_amax else None, packed


def backward(
    dy: Tensor,
    a: Quantizer,
    w: Operand,
    wgrad: Quantizer,
    packed: QuantizedTensor,
    packed_dtype: torch.dtype,
    gemm_dtype: torch.dtype,
    dw_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dx = Q(dy) w in dy's dtype, dw = Q(dy)^T x in dw_dtype, and the amaxes of both Q(dy).

    dy [tokens, out]; packed: x as `forward` gave it, decoded to packed_dtype.
    """
    length = packed.shape[0] + -packed.shape[0] % max(packed.spec.hadamard, 1)
    dx, dw, amax, wgrad_amax = torch.ops.lowprec_cpu.linear_backward.default(
        *(dy.contiguous(), a.inputs, a.integers, w.values, w.scale, wgrad.inputs, wgrad.integers),
        *(packed.codes, packed.scales, packed.amax, integers(packed.spec, -1, "pack"), length),
        *([a.dtype, wgrad.dtype, packed_dtype], gemm_dtype, dw_dtype),
    )
    return dx, dw, amax if a.has_amax else None, wgrad_amax if wgrad.has_amax else None
