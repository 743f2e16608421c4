"""Schemes that golden vectors cover only in part, against scalar numpy FP32: 4-over-6 and FP8 blocks."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowprec

F32 = np.float32
FLT_MAX = np.finfo(F32).max


def candidate(block: np.ndarray, amax: np.float32, factor: float, mode: str, largest: int):
    """Error, scale byte and elements of one block whose scale is `factor` times the plain one."""
    encode = F32(6 * largest) / amax
    scale = np.minimum(np.abs(block).max() / F32(6) * encode * F32(factor), F32(448)).astype(ml_dtypes.float8_e4m3fn)
    value = scale.astype(F32)
    multiplier = np.minimum(F32(1) / (value * (F32(1) / encode)), FLT_MAX)
    elements = np.clip(block * multiplier, F32(-6), F32(6)).astype(ml_dtypes.float4_e2m1fn).astype(F32)
    error = F32(0)
    for x, y in zip(block, elements, strict=True):
        fast = mode.endswith("fast")
        difference = y * value - x * encode if fast else y * value * amax / F32(6 * largest) - x
        error = error + (difference * difference if "mse" in mode else abs(difference))
    return error, int(scale.view(np.uint8)), elements


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(["mae", "mse", "mae_fast", "mse_fast"]),
    axis=st.sampled_from([-1, 0]),
)
@pytest.mark.parametrize("largest", [256, 448])
def test_four_over_six(largest, seed, mode, axis):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 48)).astype(F32) * F32(2) ** rng.integers(-5, 5, 48).astype(F32)
    given_x = torch.from_numpy(x if axis == -1 else x.T.copy())
    q = lowprec.quantize(given_x, "nvfp4", axis=axis, four_over_six=mode, four_over_six_max=largest)
    elements = q.elements().numpy()
    for r in range(4):
        for b in range(3):
            block = x[r, b * 16 : b * 16 + 16]
            six, four = (candidate(block, np.abs(x).max(), factor, mode, largest) for factor in (1, 1.5))
            best = four if four[0] < six[0] else six
            assert q.scales[r, b] == best[1]
            np.testing.assert_array_equal(elements[r, b * 16 : b * 16 + 16], best[2])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 140), cols=st.integers(1, 140), axis=st.sampled_from([-1, 0]))
@pytest.mark.parametrize("scale", ["pow2", "fp32"])
@pytest.mark.parametrize("name", ["fp8_block_1x128", "fp8_block_128x128"])
def test_fp8_blocks(name, scale, seed, rows, cols, axis):
    x = np.random.default_rng(seed).standard_normal((rows, cols)).astype(F32) * F32(100)
    q = lowprec.quantize(torch.from_numpy(x if axis == -1 else x.T.copy()), name, axis=axis, scale=scale)
    height, width = lowprec.SPECS[name].block
    for i in range(0, rows, height):
        for j in range(0, cols, width):
            block = x[i : i + height, j : j + width]
            encode = F32(448) / np.abs(block).max()
            if scale == "pow2":
                encode = F32(2.0 ** (np.frexp(encode)[1] - 1))
            codes = np.clip(block * encode, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            np.testing.assert_array_equal(q.codes[i : i + height, j : j + width], codes)
            assert q.scales[i // height, j // width] == F32(1) / encode
