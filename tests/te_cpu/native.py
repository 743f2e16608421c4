"""Transformer Engine's own quantizers on a CPU: what their switches say, computed by lowprec/reference.py.

Each returns what a custom quantizer would: the dequantized numbers, held in FP32, for either direction. So a test sees
whether a recipe set the switches that a policy means. Stochastic rounding draws one fixed set of bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
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

    def __init__(self, spec: QuantSpec, axis: int, *, scale: Tensor | None = None, group: Any = None) -> None:
        super().__init__(dtype=torch.float32)
        self.spec, self.axis, self.scale, self.group = spec, axis, scale, group

    def copy(self) -> _Direction:
        twin = _Direction(self.spec, self.axis, scale=self.scale, group=self.group)
        twin.internal = self.internal
        return twin

    def _maybe_cast(self, tensor: Tensor) -> Tensor:
        matrix, amax = tensor.detach().reshape(-1, tensor.shape[-1]), None
        if self.group is not None and self.spec.takes_amax:
            amax = reference.amax(matrix, self.spec, axis=self.axis, seed=0)
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.group)
        found = reference.operand(
            matrix, self.spec, axis=self.axis, seed=0, amax=amax, encode_scale=self.scale, dtype=torch.float32
        )
        return (found.values if found.scale is None else found.values * found.scale).reshape(tensor.shape)


def quantize(tensor: Tensor, quantizer: te.Quantizer) -> Any:
    """The tensor as `quantizer` would store it: as a tensor, or bare where it is `internal`."""
    (row, column), scale = specs(quantizer), None
    group = quantizer.amax_reduction_group if getattr(quantizer, "with_amax_reduction", False) else None
    if row.amax_history:  # as the kernels do: the open slot of the history takes the larger one
        quantizer.amax.copy_(torch.maximum(quantizer.amax, tensor.abs().max().float()))
        scale = quantizer.scale.reshape(())
    if row.block == "tensor":  # one set of numbers for both directions
        made = _Direction(row, -1, scale=scale, group=group)
        made.internal = quantizer.internal
        return made(tensor)
    directions = _Direction(row, -1, group=group), _Direction(column, 0, group=group)
    both = te.HybridQuantizer(rowwise_quantizer=directions[0], columnwise_quantizer=directions[1])
    both.set_usage(rowwise=quantizer.rowwise_usage, columnwise=quantizer.columnwise_usage)
    for made in (both, *directions):
        made.internal = quantizer.internal
    return both(tensor)


def gather(tensor: Any, group: Any, quantizer: te.Quantizer) -> Any:
    """What all ranks have quantized, along the first dimension: each its part, as the codes that travel."""
    held = tensor if isinstance(tensor, te.QuantizedTensorStorage) else quantizer(tensor)

    def everything(part: te.IdentityTensorStorage | None) -> te.IdentityTensorStorage | None:
        if part is None:
            return None
        mine = part.dequantize(dtype=torch.float32).contiguous()
        whole = mine.new_empty(mine.shape[0] * dist.get_world_size(group), *mine.shape[1:])
        dist.all_gather_into_tensor(whole, mine, group=group)
        return te.IdentityTensorStorage(hp_data=whole, fake_dtype=torch.float32, quantizer=part._quantizer)

    if not isinstance(held, te.HybridQuantizedTensorStorage):
        return everything(held)
    return te.HybridQuantizedTensorStorage(
        rowwise_storage=everything(held.rowwise_sub_storage),
        columnwise_storage=everything(held.columnwise_sub_storage),
        quantizer=held._quantizer,
        fake_dtype=held._dtype,
    )
