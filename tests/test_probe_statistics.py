"""Statistics of operands, products and gradients against closed formulas and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lowprec
from lowprec import dispatch, resolve_spec
from lowprec.apply import Precision, RunFacts
from lowprec.hadamard import rotate, sign_vector
from lowprec.philox import RandomKey
from lowprec.policy import PrecisionConfig, Slots, parse
from lowprec.probe.lab import LINES, Lab
from lowprec.probe.statistics import OperandSums, TensorSums, blockwise_range
from lowprec.quantized import Operand

KEY = RandomKey(seed=1, tensor="t", slot="dgrad.a")


def _sums(x: torch.Tensor, name: str, axis: int = -1, scale: torch.Tensor | None = None, **options) -> OperandSums:
    spec = resolve_spec(name, **options)
    packed = dispatch.quantize(x, spec, axis, KEY, scale)  # pyright: ignore[reportArgumentType]
    return OperandSums.of(x, packed, packed.operand(torch.float32), KEY)


def _gauss(rows: int = 256, cols: int = 256) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(3))


def test_a_tensor_scaled_by_its_amax_does_not_overflow_and_twice_the_scale_clips_its_upper_half():
    x = _gauss()
    assert _sums(x, "fp8_e4m3").record()["overflow"] == 0.0
    amax = x.abs().max()
    for factor in (1.0, 2.0):
        found = _sums(x, "fp8_e4m3", scale=factor * 448.0 / amax, amax_history=4).record()
        assert found["overflow"] == float((x.abs() > amax / factor * (1 + 2**-20)).float().mean())


def test_underflow_follows_the_gaussian():
    """E4M3 flushes below half its least number 2^-9, tied to zero; E2M1 below a quarter of the block's scale."""
    x, scale = _gauss(1024, 1024), torch.tensor(0.01)
    flushed = math.erf(2**-10 / float(scale) / math.sqrt(2))
    assert _sums(x, "fp8_e4m3", scale=scale, amax_history=4).record()["underflow"] == pytest.approx(flushed, rel=0.02)
    spec = resolve_spec("mxfp4")
    packed = dispatch.quantize(x, spec, -1, KEY, None)
    step = packed.block_scales().repeat_interleave(32, 1)
    want = float((x.abs() <= 0.25 * step).float().mean())
    assert OperandSums.of(x, packed, packed.operand(torch.float32), KEY).record()["underflow"] == pytest.approx(want)
    x[:, ::2] = 0.0  # zeros are no underflow, and no part of the share
    assert (
        0 < _sums(x, "fp8_e4m3", scale=scale, amax_history=4).record()["underflow"] == pytest.approx(flushed, rel=0.03)
    )


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mxfp8_e4m3", {}),
        ("nvfp4", {}),
        ("nvfp4_2d", {}),
        ("nvfp4", {"hadamard": 16, "rounding": "stochastic"}),
        ("fp8_block_1x128", {}),
        ("fp8_e5m2", {}),
        ("mxfp4", {"hadamard": 32, "rounding": "stochastic", "three_quarters": True, "signs": "call"}),
    ],
)
def test_errors_are_those_of_the_dequantized_tensor(name, options, axis):
    x = _gauss(96, 160)
    found = _sums(x, name, axis, **options).record()
    spec = resolve_spec(name, **options)
    turned = rotate(x, sign_vector(spec.hadamard, spec.signs, KEY), axis) if spec.hadamard else x
    q = lowprec.fake_quantize(x, name, axis=axis, seed=KEY, dtype=torch.float32, **options)
    error = (q - turned).double()
    assert found["mse"] == pytest.approx(float(error.square().mean()), rel=1e-5)
    assert found["relative_error"] == pytest.approx(float(error.norm() / turned.double().norm()), rel=1e-5)
    assert found["snr_db"] == pytest.approx(-20 * math.log10(found["relative_error"]))
    assert found["amax"] == pytest.approx(float(turned.abs().max()))
    packed = dispatch.quantize(x, spec, axis, KEY, None)
    scales = packed.block_scales()
    assert (found["scale_min"], found["scale_max"]) == (float(scales.min()), float(scales.max()))
    octaves = {str(int(k)): int((scales.log2().floor() == k).sum()) for k in scales.log2().floor().unique().tolist()}
    assert found["scales"] == octaves


def test_sums_of_shards_are_those_of_the_whole():
    x = _gauss(64, 256)
    whole, *parts = (_sums(each.contiguous(), "mxfp8_e4m3") for each in (x, *x.split(128, 1)))
    torch.testing.assert_close(sum(part.sums for part in parts), whole.sums, rtol=1e-5, atol=0)
    assert torch.equal(torch.stack([part.maxima for part in parts]).amax(0), whole.maxima)
    tensor, *pieces = (TensorSums.of(each) for each in (x, *x.split(100, 1)))
    torch.testing.assert_close(sum(piece.sums for piece in pieces), tensor.sums, rtol=1e-5, atol=0)


