"""Worked examples that were computed elsewhere (by hand, or in numpy and ml_dtypes), and non-finite inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lowprec
import lowprec.formats
from lowprec.codec import decode
from lowprec.scales import e8m0_codes, inverse_power_of_code, power_of_code, tensor_encode_scale, two_level_multiplier


def xs(count: int, seed: int) -> np.ndarray:
    """A linear congruential generator's numbers in -4 .. 4, FP32."""
    out = []
    for _ in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        out.append(((seed >> 8) / 2**24 - 0.5) * 8)
    return np.array(out, dtype=np.float32)


def row(values) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))[None, :]


def unpacked(q: lowprec.QuantizedTensor) -> list[int]:
    return [code for byte in q.codes.flatten().tolist() for code in (byte & 15, byte >> 4)]


# amax -> code under rceil, under floor; E4M3
MX_CODES = [
    (448.0, 127, 127),
    (449.0, 128, 127),
    (447.99997, 127, 127),
    (1.0, 119, 119),
    (0.875, 118, 118),
    (0.8750001, 119, 118),
    (3.5, 120, 120),
    (7.0, 121, 121),
    (0.4375, 117, 117),
    (1e-38, 0, 0),
    (1e-45, 0, 0),
    (3.4e38, 247, 246),
    (float("inf"), 254, 254),
    (float("nan"), 255, 255),
    (0.0, 0, 0),
]


@pytest.mark.parametrize(("amax", "up", "down"), MX_CODES)
def test_mx_scale_codes(amax, up, down):
    for rule, expected in (("rceil", up), ("floor", down)):
        assert lowprec.quantize(row([amax]), "mxfp8_e4m3", scale_rule=rule).scales.tolist() == [[expected]]


def test_mxfp8_bytes():
    x = row(xs(32, 1))
    q = lowprec.quantize(x, "mxfp8_e4m3")
    assert q.scales.item() == 121
    assert bytes(q.codes[0].tolist()).hex() == "f0e8416df6e8715ef769f0e26473f07774eb6c58f1f5f6ecf46d63e7ef7076f2"
    assert float((q.dequantize() - x).norm() / x.norm()) == pytest.approx(0.026887, abs=1e-6)
    q = lowprec.quantize(x, "mxfp8_e4m3", scale_rule="floor")
    assert q.scales.item() == 120 and (x.abs() > 448 * 2.0**-7).sum() == 3  # these saturate
    assert bytes(q.codes[0].tolist()).hex() == "f8f04975fef07966fe71f8ea6c7bf87e7cf37460f9fdfef4fc756beff7787efa"


def test_mx_relative_error_of_a_gaussian():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4096, 128)).astype(np.float32))
    for element, rule, expected in (("e4m3", "rceil", 7.05e-4), ("e4m3", "floor", 8.62e-4), ("e5m2", "rceil", 2.80e-3)):
        y = lowprec.fake_quantize(x, "mxfp8_" + element, scale_rule=rule, dtype=torch.float32)
        assert float((y - x).square().mean() / x.square().mean()) == pytest.approx(expected, rel=0.03)


