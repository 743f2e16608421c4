"""Transformer Engine's own quantizers on a CPU: what their switches say, computed by lowprec/reference.py.

Each returns what a custom quantizer would: the dequantized numbers, held in FP32, for either direction. So a test sees
whether a recipe set the switches that a policy means. Stochastic rounding draws one fixed set of bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformer_engine import pytorch as te

from lowprec import reference
from lowprec.formats import QuantSpec, resolve_spec

ELEMENTS = {te.DType.kFloat8E4M3: "e4m3", te.DType.kFloat8E5M2: "e5m2"}


def specs(quantizer: te.Quantizer) -> tuple[QuantSpec, QuantSpec]:
    """What a quantizer makes of a matrix for row-wise and for column-wise use."""
    match quantizer:
        case te.Float8Quantizer():
            spec = resolve_spec(f"fp8_{ELEMENTS[quantizer.dtype]}", amax_history=1)
        case te.Float8CurrentScalingQuantizer():
            assert quantizer.amax_epsilon == 0
            scale = "pow2" if quantizer.force_pow_2_scales else "fp32"
            spec = resolve_spec(f"fp8_{ELEMENTS[quantizer.dtype]}", scale=scale)
        case te.Float8BlockQuantizer():
            assert quantizer.amax_epsilon == 0
            scale = "pow2" if quantizer.force_pow_2_scales else "fp32"
            lines = 128 if quantizer.block_scaling_dim == 2 else 1
            element = ELEMENTS[quantizer.dtype]
            spec = resolve_spec("fp8_block_1x128", element=element, scale=scale, block=(lines, 128))
        case te.MXFP8Quantizer():
            spec = resolve_spec(f"mxfp8_{ELEMENTS[quantizer.dtype]}")
        case te.NVFP4Quantizer():
            rounding = "stochastic" if quantizer.stochastic_rounding else "nearest"
            spec = resolve_spec("nvfp4_2d" if quantizer.with_2d_quantization else "nvfp4", rounding=rounding)
            signs = "fixed" if quantizer.rht_matrix_random_sign_mask_t else "none"
            return spec, replace(spec, hadamard=16, signs=signs) if quantizer.with_rht else spec
        case _:
            raise RuntimeError("Unexpected type for quantizer")  # the compiled module's words
    return spec, spec


class _Direction(te.IdentityQuantizer):
    """Quantize and dequantize along one axis, in FP32."""

    def __init__(self, spec: QuantSpec, axis: int, scale: Tensor | None = None) -> None:
        super().__init__(dtype=torch.float32)
        self.spec, self.axis, self.scale, self.internal = spec, axis, scale, True

    def _maybe_cast(self, tensor: Tensor) -> Tensor:
        matrix = tensor.detach().reshape(-1, tensor.shape[-1])
        found = reference.operand(
            matrix, self.spec, axis=self.axis, seed=0, encode_scale=self.scale, dtype=torch.float32
        )
        return (found.values if found.scale is None else found.values * found.scale).reshape(tensor.shape)


def quantize(tensor: Tensor, quantizer: te.Quantizer) -> Any:
    """The tensor as `quantizer` would store it."""
    row, column = specs(quantizer)
    if row.block == "tensor":  # one set of numbers for both directions
        if row.amax_history:
            quantizer.amax.copy_(tensor.abs().max())
            return _Direction(row, -1, quantizer.scale.reshape(()))(tensor)
        return _Direction(row, -1)(tensor)
    both = te.HybridQuantizer(rowwise_quantizer=_Direction(row, -1), columnwise_quantizer=_Direction(column, 0))
    both.set_usage(rowwise=quantizer.rowwise_usage, columnwise=quantizer.columnwise_usage)
    both.internal = True
    return both(tensor)