def test_statistics_of_a_plain_tensor():
    x = _gauss(33, 70) + 0.5
    x[0, 0] = 0.0
    found, double = TensorSums.of(x).record(), x.double()
    want = {"min": x.min(), "max": x.max(), "mean": double.mean(), "std": double.std()}
    want |= {"l1_norm": double.norm(1), "l2_norm": double.norm(), "cur_amax": x.abs().max()}
    want |= {"dynamic_range": x.abs().max().log2() - x.abs()[x != 0].min().log2()}
    assert found == {name: pytest.approx(float(value), rel=1e-6) for name, value in want.items()}
    y = torch.tensor([[1.0, 0, 2, 2], [8, 1, 0, 0], [1, 1, 1, 1]])
    assert float(blockwise_range(y, 2, 1)) == 3.0  # 8 over 1
    assert float(blockwise_range(torch.tensor([[1.0, 64], [0.5, 1]]), 2, 2)) == 7.0


POLICY = {
    "schemes": {
        "low": {
            "fprop": {"a": "nvfp4", "b": "nvfp4_2d"},
            "dgrad": {"a": {"spec": "nvfp4", "rounding": "stochastic"}, "b": "nvfp4_2d"},
            "wgrad": {"a": {"spec": "nvfp4", "hadamard": 16}, "b": {"spec": "nvfp4", "hadamard": 16}},
        }
    },
    "rules": [{"match": "first", "use": "low"}, {"match": "*", "use": "bf16"}],
}


def _model() -> tuple[nn.Module, Precision]:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(96, 48, bias=True))
    model.add_module("second", nn.Linear(48, 32, bias=False))
    facts = RunFacts(seed=5, steps=10, tokens_per_step=64, gemm_dtype=torch.float32)
    precision = Precision([model], parse(POLICY, "test"), PrecisionConfig(policy="test"), facts)
    precision.begin_step(3)
    return model, precision


def _grads(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), [*model.parameters(), x]))


def test_the_lab_computes_what_the_run_computes_and_leaves_it_alone():
    model, precision = _model()
    x = _gauss(64, 96).requires_grad_()
    trained = _grads(model, x)
    counts, ran = dict(precision.shared.counts), set(precision.layers["first"].ran)
    lab = Lab([model], precision, {}, ["*"])
    with lab.low(3) as sample:
        observed = _grads(model, x)
    assert all(torch.equal(a, b) for a, b in zip(trained, observed, strict=True)), "stochastic rounding included"
    with lab.high():
        exact = _grads(model, x)
    plain = nn.Sequential(nn.Linear(96, 48), nn.Linear(48, 32, bias=False))
    plain.load_state_dict({f"{i}.{k}": p for i, m in enumerate(model) for k, p in m.named_parameters()})
    for ours, theirs in zip(exact, _grads(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert dict(precision.shared.counts) == counts and precision.layers["first"].ran == ran
    assert all("forward" not in vars(module) for module in model.modules())
    assert set(sample.operands) == {("first", f"{g}.{s}") for g in ("fprop", "dgrad", "wgrad") for s in "ab"}
    assert set(sample.products) == {("first", gemm) for gemm in ("fprop", "dgrad", "wgrad")}


def test_errors_of_products_are_those_of_the_gemms():
    """At most LINES lines are looked at; here that is all of them, or every second one."""
    model, precision = _model()
    layer = precision.layers["first"]
    x = _gauss(2 * LINES, 96)
    dy = 0.1 * _gauss(2 * LINES, 48)
    lab = Lab([model], precision, {}, ["first"])
    with lab.low(3) as sample:
        leaf = x.clone().requires_grad_()
        model.first(leaf).backward(dy)
    position = precision.shared.position

    def decoded(slot: str, matrix: torch.Tensor) -> torch.Tensor:
        found: Operand = layer.operand(slot, matrix, position)
        return (found.values.float() * found.scale).double()

    weight = layer.weight.detach()
    lows = {
        "fprop": decoded("fprop.a", x) @ decoded("fprop.b", weight).T,
        "dgrad": decoded("dgrad.a", dy) @ decoded("dgrad.b", weight),
        "wgrad": decoded("wgrad.a", dy).T @ decoded("wgrad.b", x),
    }
    highs = {"fprop": x @ weight.T, "dgrad": dy @ weight, "wgrad": dy.T @ x}
    for gemm, low in lows.items():
        lines = (slice(None), slice(0, None, 2)) if gemm == "wgrad" else slice(0, None, 2)
        exact = highs[gemm].double()[lines]
        want = (low[lines] - exact).norm() / exact.norm()
        square, error = sample.products["first", gemm].tolist()
        assert math.sqrt(error / square) == pytest.approx(float(want), rel=1e-3), gemm


def test_another_policy_can_be_looked_at():
    model, precision = _model()
    low = precision.now["first"]
    lab = Lab([model], precision, {}, ["second"], {"first": Slots("bf16"), "second": low})
    with lab.low(0) as sample:
        _grads(model, _gauss(64, 96).requires_grad_())
    assert {layer for layer, _ in sample.products} == {"second"}
