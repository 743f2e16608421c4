"""Codebooks of low-bit optimizer states: ascending FP32 numbers in [-1, 1], one a code, 1 always among them.

    dynamic   n = bits - 1 decades; decade i = 0 .. n - 1 is 10^(i - n + 1) times the midpoints of [0.1, 1] cut into
              2^i equal intervals (signed, mirrored) or 2^(i + 1) (unsigned); and 0, and 1
    linear    signed: 2 k / (2^bits - 1) - 1, k = 0 .. 2^bits - 1; unsigned: k / 2^bits, k = 1 .. 2^bits. Neither has a
              0: a second moment that decoded to 0 would make its step explode (the zero-point problem)

Signed dynamic maps have +1 and no -1. Every number is rounded as the FP32 tensors of torchao and lpmm round it, here
without depending on whether a processor fuses multiply and add.
Source: Dettmers et al., "8-bit optimizers via block-wise quantization" (arXiv 2110.02861); Li, Chen, Zhu, "Memory
efficient optimizers with 4-bit states" (arXiv 2309.01507).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def _linspace(low: float, high: float, count: int) -> Tensor:
    """FP32 [count] from low to high, from both ends to the middle, each product and sum rounded once."""
    first, last = torch.tensor([low, high]).tolist()  # as FP32 numbers
    step = ((torch.tensor(high) - torch.tensor(low)) / (count - 1)).double()
    index = torch.arange(count, dtype=torch.float64)
    return torch.where(index < count // 2, first + step * index, last - step * (count - 1 - index)).float()


def _dynamic(bits: int, signed: bool) -> Tensor:
    decades = bits - 1
    found = [torch.tensor([0.0, 1.0])]
    for i in range(decades):
        edges = _linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        values = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - decades + 1)
        found += [values, -values] if signed else [values]
    return torch.cat(found).sort().values


@cache
def codebook(kind: str, bits: int, signed: bool) -> Tensor:
    """FP32 [2^bits]; kind "dynamic" or "linear". Do not write to it."""
    if kind == "dynamic":
        return _dynamic(bits, signed)
    assert kind == "linear", kind
    return _linspace(-1.0, 1.0, 2**bits) if signed else torch.arange(1, 2**bits + 1) / 2**bits


@cache
def thresholds(kind: str, bits: int, signed: bool) -> Tensor:
    """FP32 [2^bits - 1]: midpoints between neighbours, where the nearest code changes. Do not write to it."""
    values = codebook(kind, bits, signed)
    return (values[:-1] + values[1:]) / 2
