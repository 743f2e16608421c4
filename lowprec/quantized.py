"""`QuantizedTensor`: packed codes and scales of one matrix, and their decoding.

Layout: the quantization axis is the last one of `codes` and `scales`: for axis 0 they are those of the transposed
matrix, contiguous, as Transformer Engine's column-wise data. Upright ones (`dispatch.save`) lie as the matrix does.

    codes   [R, K] one element a byte; 4-bit formats two a byte, [R, ceil(K / 2)], the even index in the low nibble;
            formats wider than 8 bits: int32. K is the axis' length, rounded up to whole groups of a Hadamard rotation
    scales  [ceil(R / r), ceil(K / c)] for (r, c) blocks, [R, 1] for "row", [1, 1] for "tensor": decode scales, raw
            E8M0, E4M3 or UE5M3 bytes (uint8) or float32
    amax    FP32: scalar, or [R] with row_amax; None where no scale needs it (MX and blocks of FP32 scales)

    value = element * scale * tensor scale       tensor scale: amax / (E max) with two_level, 4/3 with three_quarters

computed in FP32 in that order. Values of a rotated tensor stay rotated: both operands of a GEMM are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from errors import UsageError
from lowprec.codec import decode, pack4, unpack4
from lowprec.formats import QuantSpec
from lowprec.scales import power_of_code, scale_format, tensor_decode_scale

Axis = Literal[0, -1]


class Operand(NamedTuple):
    """A GEMM operand: the quantized numbers without the factor that belongs after the GEMM.

    values:  [rows, cols] in the asked dtype, in the matrix's own orientation
    scale:   FP32, a scalar or broadcastable to `values` ([rows, 1] or [1, cols]); None for 1.
             values * scale are the dequantized numbers
    amax:    FP32 amax of the tensor where the format needs one (also to record it for delayed scaling), else None
    """

    values: Tensor
    scale: Tensor | None
    amax: Tensor | None


def block_of(spec: QuantSpec, axis: Axis, rows: int, cols: int) -> tuple[int, int]:
    """(rows, cols) of a block in the matrix's own orientation."""
    if spec.block == "tensor":
        return max(rows, 1), max(cols, 1)
    if spec.block == "row":
        return (1, max(cols, 1)) if axis == -1 else (max(rows, 1), 1)
    lines, along = spec.block
    assert isinstance(lines, int) and isinstance(along, int)
    return (lines, along) if axis == -1 else (along, lines)


def in_epilogue(spec: QuantSpec) -> bool:
    """Whether the block scale itself is applied after the GEMM: one FP32 number for the tensor or for a line."""
    return spec.scale in ("fp32", "pow2") and spec.block in ("tensor", "row")


def post_scale(spec: QuantSpec, amax: Tensor | None, device: torch.device) -> Tensor | None:
    """The tensor scale beside block scales; same shape as amax, or scalar."""
    if spec.two_level:
        assert amax is not None
        return tensor_decode_scale(amax, spec)
    return torch.tensor(4.0 / 3.0, device=device) if spec.three_quarters else None


def check_operand_dtype(spec: QuantSpec, dtype: torch.dtype) -> None:
    """Raise UsageError where `dtype` cannot hold element * block scale exactly."""
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and spec.exact_in_bf16):
        raise UsageError(
            f"{spec.element} with {spec.scale} scales of {spec.block} is not exact in {dtype}; use dtype=torch.float32"
        )


@dataclass(frozen=True)
class QuantizedTensor:
    """See the page above; `shape` is the original matrix's, `axis` its quantization axis.

    upright: codes and scales are [rows, columns] of the matrix, whatever the axis; 4-bit ones two of a row a byte
    """

    codes: Tensor
    scales: Tensor
    amax: Tensor | None
    spec: QuantSpec
    axis: Axis
    shape: tuple[int, int]
    upright: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and amax."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.amax) if t is not None)

    def elements(self) -> Tensor:
        """Values of the elements alone, FP32 [R, K]."""
        codes, turned = self.codes, self.axis == 0 and self.upright
        if self.spec.format.bits == 4:
            length = self.shape[1] if self.axis == -1 or turned else self.shape[0]
            codes = unpack4(codes, length if turned else length + -length % max(self.spec.hadamard, 1))
        return decode(codes.T if turned else codes, self.spec.format)

    def block_scales(self) -> Tensor:
        """Values of the scales, FP32, the quantization axis last."""
        scales = self.scales.T if self.axis == 0 and self.upright else self.scales
        if self.spec.scale == "e8m0":
            return power_of_code(scales.to(torch.int32))
        if self.spec.scale in ("e4m3", "ue5m3"):
            return decode(scales, scale_format(self.spec))
        return scales

    def operand(self, dtype: torch.dtype = torch.bfloat16) -> Operand:
        """The GEMM operand, bit-equal to `lowprec.operand` of the same matrix.

        Raises UsageError where `dtype` cannot hold element * block scale.
        """
        check_operand_dtype(self.spec, dtype)
        elements, scales = self.elements(), self.block_scales()
        scale = post_scale(self.spec, self.amax, elements.device)
        if in_epilogue(self.spec):
            scale = scales.squeeze() if self.spec.block == "tensor" else scales
        else:
            lines, along = block_of(self.spec, -1, *elements.shape)
            scales = scales.repeat_interleave(lines, 0)[: elements.shape[0]]
            elements = elements * scales.repeat_interleave(along, 1)[:, : elements.shape[1]]
            if scale is not None and scale.ndim:
                scale = scale[:, None]
        values = elements.to(dtype)
        if self.axis == 0:
            values = values.T
            scale = scale.T if scale is not None and scale.ndim == 2 else scale
        return Operand(values, scale, self.amax)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, in the original orientation [rows, cols]; rotated ones stay rotated, and padded."""
        values, scale, _ = self.operand(torch.float32)
        return (values if scale is None else values * scale).to(dtype)

    def exact_in(self, dtype: torch.dtype) -> bool:
        """Whether every GEMM operand value of this tensor is the same number in `dtype` (NaN counts as itself)."""
        values = self.operand(torch.float32).values
        return bool(torch.all((values.to(dtype).float() == values) | values.isnan()))


def pack(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Codes one a number -> the layout of `QuantizedTensor.codes`."""
    return pack4(codes) if spec.format.bits == 4 else codes
