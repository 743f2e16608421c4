"""What the fused GPU kernels can do, and `Job`, which tells a kernel at compile time what to do.

    element   at most 8 bits with at most 7 exponent bits, or int8
    scale     every format: e8m0 (every rule), e4m3 and ue5m3 of one or two levels, fp32, pow2
    block     (r, c) with r and c powers of two up to 128; "tensor" with fp32 and pow2 scales
    rounding  nearest, nearest_away, toward_zero, stochastic with 8 random bits
    hadamard  every size, along either axis
    dtype     float32 and bfloat16 matrices

Everything else goes to lowprec/reference.py, of which these kernels are bit-exact copies. This file needs no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from lowprec.formats import ElementFormat, QuantSpec
from lowprec.quantized import Axis, block_of
from lowprec.scales import scale_format


def _element_problem(spec: QuantSpec) -> str | None:
    form = spec.format
    if form.bits > 8 or form.exponent > 7:
        return f"element {spec.element} has more than 8 bits or 7 exponent bits"
    if spec.rounding == "stochastic" and spec.random_bits != 8:
        return f"{spec.random_bits} random bits"
    return None


def _scale_problem(spec: QuantSpec) -> str | None:
    if spec.row_amax:
        return "an amax for each line"
    if spec.four_over_six:
        return "four_over_six"
    if spec.block == "row" or spec.block == "tensor" and spec.scale not in ("fp32", "pow2"):
        return f"block '{spec.block}' with scale {spec.scale}"
    if any(isinstance(n, int) and (n > 128 or n & (n - 1)) for n in spec.block):
        return f"block {spec.block}, whose sides are not powers of two up to 128"
    return None


@cache
def supports(spec: QuantSpec, axis: Axis, dtype: torch.dtype) -> str | None:
    """None if the kernels can quantize a matrix of `dtype` so, along either axis; else what they cannot do."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"input {dtype}"
    return _element_problem(spec) or _scale_problem(spec)


@dataclass(frozen=True)
class Job:
    """What one kernel is compiled for: its only compile-time argument, read there as plain attributes.

    spec:                   how the matrix is quantized
    columns:                quantized along axis 0
    bf16_in, bf16_out:      dtype of the matrix and of decoded values, else FP32
    tile_rows, tile_cols:   what one program handles: whole blocks, rotation groups and draws of 16 random bytes
    """

    spec: QuantSpec
    columns: bool
    bf16_in: bool
    bf16_out: bool
    tile_rows: int
    tile_cols: int

    @property
    def element(self) -> ElementFormat:
        return self.spec.format

    @property
    def scale(self) -> ElementFormat:
        """Format of 8-bit floating-point scales."""
        return scale_format(self.spec)

    @property
    def per_tensor(self) -> bool:
        return self.spec.block == "tensor"

    @property
    def block_rows(self) -> int:
        return block_of(self.spec, 0 if self.columns else -1, self.tile_rows, self.tile_cols)[0]

    @property
    def block_cols(self) -> int:
        return block_of(self.spec, 0 if self.columns else -1, self.tile_rows, self.tile_cols)[1]

    @property
    def fp32_max(self) -> float:
        """Largest number of the matrix's dtype, what an infinite encode scale becomes."""
        return torch.finfo(torch.bfloat16 if self.bf16_in else torch.float32).max

    @property
    def warps(self) -> int:
        return 4 if self.tile_rows * self.tile_cols <= 4096 else 8


@cache
def job(spec: QuantSpec, axis: Axis, source: torch.dtype, target: torch.dtype | None = None) -> Job:
    """The job for a matrix of dtype `source`; `target` is the dtype of decoded values."""
    rows, cols = (64, 64) if axis == 0 else (16, 128)  # codes of axis 0 are written transposed: 64 in a run
    if isinstance(spec.block, tuple):
        block = block_of(spec, axis, 0, 0)
        rows, cols = max(rows, block[0]), max(cols, block[1])
    if axis == 0:
        rows = max(rows, spec.hadamard)
    return Job(spec, axis == 0, source == torch.bfloat16, target == torch.bfloat16, rows, cols)