def test_scale_powers_reach_both_ends():
    codes = torch.tensor([0, 1, 127, 254, 255], dtype=torch.int32)
    assert power_of_code(codes)[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert inverse_power_of_code(codes)[:4].tolist() == [2.0**127, 2.0**126, 1.0, 2.0**-127]
    assert power_of_code(codes)[4].isnan() and inverse_power_of_code(codes)[4].isnan()


def test_nvfp4_bytes():
    q = lowprec.quantize(row(xs(16, 7)), "nvfp4")
    assert unpacked(q) == [13, 7, 3, 7, 15, 6, 11, 15, 15, 7, 7, 1, 9, 1, 3, 5]
    assert bytes(q.codes[0].tolist()).hex() == "7d736ffb7f171953" and q.scales.item() == 0x7E
    assert q.amax is not None and float(q.amax) == pytest.approx(3.8714957)
    encode_scale = tensor_encode_scale(q.amax, q.spec)
    assert encode_scale.view(torch.int32).item() == 0x442D938A
    assert float(two_level_multiplier(torch.tensor(448.0), encode_scale)) == pytest.approx(1.5497885)


def test_nvfp4_blocks_of_falling_size():
    x = xs(64, 3)
    x[16:32] *= 2.0**-6
    x[32:48] = 0
    x[48:] *= 2.0**-12
    q = lowprec.quantize(row(x), "nvfp4")
    assert q.amax is not None
    assert bytes(q.scales[0].tolist()).hex() == "7e4f001e"
    expected = "1d666bb45f6e5174becdd29a2b65768e" + "00" * 8 + "2e556f6aeca71f7e"
    assert bytes(q.codes[0].tolist()).hex() == expected
    encode_scale = tensor_encode_scale(q.amax, q.spec)
    multiplier = two_level_multiplier(q.block_scales()[0], encode_scale).view(torch.int32)
    assert encode_scale.view(torch.int32).item() == 0x44343A58
    assert multiplier.tolist() == [0x3FCDF989, 0x42C03E3C, 0x7F7FFFFF, 0x45CDF989]


def test_nvfp4_by_hand():
    x = row([0.9, -0.1, 0.02, 3.5] + [0] * 12 + [0.05, 0.01, -0.03, 0.002] + [0] * 12)
    y = lowprec.fake_quantize(x, "nvfp4", dtype=torch.float32)[0]
    assert y[:4].tolist() == pytest.approx([0.875, 0, 0, 3.5])
    assert y[16:20].tolist() == pytest.approx([0.0508, 0.0085, -0.0339, 0], abs=1e-4)


def test_four_over_six():
    cases = {
        7: (0x7C, [12, 5, 2, 6, 14, 5, 10, 14, 14, 6, 6, 1, 9, 1, 2, 4]),
        8: (0x78, [13, 15, 12, 7, 5, 3, 6, 7, 2, 15, 10, 13, 10, 8, 6, 13]),
    }
    for seed, (scale, codes) in cases.items():
        q = lowprec.quantize(row(xs(16, seed)), "nvfp4", four_over_six="mae")
        assert (q.scales.item(), unpacked(q)) == (scale, codes)
    assert lowprec.quantize(row(xs(16, 9)), "nvfp4", four_over_six="mae").scales.item() == 0x7C


def test_current_scaling():
    q = lowprec.quantize(row([0.02, -0.01]), "fp8_e4m3")
    assert float(1 / q.scales) == pytest.approx(22400) and float(q.scales) == pytest.approx(4.4642857e-5)
    assert lowprec.quantize(row([0.02, -0.01]), "fp8_e4m3", scale="pow2").scales.item() == 1 / 16384


@pytest.mark.parametrize(("amax", "scale"), [(1.0, 256), (3.5, 128), (3.6, 64), (449.0, 0.5), (500.0, 0.5), (0.0, 1)])
def test_power_of_two_block_scales(amax, scale):
    for name in ("fp8_block_1x128", "fp8_block_128x128"):
        assert lowprec.quantize(row([amax, 0.0]), name).scales.item() == 1 / scale


def test_mxfp8_keeps_a_nan_to_itself_and_inf_is_inf():
    x = row([1.0, float("nan"), 2.0, -3.0])
    q = lowprec.quantize(x, "mxfp8_e4m3")
    assert q.scales.item() == 120 and q.codes[0, 1] == 0x7F
    assert q.dequantize()[0, [0, 2, 3]].tolist() == [1, 2, -3] and q.dequantize()[0, 1].isnan()
    assert lowprec.quantize(row([float("nan")] * 3), "mxfp8_e4m3").scales.item() == 255
    q = lowprec.quantize(row([float("inf"), 1.0]), "mxfp8_e4m3")
    assert q.scales.item() == 254 and q.dequantize()[0, 0] == float("inf")


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxint8", "nvfp4", "fp8_e4m3", "fp8_e5m2", "fp8_block_1x128"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_bad_number_is_hidden(name, bad):
    x = torch.ones(4, 256)
    x[1, 5] = bad
    q = lowprec.quantize(x, name)
    for y in (q.dequantize(), lowprec.fake_quantize(x, name, dtype=torch.float32)):
        assert not y[1, 5].isfinite()
        np.testing.assert_array_equal(y, q.dequantize())
    if name.startswith("mx"):
        assert q.scales[1, 0] == 255 and y[0].isfinite().all() and y[1, 32:].isfinite().all()


def test_signs_of_zero():
    x = row([-0.0, -1e-9, 1.0, 0.0])
    assert unpacked(lowprec.quantize(x, "nvfp4")) == [0, 8, 7, 0]
    assert unpacked(lowprec.quantize(x, "mxfp4")) == [8, 8, 6, 0]
    assert lowprec.quantize(x, "mxfp8_e4m3").codes[0].tolist() == [0x80, 0x80, 0x78, 0]


def test_three_quarters():
    x = row([5.9] + [0.5] * 31)
    q = lowprec.quantize(x, "mxfp4", three_quarters=True, rounding="stochastic", seed=0)
    elements = q.elements()[0]
    assert elements[0] in (4, 6) and q.scales.item() == 127  # 0.75 * 5.9 = 4.425 cannot saturate
    assert torch.equal(q.dequantize()[0], elements * torch.tensor(4 / 3))
    found = lowprec.operand(x, "mxfp4", three_quarters=True)
    assert found.scale is not None and float(found.scale) == pytest.approx(4 / 3)


def test_one_level_scales():
    q = lowprec.quantize(row([6 * 2.0**10, 1.0] + [0.0] * 14 + [1e-9] * 16), "nvfp4", two_level=False, scale="ue5m3")
    assert q.block_scales().tolist() == [[1024.0, 1.0]] and q.amax is None  # a scale of zero becomes one
    q = lowprec.quantize(row([float("nan"), 1.0]), "nvfp4", two_level=False, scale="ue5m3")
    assert q.dequantize().isnan().all()
    codes = torch.arange(256)
    assert decode(codes, lowprec.formats.UE5M3).diff()[:247].gt(0).all()


def test_rules_at_the_ends():
    form = lowprec.formats.element_format("int8")
    tiny = torch.tensor([2.0**-127, 2.0**-127 * 1.5, 2.0**-126, 3.4e38])
    assert e8m0_codes(tiny, form, "ceil").tolist() == [0, 1, 1, 254]  # 2^128 is out of reach
    assert e8m0_codes(tiny, form, "floor").tolist() == [0, 0, 1, 254]
