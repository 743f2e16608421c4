"""Gradients between a layer's backward and the optimizer: what they are accumulated in, what they travel in.

    a micro-batch's gradient, FP32 or BF16 from its GEMM
        -> accumulator of the micro-batches        gradients.accumulate
        -> reduce-scatter over data-parallel ranks gradients.payload (lowprec/collectives.py)
        -> accumulator of this rank's partition    gradients.accumulate
        -> read as FP32 by the optimizer, one parameter at a time

At ZeRO stages 0 and 1 the first accumulator adds up all micro-batches and there is one reduction a step; at stage 2
every micro-batch is reduced and the second one adds them up.

    fp32   sums in FP32
    bf16   each sum is rounded to BF16, to nearest even
    fp8    E4M3 with one power-of-two scale a tensor, 2^k amax <= 448 (FP8-LM, arXiv 2310.18313): each sum is computed
           in FP32 and encoded anew with its own scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errors import UsageError
from lowprec.codecs import power_of_two_scale
from lowprec.collectives import parse_payload

Accumulate = Literal["fp32", "bf16", "fp8"]
E4M3_MAX = 448.0


@dataclass(frozen=True, kw_only=True)
class GradientsConfig:
    """Accumulation and reduction of gradients.

    payload:        what travels between data-parallel ranks: fp32, bf16, fp8_e4m3, fp8_e5m2, mxfp8_e4m3, fp8_lm, ...
    accumulate:     what micro-batches add up in: fp32, bf16, or fp8 (one byte a parameter)
    two_level:      reduce in FP32 between the ranks of a node first, then in the payload between nodes
    error_feedback: add what the payload's rounding lost to the next step's gradient; it keeps one BF16 number a
                    parameter on every rank
    """

    payload: str = "fp32"
    accumulate: Accumulate = "fp32"
    error_feedback: bool = False
    two_level: bool = False

    def problems(self) -> list[str]:
        try:
            exact = parse_payload(self.payload).spec is None
        except UsageError as error:
            return [f"payload: {error}"]
        if self.error_feedback and self.two_level:
            return ["error_feedback and two_level are both true, which is not built; drop one of them"]
        if self.error_feedback and exact:
            return [f"error_feedback is true, but payload {self.payload} is not quantized; drop one of them"]
        return []


class GradientStore:
    """Accumulates one run of a gradient, FP32 [count] in and out, held in the format of `accumulate`."""

    def __init__(self, accumulate: Accumulate) -> None:
        self.accumulate = accumulate
        self._held: Tensor | None = None  # FP32, BF16, or E4M3 numbers
        self._scale: Tensor | None = None  # fp8: decode scale, FP32 [1]

    @property
    def empty(self) -> bool:
        return self._held is None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now."""
        return sum(tensor.nbytes for tensor in (self._held, self._scale) if tensor is not None)

    def add(self, values: Tensor) -> None:
        """Add a contiguous tensor; the first one may be kept as it is, so the caller must not change it afterwards."""
        values = values.reshape(-1)
        if self.accumulate == "fp8":
            self._encode(values.float() if self.empty else self.read() + values)
        elif self._held is None:
            self._held = values.to(torch.float32 if self.accumulate == "fp32" else torch.bfloat16)
        else:
            self._held.add_(values)

    def lend(self, like: Tensor) -> Tensor:
        """The live FP32 accumulator, in the shape of `like`, for a GEMM that adds to it; needs `accumulate` fp32."""
        assert self.accumulate == "fp32", self.accumulate
        if self._held is None:
            self._held = torch.zeros(like.numel(), dtype=torch.float32, device=like.device)
        return self._held.view(like.shape)

    def read(self) -> Tensor:
        """FP32 [count]; the live tensor where that is what is held."""
        assert self._held is not None, "read before anything was added"
        if self._scale is None:
            return self._held.float()
        return self._held.float().mul_(self._scale)

    def clear(self) -> None:
        self._held = self._scale = None

    def _encode(self, total: Tensor) -> None:
        amax = total.abs().amax().view(1)
        previous = torch.ones_like(amax) if self._scale is None else self._scale
        self._scale = power_of_two_scale(amax, E4M3_MAX, previous)
        # Saturating casts are ours to make: torch turns what is too large into NaN. NaN and Inf must stay visible.
        scaled = (total / self._scale).clamp_(-E4M3_MAX, E4M3_MAX)
        self._held = torch.where(total.isfinite(), scaled, torch.nan).to(torch.float8_e4m3fn)
