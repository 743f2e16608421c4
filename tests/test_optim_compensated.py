"""Exact sums of BF16 numbers against rational arithmetic, and the walks that numerics.md works out."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lowprec.compensated import fast_two_sum, grow, kahan_add, scale_pair, two_prod, two_sum


def bf16(*values: float) -> Tensor:
    return torch.tensor(values).bfloat16()


def numbers(seed: int, spread: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    power = torch.randint(-spread, spread + 1, (3000,), generator=random).float()
    return (torch.randn(3000, generator=random) * torch.exp2(power)).bfloat16()


def exact(values: Tensor) -> list[Fraction]:
    return [Fraction(v) for v in values.double().tolist()]


@pytest.mark.parametrize("spread", [0, 5, 20])
def test_sums_and_products_are_exact(spread: int) -> None:
    a, b = numbers(1, spread), numbers(2, spread)
    total, error = two_sum(a, b)
    product, rest = two_prod(a, b)
    large = torch.where(a.abs() >= b.abs(), a, b)
    small = torch.where(a.abs() >= b.abs(), b, a)
    fast = fast_two_sum(large, small)
    assert torch.equal(fast[0], total) and torch.equal(fast[1], error)
    for x, y, s, e, p, r in zip(*map(exact, (a, b, total, error, product, rest)), strict=True):
        assert s + e == x + y and p + r == x * y


def test_kahan_walk() -> None:
    """1,000 steps of -bf16(1e-3) from 1: plain BF16 stays at 1, Kahan ends at .000633, Grow at .00061."""
    step = bf16(-1e-3)
    plain, weight, compensation, pair = bf16(1.0), bf16(1.0), bf16(0.0), (bf16(1.0), bf16(0.0))
    for _ in range(1000):
        plain = plain + step
        weight, compensation = kahan_add(weight, compensation, step)
        pair = grow(pair, step)
    assert plain == 1.0
    assert (weight.double() - compensation.double()).item() == pytest.approx(0.000633, abs=1e-6)
    assert (pair[0].double() + pair[1].double()).item() == pytest.approx(0.000610, abs=1e-6)


def test_grow_walks() -> None:
    pair, plain = (bf16(1.0), bf16(0.0)), bf16(1.0)
    for _ in range(1000):
        pair, plain = grow(pair, bf16(-1e-4)), plain + bf16(-1e-4)
    assert (pair[0].item(), plain.item()) == (0.90234375, 1.0)
    assert pair[1].item() == pytest.approx(-0.00178528, abs=1e-8)
    pair, plain = (bf16(1.0), bf16(0.0)), bf16(1.0)
    for _ in range(1000):
        pair, plain = grow(pair, bf16(-3e-3)), plain + bf16(-3e-3)
    assert plain == -1.0 and (pair[0].double() + pair[1].double()).item() == pytest.approx(-2.00562, abs=1e-5)


def test_grow_from_zero() -> None:
    """The weight may be smaller than the update: Fast2Sum would lose it."""
    assert grow((bf16(2.0**-20), bf16(0.0)), bf16(1.0)) == (bf16(1.0), bf16(2.0**-20))


def test_pair_decays_where_bf16_does_not() -> None:
    pair, plain = (bf16(1.0), bf16(0.0)), bf16(1.0)
    for _ in range(1000):
        pair, plain = scale_pair(pair, 0.999), (plain.float() * 0.999).bfloat16()
    assert plain == 1.0
    assert (pair[0].double() + pair[1].double()).item() == pytest.approx(0.999**1000, rel=0.02)
