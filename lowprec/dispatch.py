"""Fused kernel or reference: the same bits either way, so the choice is one of speed alone, and it is reported.

The kernels run on CPU matrices that `kernels.supports`; everything else, GPU tensors too, takes lowprec/reference.py.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from lowprec import kernels, reference
from lowprec.formats import QuantSpec
from lowprec.philox import RandomKey
from lowprec.quantized import Axis, Operand, QuantizedTensor

log = logging.getLogger(__name__)

FUSED, PLAIN = "fused", "plain"


@cache
def path(spec: QuantSpec, axis: Axis, dtype: torch.dtype, device: str) -> str:
    """FUSED or PLAIN for a matrix of `dtype` on a `device` type; a missing kernel is said once in the log."""
    reason = "tensors on this device" if device != "cpu" else kernels.supports(spec, axis, dtype)
    if reason:
        log.warning("%s along axis %d takes the plain path: %s", spec.element, axis, reason)
    return PLAIN if reason else FUSED


def operand(
    x: Tensor, spec: QuantSpec, axis: Axis, key: RandomKey, encode_scale: Tensor | None, dtype: torch.dtype
) -> Operand:
    """Quantize and decode a matrix for a GEMM, as `reference.operand`."""
    if path(spec, axis, x.dtype, x.device.type) == FUSED:
        return kernels.operand(x, spec, axis=axis, key=key, scale=encode_scale, dtype=dtype)
    return reference.operand(x, spec, axis=axis, seed=key, encode_scale=encode_scale, dtype=dtype)


def quantize(x: Tensor, spec: QuantSpec, axis: Axis, key: RandomKey, encode_scale: Tensor | None) -> QuantizedTensor:
    """Quantize a matrix into packed codes and scales, as `reference.quantize`."""
    if path(spec, axis, x.dtype, x.device.type) == FUSED:
        return kernels.quantize(x, spec, axis=axis, key=key, scale=encode_scale)
    return reference.quantize(x, spec, axis=axis, seed=key, encode_scale=encode_scale)


def decode(packed: QuantizedTensor, dtype: torch.dtype, made_from: torch.dtype) -> Operand:
    """The GEMM operand of packed codes that `quantize` made from a matrix of dtype `made_from`."""
    if path(packed.spec, packed.axis, made_from, packed.codes.device.type) == FUSED:
        return kernels.unpack(packed, dtype)
    return packed.operand(dtype)
