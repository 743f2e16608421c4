"""Element formats against ml_dtypes and a grid built here from the definition, and the checks of QuantSpec."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UsageError
from lowprec import SPECS, QuantSpec, resolve_spec
from lowprec.codec import decode, decode_table, encode, pack4, round_to, unpack4
from lowprec.formats import UE5M3, ElementFormat, element_format

NAMED = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e5m10": np.float16,
    "e8m7": ml_dtypes.bfloat16,
}
GENERIC = ["e0m1", "e0m7", "e1m2", "e1m0", "e3m0", "e4m0", "e3m4", "e5m6", "e6m9", "e7m10", "e8m0", "e8m10", "e2m10"]
ALL = [*NAMED, *GENERIC, "int8"]
ALL_BF16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)


@cache
def magnitudes(name: str) -> list[Fraction]:
    """Every finite magnitude in the order of its code, from the definition of ExMy."""
    if name == "int8":
        return [Fraction(n, 64) for n in range(128)]
    e, m = (int(part) for part in name[1:].split("m"))
    bias = 2 ** (e - 1) - 1 if e else 0
    fields = range(2**e - (1 if e >= 5 else 0))  # IEEE formats keep their last exponent for Inf and NaN
    out = []
    for field in fields:
        for f in range(2**m):
            lead, power = (1, field - bias) if field else (0, 1 - bias)
            out.append((lead + Fraction(f, 2**m)) * Fraction(2) ** power)
    return out[:-1] if name == "e4m3" else out


@cache
def grid_of(name: str) -> np.ndarray:
    return np.array([float(value) for value in magnitudes(name)])


def nearest(x: np.ndarray, name: str, rounding: str = "nearest") -> np.ndarray:
    """Oracle: index of the magnitude that |x| rounds to, saturating; FP64 comparisons that are exact at ties."""
    grid = grid_of(name)
    x = np.minimum(np.abs(x.astype(np.float64)), grid[-1])
    low = np.clip(np.searchsorted(grid, x, side="right") - 1, 0, len(grid) - 1)
    high = np.minimum(low + 1, len(grid) - 1)
    below, above = x - grid[low], grid[high] - x
    if rounding == "toward_zero":
        return low
    if rounding == "nearest_away":
        return np.where(above <= below, high, low)
    # ties to the even multiple of the step; without mantissa bits that is the upper one, but for the step from 0
    even = high if name.endswith("m0") else np.where(low % 2 == 0, low, high)
    if name.endswith("m0"):
        even = np.where(low == 0, 0, high)
    return np.where(below == above, even, np.where(below < above, low, high))


def hard_cases(name: str) -> np.ndarray:
    """Every magnitude and every midpoint, one FP32 step below, at, and above, both signs."""
    grid = grid_of(name)
    with np.errstate(over="ignore"):
        points = np.concatenate((grid, (grid[:-1] + grid[1:]) / 2, [grid[-1] * 1.01, grid[-1] * 3])).astype(np.float32)
        points = np.concatenate((points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))))
    points = points[np.isfinite(points)]
    return np.concatenate((points, -points))


@pytest.mark.parametrize("name", ALL)
def test_every_code_decodes_to_its_definition(name):
    form = element_format(name)
    table = decode_table(form).double().numpy()
    assert len(table) == 1 << form.bits
    expected = [float(value) for value in magnitudes(name)]
    assert table[: len(expected)].tolist() == expected and form.max == expected[-1]
    if name == "int8":
        assert table[128:].tolist() == [-2.0 + n / 64 for n in range(128)]
        return
    half = len(table) // 2
    np.testing.assert_array_equal(table[half:], -table[:half])
    assert np.signbit(table[half])


@pytest.mark.parametrize("name", NAMED)
def test_every_code_decodes_as_ml_dtypes(name):
    form = element_format(name)
    codes = np.arange(1 << form.bits)
    theirs = codes.astype(np.uint8 if form.bits <= 8 else np.uint16).view(NAMED[name]).astype(np.float32)
    ours = decode(torch.from_numpy(codes), form).numpy()
    np.testing.assert_array_equal(ours, theirs)  # NaN equals NaN here
    finite = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.signbit(ours[finite]), np.signbit(theirs[finite]))


def test_scale_ue5m3():
    table = decode_table(UE5M3)
    assert table[1] == 2.0**-17 and table[8] == 2.0**-14 and table[247] == 61440 == UE5M3.max
    assert table[255].isnan() and UE5M3.bits == 8 and UE5M3.nan == 255


def test_facts_of_e4m3_and_e5m2():
    e4m3, e5m2 = decode_table(element_format("e4m3")), decode_table(element_format("e5m2"))
    assert e4m3.isfinite().sum() == 254 and e4m3[e4m3.isfinite()].abs().sum() == 10815.75
    assert (e5m2.isfinite().sum(), e5m2.isnan().sum(), e5m2.isinf().sum()) == (248, 6, 2)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rounding", ["nearest", "nearest_away", "toward_zero"])
def test_rounding_of_all_bf16_and_of_every_boundary(name, rounding):
    form = element_format(name)
    grid = grid_of(name)
    for x in (ALL_BF16, hard_cases(name)):
        ours = round_to(torch.from_numpy(x), form, rounding)
        number = ~np.isnan(x)
        expected = nearest(x[number], name, rounding)
        np.testing.assert_array_equal(ours.abs().double().numpy()[number], grid[expected])
        signs = ours.signbit().numpy()[number]
        np.testing.assert_array_equal(signs, np.signbit(x[number]) & (expected > 0 if name == "int8" else True))
        assert ours[torch.from_numpy(~number)].isnan().all()
        codes = encode(ours, form).numpy()[number].astype(np.int64)
        sign = np.signbit(x[number])
        if name == "int8":
            np.testing.assert_array_equal(codes, np.where(sign, -expected, expected) & 255)
        else:
            np.testing.assert_array_equal(codes, expected + (sign.astype(np.int64) << (form.bits - 1)))


@pytest.mark.parametrize("name", NAMED)
def test_encoding_of_all_bf16_as_ml_dtypes(name):
    form = element_format(name)
    x = ALL_BF16[~np.isnan(ALL_BF16)]
    theirs = np.clip(x, -form.max, form.max).astype(NAMED[name])  # theirs overflows to NaN or Inf, ours saturates
    theirs = theirs.view(np.uint8 if form.bits <= 8 else np.uint16)
    np.testing.assert_array_equal(encode(round_to(torch.from_numpy(x), form, "nearest"), form).numpy(), theirs)


@pytest.mark.parametrize("name", ALL)
def test_nan_has_one_code_and_no_sign(name):
    form = element_format(name)
    nan = torch.tensor([0x7FC00000, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all()
    codes = encode(round_to(nan, form, "nearest"), form)
    assert codes.unique().numel() == 1
    value = decode(codes[:1], form)
    assert value.isnan() if form.nan is not None else value == form.max


@pytest.mark.parametrize("name", ALL)
def test_every_finite_code_comes_back(name):
    form = element_format(name)
    codes = torch.arange(1 << form.bits)
    values = decode(codes, form)
    finite = values.isfinite() & (values.abs() <= form.max)  # int8's -128 is never made
    for rounding in ("nearest", "nearest_away", "toward_zero"):
        rounded = round_to(values[finite], form, rounding)
        assert torch.equal(encode(rounded, form).long(), codes[finite])


def test_golden_bytes():
    x = torch.tensor([0.3, 1.0625, 1.1875, 2.0**-10, 2.0**-10 * (1 + 2.0**-20), 3 * 2.0**-10, 448, 464, 0.001, 1e9])
    form = element_format("e4m3")
    assert encode(round_to(x, form, "nearest"), form).tolist() == [0x2A, 0x38, 0x3A, 0, 1, 2, 0x7E, 0x7E, 1, 0x7E]
    form = element_format("e5m2")
    assert encode(round_to(x[[0, 6, 8]], form, "nearest"), form).tolist() == [0x35, 0x5F, 0x14]


@given(width=st.integers(1, 9), rows=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_packing_of_four_bits(width, rows, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (rows, width), dtype=np.uint8))
    packed = pack4(codes)
    assert packed.shape == (rows, -(-width // 2)) and packed[0, 0] & 15 == codes[0, 0]
    assert torch.equal(unpack4(packed, width), codes)


def test_named_specs():
    assert list(SPECS) == [
        *("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4", "nvfp4_2d"),
        *("fp8_e4m3", "fp8_e5m2", "fp8_block_1x128", "fp8_block_128x128"),
    ]
    assert all(spec.exact_in_bf16 for spec in SPECS.values())
    assert not resolve_spec("fp8_block_1x128", scale="fp32").exact_in_bf16
    assert not resolve_spec("fp8_e4m3", element="e5m10").exact_in_bf16
    assert resolve_spec("fp8_e4m3", block="row").exact_in_bf16
    assert resolve_spec("mxfp4", block=[1, 64]).block == (1, 64)
    assert hash(resolve_spec("nvfp4"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(element="e9m3"), "element format 'e9m3' is unknown"),
        (dict(element="e0m0"), "unknown"),
        (dict(scale="bf16"), "scale is 'bf16'; use one of e8m0"),
        (dict(scale_rule="amax"), "scale e8m0 has no rule 'amax'"),
        (dict(scale="fp32"), "scale fp32 has no rule 'rceil'"),
        (dict(block=(0, 32)), "block is"),
        (dict(block="column"), "block is 'column'"),
        (dict(rounding="up"), "rounding is 'up'"),
        (dict(random_bits=16), "random_bits is 16"),
        (dict(hadamard=24), "hadamard is 24"),
        (dict(hadamard=256), "hadamard is 256"),
        (dict(two_level=True), "two_level needs"),
        (dict(row_amax=True), "row_amax needs"),
        (dict(four_over_six="mae"), "four_over_six needs"),
        (dict(amax_history=4), "amax_history is 4"),
        (dict(element="int8", scale_rule="even"), "even needs a floating-point element"),
        (dict(colour="red"), "unknown option colour"),
    ],
)
def test_wrong_specs_are_explained(options, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        resolve_spec("mxfp8_e4m3", **options)


def test_wrong_names_and_combinations():
    with pytest.raises(UsageError, match="'mxfp9' is unknown; use one of mxfp8_e4m3"):
        resolve_spec("mxfp9")
    with pytest.raises(UsageError, match="cannot go with stochastic"):
        resolve_spec("nvfp4", four_over_six="mae", rounding="stochastic")
    with pytest.raises(UsageError, match="power of two"):
        resolve_spec("nvfp4", four_over_six="mae", block=(3, 16))
    with pytest.raises(UsageError, match="three_quarters needs scale e8m0"):
        resolve_spec("nvfp4", three_quarters=True)
    with pytest.raises(UsageError):
        QuantSpec(element="e4m3", scale="e8m0", block=(1, 32))
    assert isinstance(element_format("e4m3"), ElementFormat)
