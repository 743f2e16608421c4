"""Sums of BF16 numbers that lose nothing: Kahan's, and Collage's pairs (high, low) whose unevaluated sum is the value.

Each +, - and x is one BF16 operation, rounded to nearest even; torch computes it in FP32 and rounds, which is the same,
because FP32 has more than twice the bits.

    Fast2Sum(a, b), |a| >= |b|    s = a + b;  e = b - (s - a)                                    s + e = a + b exactly
    TwoSum(a, b)                  s = a + b;  b' = s - a;  a' = s - b';  e = (a - a') + (b - b')       so, in any order
    TwoProd(a, b)                 p = a b;    e = fma(a, b, -p)                                            p + e = a b
    Grow((h, l), v)               (s, e) = TwoSum(h, v);  l = l + e;  Fast2Sum(s, l)
    Kahan(w, c, u)                y = u - c;  w' = w + y;  c' = (w' - w) - y          the value is w - c

Collage's code has Fast2Sum in Grow; TwoSum gives the same where that is exact, and is right for weights that start
at 0.
Source: Zamirai et al., "Revisiting BFloat16 training" (arXiv 2010.06192); Yu et al., "Collage" (arXiv 2405.03637).
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def fast_two_sum(a: Tensor, b: Tensor) -> Pair:
    total = a + b
    return total, b - (total - a)


def two_sum(a: Tensor, b: Tensor) -> Pair:
    total = a + b
    b_part = total - a
    a_part = total - b_part
    return total, (a - a_part) + (b - b_part)


def two_prod(a: Tensor, b: Tensor) -> Pair:
    product = a * b
    # 8 x 8 bits fit FP32, and what BF16's rounding leaves of them fits BF16
    return product, (a.float() * b.float() - product.float()).bfloat16()


def grow(pair: Pair, value: Tensor) -> Pair:
    high, low = pair
    total, error = two_sum(high, value)
    return fast_two_sum(total, low + error)


def scale_pair(pair: Pair, factor: float) -> Pair:
    """A pair times a number that is itself taken as a BF16 pair."""
    high, low = pair
    factor_high = torch.tensor(factor).bfloat16().to(high.device)
    factor_low = torch.tensor(factor - factor_high.item()).bfloat16().to(high.device)
    product, error = two_prod(high, factor_high)
    return fast_two_sum(product, (error + high * factor_low) + low * factor_high)


def kahan_add(weight: Tensor, compensation: Tensor, update: Tensor) -> Pair:
    """(weight, compensation) after adding `update`."""
    wanted = update - compensation
    total = weight + wanted
    return total, (total - weight) - wanted
