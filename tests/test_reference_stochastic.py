"""Stochastic rounding: exact chances by trying every random byte, reproducible, and independent of slicing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowprec
from lowprec.codec import decode_table, round_to
from lowprec.formats import element_format
from lowprec.philox import RandomKey

EVERY_BYTE = torch.arange(256, dtype=torch.uint8)


def levels(name: str) -> np.ndarray:
    table = decode_table(element_format(name)).double().numpy()
    return np.unique(np.abs(table[np.isfinite(table)]))


@pytest.mark.parametrize("name", ["e2m1", "e4m3", "e5m2", "e2m3", "e3m2", "int8", "e3m4"])
def test_all_256_bytes_give_the_exact_chance(name):
    """Up for exactly floor(256 p) of 256 bytes, p the fraction of the way to the next level; a level is kept."""
    form = element_format(name)
    rng = np.random.default_rng(1)
    grid = levels(name)
    grid = grid[grid <= form.max]
    low = rng.integers(0, len(grid) - 1, 300)
    part = rng.integers(0, 1 << 12, 300) / 4096  # of the way up: exact in FP32
    x = np.concatenate((grid[low] + part * (grid[low + 1] - grid[low]), grid))
    low = np.concatenate((low, np.arange(len(grid)) - (np.arange(len(grid)) == len(grid) - 1)))
    part = (x - grid[low]) / (grid[low + 1] - grid[low])
    for sign in (1.0, -1.0):
        values = torch.from_numpy((sign * x).astype(np.float32))[:, None].expand(-1, 256)
        out = round_to(values, form, "stochastic", EVERY_BYTE.expand(len(x), 256)).double().numpy() * sign
        up = (out == grid[low + 1][:, None]).sum(1)
        down = (out == grid[low][:, None]).sum(1)
        np.testing.assert_array_equal(up + down, 256)
        np.testing.assert_array_equal(up, np.floor(256 * part))


def test_worked_boundaries():
    form = element_format("e2m1")
    cases = {
        1.75: (1.5, 2.0, 128),
        3.9: (3.0, 4.0, 230),
        1.3: (1.0, 1.5, 153),
        5.9: (4.0, 6.0, 243),
        0.1: (0.0, 0.5, 51),
    }
    for x, (low, high, count) in cases.items():
        out = round_to(torch.full((256,), x), form, "stochastic", EVERY_BYTE)
        assert (out == high).sum() == count and (out == low).sum() == 256 - count
    out = round_to(torch.tensor([7.0, 6.0, float("inf"), -9.0]), form, "stochastic", EVERY_BYTE[-4:])
    assert out.tolist() == [6, 6, 6, -6]


def test_thirty_two_bits_resolve_finer():
    form = element_format("e2m1")
    x = torch.full((4,), 1.0 + 2.0**-20)  # 2^-19 of the way from 1 to 1.5
    edge = 2**32 - 2**13
    random = torch.tensor([0, edge - 1, edge, 2**32 - 1])
    assert round_to(x, form, "stochastic", random).tolist() == [1, 1, 1.5, 1.5]
    assert (round_to(x[:1].expand(256), form, "stochastic", EVERY_BYTE) == 1).all()


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8_e4m3", "mxfp6_e2m3", "fp8_e5m2"])
def test_mean_over_many_draws(name, bits):
    """Unbiased but for 1/256 of a step at most: the mean of 2000 draws lies within 4.5 deviations of x."""
    x = torch.from_numpy(np.random.default_rng(3).uniform(-1, 1, (1, 32)).astype(np.float32))
    x[0, 0] = 1.5 if name == "mxfp4" else 1.0  # nothing saturates under the floor rule
    draws = x.expand(2000, 32).contiguous()
    y = lowprec.fake_quantize(draws, name, rounding="stochastic", random_bits=bits, seed=7, dtype=torch.float32)
    near = lowprec.fake_quantize(draws[:1], name, rounding="toward_zero", dtype=torch.float32)
    step = (y - near).abs().amax(0)
    bias = step / 256 if bits == 8 else 0.0
    assert ((y.mean(0) - x[0]).abs() <= bias + 4.5 * y.std(0) / 2000**0.5 + 1e-6).all()
    assert (y.std(0) > 0).sum() > 20


def test_chi_squared_of_rounding_up():
    """At 1.3 a step is 0.5 wide and 153 of 256 bytes round up: chi-squared over 64 groups of 1024 elements."""
    x = torch.full((256, 256), 1.3)
    x[:, ::32] = 6.0  # keeps the scale of every block at 1
    q = lowprec.quantize(x, "mxfp4", scale_rule="rceil", rounding="stochastic", seed=5)
    rest = torch.ones_like(x, dtype=torch.bool)
    rest[:, ::32] = False
    up = (q.elements()[rest].reshape(64, -1) == 1.5).double()
    p, n = 153 / 256, up.shape[1]
    chi2 = ((up.sum(1) - n * p) ** 2 / (n * p * (1 - p))).sum()
    assert 64 - 5 * 128**0.5 < chi2 < 64 + 5 * 128**0.5


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["mxfp4", "nvfp4", "mxfp8_e5m2", "fp8_block_128x128", "fp8_e5m2"]),
    rows=st.integers(1, 3),
    start=st.integers(0, 3),
    axis=st.sampled_from([-1, 0]),
    bits=st.sampled_from([8, 32]),
)
def test_slices_round_as_the_whole(name, rows, start, axis, bits):
    """Whole blocks cut out of a matrix, told where they were, are rounded as there, whatever rank has them."""
    r, c = (1, 1) if isinstance(lowprec.SPECS[name].block, str) else lowprec.SPECS[name].block
    height, width = (r, c) if axis == -1 else (c, r)
    x = torch.from_numpy(np.random.default_rng(rows).standard_normal((6 * height, 4 * width)).astype(np.float32))
    amax = x.abs().max() if name in ("nvfp4", "fp8_e5m2") else None
    key = RandomKey(seed=4, tensor="layers.0.mlp.up", slot="dgrad.a", step=9, row=2**33, column=24)
    options = {"axis": axis, "rounding": "stochastic", "random_bits": bits, "amax": amax, "dtype": torch.float32}
    whole = lowprec.fake_quantize(x, name, seed=key, **options)
    top, bottom, left = start * height, (start + rows) * height, width
    moved = replace(key, row=key.row + top, column=key.column + left)
    part = lowprec.fake_quantize(x[top:bottom, left:], name, seed=moved, **options)
    assert torch.equal(part, whole[top:bottom, left:])


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("options", [{}, {"hadamard": 16}], ids=["plain", "rotated"])
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "nvfp4_2d", "fp8_e4m3"])
def test_large_matrices_are_worked_in_parts(name, axis, options):
    """Parts (more than 2^18 elements make several) change nothing: small slices give the same numbers."""
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((1024, 640)).astype(np.float32)).bfloat16()
    options = {**options, "axis": axis, "rounding": "stochastic"}
    amax = None
    if name != "mxfp8_e4m3":
        amax = lowprec.operand(x, name, seed=0, **options).amax
    whole = lowprec.operand(x, name, seed=3, amax=amax, **options)
    for row in (0, 256, 768):
        part = lowprec.operand(x[row : row + 256], name, seed=RandomKey(seed=3, row=row), amax=amax, **options)
        assert torch.equal(part.values, whole.values[row : row + 256])
    assert torch.equal(lowprec.quantize(x, name, seed=3, amax=amax, **options).operand().values, whole.values)


def test_reproducible_and_different_elsewhere():
    x = torch.from_numpy(np.random.default_rng(6).standard_normal((64, 64)).astype(np.float32))
    options = {"rounding": "stochastic", "dtype": torch.float32}
    first = lowprec.fake_quantize(x, "nvfp4", seed=1, **options)
    assert torch.equal(first, lowprec.fake_quantize(x, "nvfp4", seed=1, **options))
    assert torch.equal(first, lowprec.fake_quantize(x, "nvfp4", seed=RandomKey(seed=1), **options))
    assert torch.equal(first, lowprec.quantize(x, "nvfp4", seed=1, rounding="stochastic").dequantize())
    for other in (2, RandomKey(seed=1, step=1), RandomKey(seed=1, slot="dgrad.a"), RandomKey(seed=1, tensor="m")):
        assert not torch.equal(first, lowprec.fake_quantize(x, "nvfp4", seed=other, **options))


def test_an_element_keeps_its_byte_whatever_the_axis():
    """Rows and columns are numbered in the matrix's own orientation."""
    x = torch.full((32, 32), 1.3)
    x[0, 0] = 6.0
    spec = {"block": "tensor", "rounding": "stochastic", "seed": 3, "scale": "pow2", "scale_rule": "amax"}
    row, column = (lowprec.quantize(x, "mxfp4", axis=axis, **spec).dequantize() for axis in (-1, 0))
    assert torch.equal(row, column) and row.unique().numel() > 2


def test_three_quarters_is_unbiased_and_without_it_is_not():
    x = torch.from_numpy(np.random.default_rng(8).standard_normal((512, 1024)).astype(np.float32))
    slope, error = {}, {}
    for shrink in (True, False):
        y = lowprec.fake_quantize(
            x, "mxfp4", three_quarters=shrink, rounding="stochastic", random_bits=32, seed=0, dtype=torch.float32
        )
        slope[shrink] = float((x * y).sum() / x.square().sum())
        error[shrink] = float((x - y).square().sum() / x.square().sum())
    assert abs(slope[True] - 1) < 1e-3 and slope[False] == pytest.approx(0.9898, abs=1e-3)
    assert error[True] == pytest.approx(0.0281, rel=0.03) and error[False] == pytest.approx(0.0252, rel=0.03)
