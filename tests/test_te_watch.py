"""A NaN inside Transformer Engine's layers (tests/te_cpu): which layer and leg it is laid to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowprec.linear import Shared
from lowprec.main_grads import MainGrads
from lowprec.watch import Finding, watching
from tests import te_cpu
from tests.linear_truth import INPUTS, OUTPUTS, TOKENS, draw, shared, slots_of
from tests.te_case import te_layers
from tests.test_te_swap import MLP, Block, alone, swapped

GEMMS = ("up fprop", "down fprop", "down dgrad", "down wgrad", "up dgrad", "up wgrad")


class Model(Block):
    """The whole model of a rank."""

    first = last = True


def build(policy: str, joined: bool) -> tuple[Any, Shared]:
    """A block with one LayerNormMLP, or with LayerNormLinear and Linear."""
    slots, common = slots_of(policy), shared()
    other = slots if joined else replace(slots, scheme="another")
    model, _ = swapped(Model(), dict(zip(MLP.linears, (slots, other), strict=True)), MLP, common=common)
    assert isinstance(model.mlp, te_layers.TeNormMLP) == joined
    return model, common


def first(model: Any, common: Shared, x: Tensor, dy: Tensor) -> Finding | None:
    with watching([model], common) as watch:
        model(x.clone().requires_grad_()).backward(dy)
    return watch.first


@pytest.fixture
def spoil(monkeypatch) -> Callable[[int | None], None]:
    """spoil(n): the n-th GEMM from now on gives one NaN; None: none does."""
    right = te_cpu.tex.generic_gemm
    left: list[int | None] = [None]

    def multiply(*matrices: Any, **options: Any) -> Any:
        result = right(*matrices, **options)
        if left[0] is not None:
            if left[0] == 0:
                result[0].view(-1)[0] = math.nan
            left[0] -= 1
        return result

    def set_to(count: int | None) -> None:
        left[0] = count

    monkeypatch.setattr(te_cpu.tex, "generic_gemm", multiply)
    return set_to


X, DY = draw(1, TOKENS, INPUTS), draw(1, TOKENS, INPUTS, spread=1e-3)


@pytest.mark.parametrize("policy", ["mxfp8", "mxfp4"])
def test_a_fused_layer_is_named_for_what_its_gemms_make(policy, spoil):
    model, common = build(policy, True)
    for index, gemm in enumerate(GEMMS):
        spoil(index)
        found = first(model, common, X, DY)
        assert found is not None and found.module == "mlp", (gemm, found)
        assert found.leg == ("forward" if "fprop" in gemm else "backward"), (gemm, found)
        spoil(None)
        assert first(model, common, X, DY) is None


@pytest.mark.parametrize("policy", ["mxfp8", "mxfp4"])
def test_layers_of_one_linear_are_told_apart(policy, spoil):
    model, common = build(policy, False)
    expected = {
        "up fprop": ("mlp.gate_up", "forward"),  # or its norm
        "down fprop": ("mlp.down", "fprop"),
        "down dgrad": ("mlp.down", "dgrad"),
        "down wgrad": ("mlp.down", "wgrad"),
        "up dgrad": ("mlp.gate_up", "backward"),
        "up wgrad": ("mlp.gate_up", "backward"),
    }
    for index, gemm in enumerate(GEMMS):
        spoil(index)
        found = first(model, common, X, DY)
        assert found is not None and (found.module, found.leg) == expected[gemm], (gemm, found)
    spoil(None)
    assert first(model, common, X, DY) is None


@pytest.mark.parametrize("joined", [True, False])
def test_weights_inputs_and_gradients_from_outside_are_no_fault_of_the_layer(joined):
    model, common = build("mxfp8", joined)
    wrong = torch.zeros_like(X)
    wrong.view(-1)[3] = math.nan
    found = first(model, common, X + wrong, DY)
    assert found is not None and (found.module, found.what) == ("model", "input of norm")
    found = first(model, common, X, DY + wrong)
    assert found is not None and found.module == ("model" if joined else "mlp"), found
    for name, leg in (("mlp.down.weight", "fprop"), ("norm.weight", "forward")):
        model, common = build("mxfp8", joined)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = math.nan
        found = first(model, common, X, DY)
        assert found is not None and (found.module, found.leg) == (name.removesuffix(".weight"), leg), found
        assert found.what == "the weight itself"


def test_the_dummy_gradient_of_a_weight_with_main_grad_is_not_looked_at(spoil, monkeypatch):
    """It is uninitialised memory; the accumulator is what counts."""
    common = shared()
    common.wgrad_dtype = torch.float32
    layer, part = alone(slots_of("mxfp8"), common)
    model: Any = torch.nn.ModuleDict({"linear": layer})
    model.first = model.last = True
    lent = MainGrads(None)
    lent.lend([part.weight], split=False)
    dummy = torch.full_like(part.weight, math.nan)
    monkeypatch.setattr("transformer_engine.pytorch.module.linear.get_dummy_wgrad", lambda *_, **__: dummy)
    for index, module in ((None, None), (2, "linear")):
        spoil(index)
        with watching([model], common) as watch:
            layer(X.clone().requires_grad_()).backward(draw(1, TOKENS, OUTPUTS, spread=1e-3))
        assert part.weight.grad.isnan().all() and lent.take(part.weight) is not None
        part.weight.grad = None
        if module is None:
            assert watch.first is None
        else:
            assert watch.first is not None and (watch.first.module, watch.first.leg) == (module, "wgrad")
