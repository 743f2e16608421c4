"""What every spec promises, on any data: idempotent, monotone, equivariant to powers of two, safe at the ends; and
scalar oracles of MX and NVFP4 in numpy and ml_dtypes, written independently of the torch code."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowprec
from errors import UsageError

MX = ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8"]
NAMES = list(lowprec.SPECS)
DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
F32 = np.float32


def random_matrix(seed: int, rows: int, cols: int, *, bf16: bool = False) -> torch.Tensor:
    """Gaussian with outliers and columns of different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)) * 2.0 ** rng.integers(-6, 6, cols)
    x[rng.random(x.shape) < 0.02] *= 50
    y = torch.from_numpy(x.astype(np.float32))
    return y.bfloat16() if bf16 else y


def shapes():
    return st.tuples(
        st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 70), st.sampled_from([-1, 0]), st.booleans()
    )


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same bits."""
    return a.shape == b.shape and torch.equal(
        a.float().contiguous().view(torch.int32), b.float().contiguous().view(torch.int32)
    )


def mx_oracle(block: np.ndarray, element: str, rule: str) -> tuple[int, np.ndarray]:
    """Scale code and values of one block of ordinary numbers, in exact rationals."""
    largest = {"e4m3": 448, "e5m2": 57344, "e3m2": 28, "e2m3": Fraction(15, 2), "e2m1": 6, "int8": Fraction(127, 64)}[
        element
    ]
    emax = math.floor(math.log2(largest))
    amax = Fraction(float(np.abs(block).max()))
    if amax == 0:
        return 0, block * 0
    floor_log2 = math.frexp(float(amax))[1] - 1
    exact = amax == Fraction(2) ** floor_log2
    if rule == "floor":
        exponent = floor_log2 - emax
    elif rule == "ceil":
        exponent = floor_log2 + (not exact) - emax
    elif rule == "rceil":
        exponent = next(k for k in range(-150, 150) if amax <= largest * Fraction(2) ** k)
    else:
        bits = {"e4m3": 3, "e5m2": 2, "e3m2": 2, "e2m3": 3, "e2m1": 1}[element]
        significand = amax / Fraction(2) ** floor_log2
        rounded = math.floor(significand * 2**bits + Fraction(1, 2))
        exponent = floor_log2 + (rounded >= 2 * 2**bits) - emax
    exponent = max(exponent, -127)
    scaled = np.clip(block.astype(np.float64) / 2.0**exponent, -float(largest), float(largest))
    if element == "int8":
        rounded = np.round(scaled * 64) / 64  # numpy rounds half to even
    else:
        rounded = scaled.astype(np.float32).astype(DTYPES[element]).astype(np.float64)
    return exponent + 127, rounded * 2.0**exponent


@settings(max_examples=60, deadline=None)
@given(case=shapes(), name=st.sampled_from(MX), rule=st.sampled_from(["rceil", "floor", "ceil", "even"]))
def test_mx_against_exact_rationals(case, name, rule):
    seed, rows, cols, axis, bf16 = case
    element = lowprec.SPECS[name].element
    if element == "int8" and rule == "even":
        return
    x = random_matrix(seed, min(rows, 34), min(cols, 67), bf16=bf16)
    q = lowprec.quantize(x, name, axis=axis, scale_rule=rule)
    y, lines = q.dequantize(), x.float().numpy()
    y, lines = (y.numpy(), lines) if axis == -1 else (y.T.numpy(), lines.T)
    for r in range(0, len(lines), 7):
        for b in range(0, lines.shape[1], 32):
            code, values = mx_oracle(lines[r, b : b + 32], element, rule)
            assert q.scales[r, b // 32] == code
            np.testing.assert_array_equal(y[r, b : b + 32], values)


def nvfp4_oracle(line: np.ndarray, amax: np.float32) -> tuple[list[int], np.ndarray]:
    """Scale bytes and values of one line, numpy FP32 scalar by scalar."""
    encode = F32(1) if amax == 0 else min(F32(2688) / amax, np.finfo(F32).max)
    bytes_, out = [], []
    for b in range(0, len(line), 16):
        block = line[b : b + 16]
        product = np.abs(block).max() * (encode * (F32(1) / F32(6)))
        scale = np.minimum(product, F32(448)).astype(ml_dtypes.float8_e4m3fn)
        bytes_.append(int(scale.view(np.uint8)))
        with np.errstate(divide="ignore", over="ignore"):
            multiplier = np.minimum(F32(1) / (scale.astype(F32) * (F32(1) / encode)), np.finfo(F32).max)
            elements = np.clip(block * multiplier, F32(-6), F32(6)).astype(ml_dtypes.float4_e2m1fn).astype(F32)
        out.append(elements * scale.astype(F32) * (amax / F32(2688)))
    return bytes_, np.concatenate(out)


@settings(max_examples=40, deadline=None)
@given(case=shapes(), row_amax=st.booleans(), size=st.sampled_from([1.0, 1e-30, 1e30]))
def test_nvfp4_against_numpy(case, row_amax, size):
    seed, rows, cols, axis, bf16 = case
    x = (random_matrix(seed, rows, cols) * size).to(torch.bfloat16 if bf16 else torch.float32)
    q = lowprec.quantize(x, "nvfp4", axis=axis, row_amax=row_amax)
    lines = x.float().numpy() if axis == -1 else x.float().numpy().T
    y = q.dequantize().numpy() if axis == -1 else q.dequantize().numpy().T
    for r in range(0, len(lines), 5):
        amax = np.abs(lines[r] if row_amax else lines).max()
        bytes_, values = nvfp4_oracle(lines[r], amax)
        assert q.scales[r].tolist() == bytes_
        np.testing.assert_array_equal(y[r], values)


@settings(max_examples=120, deadline=None)
@given(case=shapes(), name=st.sampled_from(NAMES), rounding=st.sampled_from(["nearest", "nearest_away", "toward_zero"]))
def test_packed_fake_and_operand_agree(case, name, rounding):
    seed, rows, cols, axis, bf16 = case
    x = random_matrix(seed, rows, cols, bf16=bf16)
    options = {"axis": axis, "rounding": rounding}
    q = lowprec.quantize(x, name, **options)
    assert q.shape == x.shape and q.nbytes > 0 and q.codes.dtype == torch.uint8
    for dtype in (torch.float32, torch.bfloat16):
        assert equal(q.dequantize(dtype), lowprec.fake_quantize(x, name, dtype=dtype, **options))
    assert q.exact_in(torch.bfloat16)
    fast, packed, exact = lowprec.operand(x, name, **options), q.operand(), q.operand(torch.float32)
    assert equal(fast.values, packed.values) and equal(fast.values, exact.values)
    assert (fast.scale is None) == (packed.scale is None)
    if fast.scale is not None and packed.scale is not None:
        assert equal(fast.scale, packed.scale)
    # along columns is along the rows of the transpose, bit for bit
    flipped = lowprec.quantize(x.T.contiguous(), name, rounding=rounding, axis=0 if axis == -1 else -1)
    assert torch.equal(flipped.codes, q.codes) and torch.equal(flipped.scales, q.scales)


@pytest.mark.parametrize("name", NAMES)
def test_idempotent(name):
    x = random_matrix(1, 48, 160)
    once = lowprec.fake_quantize(x, name, dtype=torch.float32)
    twice = lowprec.fake_quantize(once, name, dtype=torch.float32)
    if name.startswith("nvfp4") or name in ("fp8_e4m3", "fp8_e5m2"):
        # the tensor scale itself is rounded: the grid moves by an ulp of FP32
        torch.testing.assert_close(twice, once, rtol=2.0**-21, atol=0)
    else:
        assert equal(twice, once)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("name", NAMES)
def test_monotone_within_a_block(name, axis):
    r, c = lowprec.SPECS[name].block if not isinstance(lowprec.SPECS[name].block, str) else (1, 64)
    count = r * c
    values = torch.from_numpy(np.sort(np.random.default_rng(2).standard_normal(count)).astype(np.float32))
    x = values.reshape(r, c)
    x = x if axis == -1 else x.T.contiguous()
    y = lowprec.fake_quantize(x, name, axis=axis, dtype=torch.float32)
    y = (y if axis == -1 else y.T).flatten()
    assert y.diff().ge(0).all()


@pytest.mark.parametrize("shift", [-40, -3, 1, 20])
@pytest.mark.parametrize("name", NAMES)
def test_a_power_of_two_moves_scales_only(name, shift):
    x = random_matrix(3, 32, 128)
    q, moved = lowprec.quantize(x, name), lowprec.quantize(x * 2.0**shift, name)
    assert torch.equal(q.codes, moved.codes)
    assert equal(moved.dequantize(), q.dequantize() * 2.0**shift)
    if q.spec.scale == "e8m0":
        assert torch.equal(moved.scales.int(), q.scales.int() + shift)
    elif q.spec.two_level:
        assert torch.equal(moved.scales, q.scales)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("name", NAMES)
def test_zero_tensors_and_zero_blocks(name, axis):
    q = lowprec.quantize(torch.zeros(33, 130), name, axis=axis)
    assert not q.codes.any() and not q.dequantize().any()
    x = random_matrix(4, 256, 256)
    x[:128, :128] = 0
    y = lowprec.fake_quantize(x, name, axis=axis, dtype=torch.float32)
    assert not y[:128, :128].any() and y.isfinite().all() and y[128:, 128:].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_element_is_hit_or_nearly(name):
    x = random_matrix(5, 64, 256)
    q = lowprec.quantize(x, name)
    largest, found = q.spec.format.max, q.elements().abs().max()
    # rounding a power-of-two scale costs up to half of the range; the scale never makes elements too large
    assert largest / 2 <= found <= largest
    if q.spec.scale_rule in ("rceil", "amax"):
        error = (q.dequantize() - x).abs()
        step = 2.0**-(q.spec.format.mantissa)
        assert (error <= x.abs() * step + q.block_scales().max() * largest * step).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-40, 3e38])
def test_ends_of_the_range(name, size):
    x = random_matrix(6, 16, 32)
    x = x / x.abs().max() * size
    q = lowprec.quantize(x, name)
    assert not q.dequantize().isnan().any()
    assert equal(q.dequantize(), lowprec.fake_quantize(x, name, dtype=torch.float32))
    largest = q.dequantize().abs().max()
    if size > 1:
        assert largest >= size / 2  # rounding up past FP32's end may give Inf, never less
    else:
        assert largest <= 2 * size


def test_bf16_loses_only_what_it_cannot_hold():
    tiny = random_matrix(7, 4, 32) * 2.0**-128
    assert not lowprec.quantize(tiny, "mxfp8_e4m3").exact_in(torch.bfloat16)
    huge = random_matrix(8, 4, 32)
    huge = huge / huge.abs().max() * 3.3e38
    for name in MX:
        q = lowprec.quantize(huge, name)
        assert q.exact_in(torch.bfloat16), name


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    block=st.tuples(st.integers(1, 5), st.integers(1, 9)) | st.sampled_from(["tensor", "row"]),
    scale=st.sampled_from(["e8m0", "fp32", "pow2", "e4m3", "ue5m3"]),
    element=st.sampled_from(["e4m3", "e2m1", "e3m4", "e0m5", "e5m6", "int8"]),
    axis=st.sampled_from([-1, 0]),
)
def test_any_block_scale_and_element(seed, block, scale, element, axis):
    rule = "floor" if scale == "e8m0" else "amax"
    spec = lowprec.QuantSpec(element=element, scale=scale, block=block, scale_rule=rule)
    x = random_matrix(seed, 11, 14)
    q = lowprec.quantize(x, spec, axis=axis)
    assert equal(q.dequantize(), lowprec.fake_quantize(x, spec, axis=axis, dtype=torch.float32))
    lines, along = {"tensor": (99, 99), "row": (1, 99)}.get(block, block) if isinstance(block, str) else block
    height, width = (11, 14) if axis == -1 else (14, 11)
    assert q.scales.shape == (-(-height // lines), -(-width // along))
    # a block is quantized by itself: cutting it out changes nothing
    if not isinstance(block, str):
        part = x[:lines, :along] if axis == -1 else x[:along, :lines]
        assert equal(
            lowprec.quantize(part, spec, axis=axis).dequantize(), q.dequantize()[: part.shape[0], : part.shape[1]]
        )
    # the definition, element by element
    scales = q.block_scales().double().repeat_interleave(lines, 0)[:height].repeat_interleave(along, 1)[:, :width]
    oriented = (x if axis == -1 else x.T).double()
    decoded = (q.dequantize() if axis == -1 else q.dequantize().T).double()
    step = 2.0 ** -min(spec.format.mantissa, 10)
    bound = oriented.abs().clamp(min=spec.format.max * 0.0) * step + scales * 2.0**spec.format.emin * step
    inside = oriented.abs() <= scales * spec.format.max
    assert ((decoded - oriented).abs() <= bound * 1.001)[inside].all()


def test_two_dimensional_weights_are_the_same_both_ways():
    x = random_matrix(9, 70, 50)
    for name in ("nvfp4_2d", "fp8_block_128x128"):
        row, column = lowprec.quantize(x, name), lowprec.quantize(x, name, axis=0)
        assert torch.equal(row.dequantize(), column.dequantize())


def test_given_amax_and_wrong_arguments():
    x = random_matrix(10, 8, 32)
    amax = x.abs().max()
    for name in ("nvfp4", "fp8_e4m3"):
        assert torch.equal(lowprec.quantize(x, name, amax=amax).codes, lowprec.quantize(x, name).codes)
        parts = [lowprec.fake_quantize(part, name, amax=amax, dtype=torch.float32) for part in (x[:3], x[3:])]
        assert torch.equal(torch.cat(parts), lowprec.fake_quantize(x, name, dtype=torch.float32))
    rows = x.abs().amax(1)
    assert torch.equal(
        lowprec.quantize(x, "nvfp4", row_amax=True, amax=rows).codes, lowprec.quantize(x, "nvfp4", row_amax=True).codes
    )
    for arguments, message in (
        ((x[0], "mxfp4"), "give a matrix"),
        ((x[:0], "mxfp4"), "at least one element"),
        ((x.double(), "mxfp4"), "cannot quantize torch.float64"),
    ):
        with pytest.raises(UsageError, match=message):
            lowprec.quantize(*arguments)
    with pytest.raises(UsageError, match="axis is 2"):
        lowprec.quantize(x, "mxfp4", axis=2)
    with pytest.raises(UsageError, match="need a seed"):
        lowprec.quantize(x, "mxfp4", rounding="stochastic")
    with pytest.raises(UsageError, match="take none"):
        lowprec.quantize(x, "mxfp4", amax=amax)
    with pytest.raises(UsageError, match="use dtype=torch.float32"):
        lowprec.operand(x, "fp8_block_1x128", scale="fp32")
    with pytest.raises(UsageError, match="amax_history"):
        lowprec.quantize(x, "fp8_e4m3", encode_scale=amax)


def test_nbytes():
    x = torch.ones(64, 128)
    expected = {"mxfp8_e4m3": 8192 + 256, "mxfp4": 4096 + 256, "nvfp4": 4096 + 512 + 4, "fp8_e4m3": 8192 + 4 + 4}
    assert {name: lowprec.quantize(x, name).nbytes for name in expected} == expected
