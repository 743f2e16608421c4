"""What Transformer Engine's Python layers call of their compiled module `transformer_engine_torch`, in plain torch.

Everything accumulates in FP32 and rounds once. What is not written here raises NotImplementedError with its name when
it is called: nothing is faked.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor


def not_here(what: str) -> Callable[..., NoReturn]:
    """A function that says so when it is called."""

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"te_cpu has no {what}")

    return missing


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)
    return not_here(f"transformer_engine_torch.{name}")


class DType(IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


def _count(name: str, first: int, words: str) -> type[IntEnum]:
    return IntEnum(name, words.split(), start=first)


_OPERANDS = " ".join(f"GEMM{i}_{kind}" for i in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT"))
FP8FwdTensors = _count("FP8FwdTensors", 0, _OPERANDS)
FP8BwdTensors = _count("FP8BwdTensors", 0, " ".join(f"GRAD_OUTPUT{i} GRAD_INPUT{i}" for i in (1, 2, 3)))
CommOverlapType = _count("CommOverlapType", 0, "RS AG")


class _Numbers:
    """An enumeration of what is not here (attention, experts): its members are numbered as they are asked for."""

    def __getattr__(self, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        self.__dict__[name] = len(self.__dict__)
        return self.__dict__[name]


NVTE_Bias_Type, NVTE_Mask_Type, NVTE_Softmax_Type = _Numbers(), _Numbers(), _Numbers()
NVTE_QKV_Format, NVTE_QKV_Layout, NVTEScalingMode = _Numbers(), _Numbers(), _Numbers()
NVTERoutingMapFormat, NVTEQBHistogramMode = _Numbers(), _Numbers()
NVTE_Fused_Attn_Backend = _count("NVTE_Fused_Attn_Backend", 0, "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8")


def get_cublasLt_version() -> int:
    return 130100


def get_cudnn_version() -> int:
    return 92000


# The names and the order of arguments below are Transformer Engine's (pytorch/csrc/extensions/pybind.cpp).


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """For Transformer Engine's own quantizers; as the compiled one, this does not take any written in Python."""
    from tests.te_cpu import native  # which imports what imports this

    if noop is not None:
        raise NotImplementedError("te_cpu has no conditional quantization")
    found = native.quantize(tensor, quantizer)
    if output is not None:
        raise NotImplementedError("te_cpu has no quantization into a given tensor")
    return found


def is_native(quantizer: Any) -> bool:
    """Whether it is one of those whose codes travel: what is quantized in Python is gathered in high precision."""
    from transformer_engine.pytorch import HybridQuantizer, IdentityQuantizer

    return quantizer is not None and not isinstance(quantizer, (HybridQuantizer, IdentityQuantizer))


def gather(tensor: Any, group: Any, quantizer: Any) -> Any:
    """An all-gather of what a quantizer of Transformer Engine makes."""
    from tests.te_cpu import native

    return native.gather(tensor, group, quantizer)


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The bias gradient and the quantized gradient."""
    return gradient.reshape(-1, gradient.shape[-1]).float().sum(0).to(gradient.dtype), quantize(gradient, quantizer)


def _through(values: Tensor, quantizer: Any) -> Any:
    return values if quantizer is None else quantize(values, quantizer)


def generic_gemm(  # noqa: PLR0913
    A: Tensor,
    transA: bool,
    B: Tensor,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: DType | None,
    bias: Tensor | None,
    bias_type: DType,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, Tensor | None, Tensor | None, Tensor | None]:
    """Row-major D = alpha op(B) op(A) + bias (+ D), for A [N, K] and B [T, K] in a forward.

    With grad, `bias` asks for the sum over B's rows.
    """
    if comm_overlap is not None:
        raise NotImplementedError("te_cpu has no overlap of communication and GEMM")
    if gelu:
        raise NotImplementedError("te_cpu has no GELU in the GEMM")
    dtype = A.dtype if output_dtype is None else TORCH[DType(output_dtype)]
    a, b = (matrix.reshape(-1, matrix.shape[-1]).float() for matrix in (A, B))
    product = alpha * ((b.T if transB else b) @ (a.T if transA else a))
    bias_grad = None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = b.sum(0).to(dtype)
        else:
            product += bias.float()
    if D is not None:
        D.copy_((D.float() + product.view_as(D) if accumulate else product.view_as(D)).to(D.dtype))
        return D, bias_grad, None, extra_output
    if not transB:
        product = product.view(*B.shape[:-1], product.shape[-1])
    return _through(product.to(dtype), quantizer), bias_grad, None, extra_output


def get_fused_attn_backend(parameters: Any) -> tuple[int, str]:
    """None of cuDNN's: attention takes its unfused path, which is batched GEMMs and a softmax."""
    return NVTE_Fused_Attn_Backend.NVTE_No_Backend, "te_cpu has no cuDNN"


