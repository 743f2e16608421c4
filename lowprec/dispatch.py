"""Fused kernel or reference: the same bits either way, so the choice is one of speed alone, and it is reported.

CPU matrices take the C++ kernels, GPU matrices the Triton ones, where these `supports` them; everything else takes
lowprec/reference.py.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from lowprec import kernels, reference
from lowprec.formats import QuantSpec
from lowprec.kernels import gpu
from lowprec.philox import RandomKey
from lowprec.quantized import Axis, Operand, QuantizedTensor

log = logging.getLogger(__name__)

FUSED, TRITON, PLAIN = "fused", "triton", "plain"
_KERNELS = {FUSED: kernels, TRITON: gpu}
_WORDS = {"cpu": FUSED, "meta": FUSED, "cuda": TRITON}


def kernels_of(device: str) -> ModuleType | None:
    """The module of the kernels for a `device` type, if there is one: `supports`, `operand`, `quantize`, `unpack`."""
    return _KERNELS[_WORDS[device]] if device in _WORDS else None


@cache
def path(spec: QuantSpec, axis: Axis, dtype: torch.dtype, device: str) -> str:
    """FUSED, TRITON or PLAIN for a matrix of `dtype` on a `device` type; a missing kernel is said once in the log."""
    found = kernels_of(device)
    reason = found.supports(spec, axis, dtype) if found else f"no kernels for {device} tensors"
    if reason:
        log.warning("%s along axis %d takes the plain path: %s", spec.element, axis, reason)
        return PLAIN
    return _WORDS[device]


def _path(x: Tensor, spec: QuantSpec, axis: Axis, key: RandomKey | None) -> str:
    """`path` of a matrix; kernels draw random bits by 16 columns, and cannot begin within them."""
    if spec.rounding == "stochastic" and key is not None and key.column % 16:
        return PLAIN
    return path(spec, axis, x.dtype, x.device.type)


def operand(
    x: Tensor,
    spec: QuantSpec,
    axis: Axis,
    key: RandomKey | None,
    encode_scale: Tensor | None,
    dtype: torch.dtype,
    amax: Tensor | None = None,
) -> Operand:
    """Quantize and decode a matrix for a GEMM, as `reference.operand`; key: where `spec.draws`."""
    if (word := _path(x, spec, axis, key)) != PLAIN:
        return _KERNELS[word].operand(x, spec, axis=axis, key=key, amax=amax, scale=encode_scale, dtype=dtype)
    return reference.operand(x, spec, axis=axis, seed=key, amax=amax, encode_scale=encode_scale, dtype=dtype)


def quantize(
    x: Tensor,
    spec: QuantSpec,
    axis: Axis,
    key: RandomKey | None,
    encode_scale: Tensor | None,
    amax: Tensor | None = None,
) -> QuantizedTensor:
    """Quantize a matrix into packed codes and scales, as `reference.quantize`."""
    if (word := _path(x, spec, axis, key)) != PLAIN:
        return _KERNELS[word].quantize(x, spec, axis=axis, key=key, amax=amax, scale=encode_scale)
    return reference.quantize(x, spec, axis=axis, seed=key, amax=amax, encode_scale=encode_scale)


def save(
    x: Tensor,
    spec: QuantSpec,
    axis: Axis,
    key: RandomKey | None,
    encode_scale: Tensor | None,
    amax: Tensor | None = None,
) -> QuantizedTensor:
    """`quantize`, in the layout that takes the least time to make and to `decode`."""
    if _path(x, spec, axis, key) == FUSED:
        return kernels.quantize(x, spec, axis=axis, key=key, amax=amax, scale=encode_scale, upright=True)
    return quantize(x, spec, axis, key, encode_scale, amax)


def amax(x: Tensor, spec: QuantSpec, axis: Axis, key: RandomKey) -> Tensor:
    """FP32 scalar: the amax that `spec` scales a matrix by, after its rotation, as `reference.amax`."""
    if (word := path(spec, axis, x.dtype, x.device.type)) != PLAIN:
        return _KERNELS[word].amax(x, spec, axis=axis, key=key)
    return reference.amax(x, spec, axis=axis, seed=key)


def decode(packed: QuantizedTensor, dtype: torch.dtype, made_from: torch.dtype) -> Operand:
    """The GEMM operand of packed codes that `quantize` made from a matrix of dtype `made_from`."""
    if (word := path(packed.spec, packed.axis, made_from, packed.codes.device.type)) != PLAIN:
        return _KERNELS[word].unpack(packed, dtype)
    return packed.operand(dtype)
