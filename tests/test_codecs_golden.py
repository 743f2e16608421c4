"""State codecs against torchao's and lpmm's codebooks and quantized states, and examples worked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lowprec.codebooks import codebook, thresholds
from lowprec.codecs import Codec, Extent, codec, power_of_two_scale

GOLDEN = np.load(Path(__file__).parent / "golden" / "codebooks_4bit.npz")


def nibbles(codes: Tensor, count: int) -> Tensor:
    return torch.stack((codes & 15, codes >> 4), dim=-1).view(-1)[:count]


def encoded(how: Codec, values: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """State and decoded values of a whole tensor."""
    extent, flat = Extent.whole(tuple(values.shape)), values.flatten()
    state = how.allocate(extent)
    how.encode(flat, extent, state, how.statistics(flat, extent), None)
    return state, how.decode(state, extent).view(values.shape)


@pytest.mark.parametrize(
    "key", [k for k in GOLDEN.files if k.startswith(("torchao/", "lpmm/nonlinear/", "lpmm/power-1"))]
)
def test_codebooks(key: str) -> None:
    kind = "linear" if "linear_nozero" in key or "power-1" in key else "dynamic"
    ours = codebook(kind, 8 if "8bit" in key else 4, "unsigned" not in key)
    assert torch.equal(ours, torch.from_numpy(GOLDEN[key]))


@pytest.mark.parametrize(
    "tag, name",
    [
        ("m_group128_nonlinear", "dynamic4_b128"),
        ("v_group128_power1", "linear4_b128"),
        ("v_rank1_power1", "linear4_rank1"),
    ],
)
def test_lpmm_states(tag: str, name: str) -> None:
    values = torch.from_numpy(GOLDEN[f"lpmm_in/{tag[0]}"])
    state, decoded = encoded(codec(name, signed=tag[0] == "m"), values)
    theirs = torch.from_numpy(GOLDEN[f"lpmm_q/{tag}/codes"]).flatten()
    ours = nibbles(state["codes"], values.numel())
    nonzero = values.flatten() != 0  # 0 / 0 in lpmm gives code 0, times a scale of 0; ours is the code of 0
    assert torch.equal(ours[nonzero], theirs[nonzero])
    assert torch.equal(decoded, torch.from_numpy(GOLDEN[f"lpmm_q/{tag}/dq"]))  # 0 == -0
    if name == "linear4_rank1":
        assert torch.equal(state["rows"], torch.from_numpy(GOLDEN[f"lpmm_q/{tag}/scale_dim0"]).flatten())
        assert torch.equal(state["columns"], torch.from_numpy(GOLDEN[f"lpmm_q/{tag}/scale_dim1"]).flatten())
    else:
        assert torch.equal(state["scale"], torch.from_numpy(GOLDEN[f"lpmm_q/{tag}/scale"]).flatten())


def test_dynamic_midpoints_and_codes() -> None:
    middle = [-0.775, -0.55, -0.325, -0.145, -0.055, -0.019, -0.00275]
    middle += [0.00275, 0.019, 0.055, 0.145, 0.325, 0.55, 0.775, 0.94375]
    torch.testing.assert_close(thresholds("dynamic", 4, True), torch.tensor(middle))
    values = torch.tensor([1, -1, 0.5, -0.25, 0.1, -0.05, 0.02, 0.001])
    state, decoded = encoded(codec("dynamic4_b128", signed=True), values)
    assert nibbles(state["codes"], 8).tolist() == [15, 0, 12, 3, 10, 5, 9, 7]
    assert decoded[1] == pytest.approx(-0.8875) and state["scale"].tolist() == [1.0]


def test_linear_codes_and_ties() -> None:
    values = torch.tensor([0, 0.03, 0.09375, 0.1, 0.5, 0.97, 1])
    state, decoded = encoded(codec("linear4_b128", signed=False), values)
    assert nibbles(state["codes"], 7).tolist() == [0, 0, 0, 1, 7, 15, 15]
    assert decoded.min() == 1 / 16  # never 0
    state, _ = encoded(codec("linear4_b128", signed=False, ties="up"), values)
    assert nibbles(state["codes"], 7).tolist() == [0, 0, 1, 1, 7, 15, 15]


def test_first_step_of_a_block() -> None:
    """g = (1, .1, .01, 0, ...): the codes of m / N and v / N that numerics.md works out."""
    g = torch.zeros(128)
    g[:3] = torch.tensor([1, 0.1, 0.01])
    state, _ = encoded(codec("dynamic4_b128", signed=True), 0.1 * g)
    assert nibbles(state["codes"], 4).tolist() == [15, 10, 8, 7]
    state, decoded = encoded(codec("linear4_b128", signed=False), 0.001 * g * g)
    torch.testing.assert_close(decoded[:3] / decoded[0], torch.tensor([1, 1 / 16, 1 / 16]))


def test_rank1_example() -> None:
    how = codec("linear4_rank1", signed=False)
    v = torch.tensor([[1.0, 2, 8], [4, 1, 2]])
    state, decoded = encoded(how, v)
    assert (state["rows"].tolist(), state["columns"].tolist()) == ([8.0, 4.0], [4.0, 2.0, 8.0])
    assert nibbles(state["codes"], 6).tolist() == [3, 15, 15, 15, 7, 7]  # k - 1
    assert torch.equal(decoded, v)
    outer = torch.outer(torch.rand(40), torch.rand(70))
    _, decoded = encoded(how, outer)
    assert ((decoded - outer).abs() <= torch.minimum(outer.amax(1)[:, None], outer.amax(0)) / 16 + 1e-9).all()


def test_power_of_two_scales() -> None:
    """MS-AMP's encode scales; ours are their inverses."""
    for amax, scale in ((1, 256), (448, 1), (0.3, 1024), (500, 0.5), (0.001, 262144)):
        assert float(power_of_two_scale(torch.tensor([amax]).float(), 448.0, torch.ones(1))) == 1 / scale
    assert float(power_of_two_scale(torch.tensor([0.02]), 65504.0, torch.ones(1))) == 2.0**-21
    kept = torch.tensor([0.25])
    for amax in (0.0, torch.inf, torch.nan):
        assert float(power_of_two_scale(torch.tensor([amax]), 448.0, kept)) == 0.25
    for amax in (1e-45, 3e38):  # the ends of FP32
        scale = power_of_two_scale(torch.tensor([amax]), 448.0, kept)
        assert scale > 0 and (1 / scale).isfinite() and amax / scale <= 448


@pytest.mark.parametrize("name, largest", [("fp8_e4m3", 448.0), ("fp16_scaled", 65504.0)])
def test_scaled_uses_the_range(name: str, largest: float) -> None:
    values = torch.randn(5000) * 1e-6
    state, decoded = encoded(codec(name, signed=True), values)
    stored = values.abs().max() / state["scale"]
    assert largest / 2 < stored <= largest
    dtype = torch.float8_e4m3fn if name == "fp8_e4m3" else torch.float16
    assert torch.equal(decoded, (values / state["scale"]).to(dtype).float() * state["scale"])


def test_fp8_blocks_as_torch_casts_them() -> None:
    values = torch.randn(1000) * torch.logspace(-9, 3, 1000)
    state, decoded = encoded(codec("fp8_e4m3_b256", signed=True), values)
    for i, start in enumerate(range(0, 1000, 256)):
        block = values[start : start + 256]
        scale = block.abs().amax().clamp(min=1e-12) / 448
        assert state["scale"][i] == scale
        assert torch.equal(decoded[start : start + 256], (block / scale).to(torch.float8_e4m3fn).float() * scale)