def scaled_softmax_forward(x: Tensor, scale: float) -> Tensor:
    """softmax(scale x) over the last dimension."""
    return torch.softmax(x.float() * scale, -1).to(x.dtype)


def scaled_masked_softmax_forward(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same, where the mask is not true."""
    return torch.softmax((x.float() * scale).masked_fill(mask.bool(), -10000.0), -1).to(x.dtype)


def _softmax_backward(gradient: Tensor, y: Tensor, scale: float) -> Tensor:
    dy, wide = gradient.float(), y.float()
    return ((dy - (dy * wide).sum(-1, keepdim=True)) * wide * scale).to(gradient.dtype)


scaled_softmax_backward = scaled_masked_softmax_backward = _softmax_backward


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + zero_centered


def _normalised(y: Tensor, shape: torch.Size, out: Tensor | None, quantizer: Any, dtype: DType) -> Any:
    y = y.to(TORCH[DType(dtype)]).view(shape)
    return _through(y if out is None else out.copy_(y), quantizer)


def layernorm_fwd(  # noqa: PLR0913
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    dtype: DType,
    _: int,
    zero_centered: bool,
) -> tuple[Any, Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) * weight + bias, the means, and the reciprocal deviations."""
    rows = _rows(x)
    mean = rows.mean(-1)
    centred = rows - mean[:, None]
    rsigma = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rsigma[:, None] * _gamma(weight, zero_centered) + bias.float()
    return _normalised(y, x.shape, out, quantizer, dtype), mean, rsigma


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, dtype: DType, _: int, zero_centered: bool
) -> tuple[Any, None, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, and the reciprocal roots."""
    rows = _rows(x)
    rsigma = torch.rsqrt(rows.square().mean(-1) + eps)
    y = rows * rsigma[:, None] * _gamma(weight, zero_centered)
    return _normalised(y, x.shape, out, quantizer, dtype), None, rsigma


def layernorm_bwd(
    dz: Tensor, x: Tensor, mean: Tensor, rsigma: Tensor, weight: Tensor, _: int, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    dy, hat = _rows(dz), (_rows(x) - mean[:, None]) * rsigma[:, None]
    g = dy * _gamma(weight, zero_centered)
    dx = rsigma[:, None] * (g - g.mean(-1, keepdim=True) - hat * (g * hat).mean(-1, keepdim=True))
    return dx.to(x.dtype).view_as(x), (dy * hat).sum(0).to(weight.dtype), dy.sum(0).to(weight.dtype)


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, _: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    dy, hat = _rows(dz), _rows(x) * rsigma[:, None]
    g = dy * _gamma(weight, zero_centered)
    dx = rsigma[:, None] * (g - hat * (g * hat).mean(-1, keepdim=True))
    return dx.to(x.dtype).view_as(x), (dy * hat).sum(0).to(weight.dtype)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _activation(function: Callable[[Tensor], Tensor]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The activation and its derivative, in FP32, rounded once."""

    def forward(x: Tensor, quantizer: Any, **options: Any) -> Any:
        return _through(function(x.float()).to(x.dtype), quantizer)

    def backward(gradient: Tensor, x: Tensor, quantizer: Any, **options: Any) -> Any:
        with torch.enable_grad():
            wide = x.detach().float().requires_grad_()
            (dx,) = torch.autograd.grad(function(wide), wide, gradient.float())
        return _through(dx.to(gradient.dtype), quantizer)

    return forward, backward


gelu, dgelu = _activation(_gelu)
swiglu, dswiglu = _activation(_swiglu)
srelu, dsrelu = _activation(_squared_relu)
