"""y = x w^T + b, multiplied in the dtype that the machine multiplies fastest.

A BF16 GEMM accumulates in FP32 and rounds once. Many CPUs have no BF16 instructions, and there the library's BF16 GEMM
is 3 to 70 times slower than its FP32 one; converting the operands (exact), multiplying in FP32 and rounding the result
is the same computation up to the order of additions. `report.flops` knows which CPUs, and
`run.build` says it as `gemm_dtype`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gemm_dtype: torch.dtype | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out] in x's dtype; gradients leave in their tensors' dtypes.

    gemm_dtype: of the products; None: x's. It must hold x's numbers exactly.
    """
    if gemm_dtype in (None, x.dtype):
        return F.linear(x, weight, bias)
    wide_bias = None if bias is None else bias.to(gemm_dtype)
    return F.linear(x.to(gemm_dtype), weight.to(gemm_dtype), wide_bias).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear with `linear`'s gemm_dtype. skip_bias: whoever uses the output adds the bias."""

    skip_bias = False

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, gemm_dtype: torch.dtype | None
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.gemm_dtype = gemm_dtype

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, None if self.skip_bias else self.bias, self.gemm_dtype)
