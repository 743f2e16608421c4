"""Fused quantization kernels for GPUs, in Triton: the same results as lowprec/reference.py, bit for bit.

`supports` says what a kernel can do (None) or the reason why not; a caller takes the reference then, and says so. The
functions are those of lowprec/kernels/__init__.py, for CUDA matrices: operators of torch's library
(torch.ops.lowprec_gpu) with versions for meta and fake tensors, which may stand in compiled graphs.

With TRITON_INTERPRET=1 in the environment of the process the same kernels run on CPU matrices, slowly, under Triton's
interpreter: that is how machines without a GPU test them. Triton is imported by the first call that asks for it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowprec.formats import QuantSpec, Signs
from lowprec.hadamard import sign_vector
from lowprec.kernels.gpu.support import supports as _supports
from lowprec.philox import RandomKey
from lowprec.quantized import (
    Axis,
    Operand,
    QuantizedTensor,
    check_operand_dtype,
    in_epilogue,
    post_scale,
)

__all__ = ["amax", "available", "operand", "quantize", "supports", "unavailable_because", "unpack"]

_PLAIN = QuantSpec(element="e4m3", scale="fp32", block="tensor")  # what `amax` looks at without a spec: no rotation


@cache
def unavailable_because() -> str | None:
    """None if the kernels can run; else why not. The first call imports Triton and registers the operators."""
    try:
        from lowprec.kernels.gpu import ops
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    if not ops.interpreted():
        if not torch.cuda.is_available():
            return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on a CPU, to test them)"
        if torch.version.hip is not None:
            return "they are not tested on AMD GPUs"
        if (have := torch.cuda.get_device_capability()) < (8, 0):
            return f"the GPU has compute capability {have[0]}.{have[1]}; they need 8.0"
    ops.register()
    return None


def available() -> bool:
    """Whether the kernels can run."""
    return unavailable_because() is None


def supports(spec: QuantSpec, axis: Axis, dtype: torch.dtype, key: RandomKey | None = None) -> str | None:
    """None if a kernel can quantize a CUDA matrix of `dtype` so; else why not, in words for a table or a receipt."""
    if reason := _supports(spec, axis, dtype):
        return f"no kernel for {reason}"
    if spec.rounding == "stochastic" and key is not None and key.column % 16:
        return f"no kernel for random bits from column {key.column}, which is no multiple of 16"
    if reason := unavailable_because():
        return f"no Triton kernels: {reason}"
    return None


def _signed(word: int) -> int:
    """The low 64 bits of `word` as a signed number."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _sign_words(size: int, signs: Signs, key: RandomKey | None) -> tuple[int, int]:
    mask = sum(1 << j for j, sign in enumerate(sign_vector(size, signs, key).tolist()) if sign < 0)
    return _signed(mask), _signed(mask >> 64)


_constant_sign_words = cache(_sign_words)


def _words(spec: QuantSpec, key: RandomKey | None, rounds: bool = True) -> list[int]:
    """The five words of gpu/tile.py; those of random bits are 0 where nothing is rounded."""
    drawn, signs = (0, 0, 0), (0, 0)
    if rounds and spec.rounding == "stochastic":
        assert key is not None, "stochastic rounding needs a key"
        k0, k1 = key.words()
        drawn = _signed(k1 << 32 | k0), key.row, _signed(key.column // 16 << 32 | key.step)
    if spec.hadamard and spec.signs in ("run", "call"):
        signs = _sign_words(spec.hadamard, spec.signs, key)
    elif spec.hadamard:
        signs = _constant_sign_words(spec.hadamard, spec.signs, None)
    return [*drawn, *signs]


def _text(spec: QuantSpec) -> str:
    from lowprec.kernels.gpu import ops

    return ops.spec_text(spec)


def _has_amax(spec: QuantSpec) -> bool:
    return spec.two_level or spec.block == "tensor"


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

    x:      [rows, cols] float32 or bfloat16 on a GPU (or meta); made contiguous if it is not
    key:    for stochastic rounding and random signs
    amax:   FP32 scalar instead of the tensor's own amax (NVFP4 and per-tensor FP8)
    scale:  FP32 scalar, encode scale of delayed scaling; the amax of x is then found in the same pass
    dtype:  of the values, bfloat16 or float32; UsageError if it cannot hold them
    """
    check_operand_dtype(spec, dtype)
    values, after, found = torch.ops.lowprec_gpu.operand(
        x.contiguous(), amax, scale, _words(spec, key), _text(spec), axis, dtype
    )
    has_scale = _has_amax(spec) or spec.three_quarters
    return Operand(values, after if has_scale else None, found if _has_amax(spec) else None)


def quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    axis: Axis = -1,
    key: RandomKey | None = None,
    amax: Tensor | None = None,
    scale: Tensor | None = None,
) -> QuantizedTensor:
    """Quantize into packed codes and scales; equal to `reference.quantize`. Arguments as `operand`."""
    codes, scales, found = torch.ops.lowprec_gpu.pack(x.contiguous(), amax, scale, _words(spec, key), _text(spec), axis)
    return QuantizedTensor(codes, scales, found if _has_amax(spec) else None, spec, axis, (x.shape[0], x.shape[1]))


def unpack(packed: QuantizedTensor, dtype: torch.dtype = torch.bfloat16) -> Operand:
    """The GEMM operand of packed codes; equal to `packed.operand(dtype)`. Values of axis 0 are a transposed view."""
    spec, axis = packed.spec, packed.axis
    check_operand_dtype(spec, dtype)
    length = packed.shape[1] if axis == -1 else packed.shape[0]
    length += -length % max(spec.hadamard, 1)
    values = torch.ops.lowprec_gpu.unpack(packed.codes, packed.scales, _text(spec), length, dtype)
    scale = post_scale(spec, packed.amax, values.device)
    if in_epilogue(spec):
        scale = packed.scales.squeeze()
    return Operand(values.T if axis == 0 else values, scale, packed.amax)


def amax(x: Tensor, spec: QuantSpec | None = None, *, axis: Axis = -1, key: RandomKey | None = None) -> Tensor:
    """FP32 scalar: the largest magnitude of x, or of what `spec` rotates x into. NaN if there is one."""
    spec = spec or _PLAIN
    return torch.ops.lowprec_gpu.amax(x.contiguous(), _words(spec, key, rounds=False), _text(spec), axis)
