"""Transformer Engine's layers in the place of a model's: names, phases, weight copies, histories, what is joined."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowprec.joints import Core, NormLinear, NormMLP
from lowprec.linear import LowPrecisionLinear, Shared
from lowprec.policy import Gemm, Slots
from tests.linear_truth import INPUTS, OUTPUTS, TOKENS, distance, draw, emulated, one_ulp, shared, slots_of
from tests.te_case import te, te_layers

HIDDEN = 64
MLP = NormMLP("norm", "mlp", "gate_up", "down", "swiglu")


class Block(nn.Module):
    """A norm and a gated MLP, as the model's."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm, bias: bool = False) -> None:
        super().__init__()
        options: dict[str, Any] = {} if norm is nn.RMSNorm else {"bias": bias}
        self.norm = norm(INPUTS, eps=1e-5, dtype=torch.bfloat16, **options)
        self.mlp = nn.ModuleDict(
            {
                "gate_up": nn.Linear(INPUTS, 2 * HIDDEN, bias=bias, dtype=torch.bfloat16),
                "down": nn.Linear(HIDDEN, INPUTS, bias=bias, dtype=torch.bfloat16),
            }
        )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(draw(*parameter.shape, spread=0.05) + ("norm.weight" in name))

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.mlp, nn.ModuleDict):
            return self.mlp(self.norm(x))
        gate, up = self.mlp["gate_up"](self.norm(x)).chunk(2, -1)
        return self.mlp["down"](F.silu(gate) * up)


def swapped(model: nn.Module, table: dict[str, Slots], *joints: Any, common: Shared | None = None, later: Any = None):
    """The model with Transformer Engine's layers, and the parts. later: the table of another phase."""
    tables = [table] if later is None else [table, later]
    return model, te_layers.TeSwap(joints)(model, list(table), tables, common or shared(), {})


def alone(slots: Slots, common: Shared | None = None) -> tuple[Any, LowPrecisionLinear]:
    """One linear, swapped, and its part."""
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(draw(OUTPUTS, INPUTS, spread=0.05))
    model, parts = swapped(nn.ModuleDict({"linear": linear}), {"linear": slots}, common=common)
    assert isinstance(model, nn.ModuleDict)
    return model["linear"], parts["linear"]


def without_rotation(slots: Slots) -> Slots:
    a, b = slots.wgrad.a, slots.wgrad.b
    assert a is not None and b is not None
    return replace(slots, wgrad=Gemm(replace(a, hadamard=0), replace(b, hadamard=0)))


MXFP4 = slots_of("mxfp4")
NVFP4 = slots_of("nvfp4", rounding="nearest")


@pytest.mark.parametrize(
    ("before", "after", "recipe"),
    [
        (MXFP4, replace(MXFP4, dgrad=Gemm(), wgrad=Gemm()), "CustomRecipe"),
        (NVFP4, without_rotation(NVFP4), "NVFP4BlockScaling"),  # one class of recipe, of which it would keep the old
        (slots_of("mxfp8"), NVFP4, "NVFP4BlockScaling"),
        (slots_of("mxfp8"), MXFP4, "CustomRecipe"),
        (slots_of("mxfp8"), replace(slots_of("mxfp8"), fprop=Gemm(), dgrad=Gemm(), wgrad=Gemm()), None),
    ],
)
def test_a_phase_changes_what_is_multiplied(before, after, recipe, recwarn):
    layer, part = alone(before)
    x, dy = draw(1, TOKENS, INPUTS), draw(1, TOKENS, OUTPUTS, spread=1e-3)
    for slots in (before, after):
        part.use(slots)
        inputs = x.clone().requires_grad_()
        layer.weight.grad = None
        layer(inputs).backward(dy)
        truth = emulated(layer.weight, None, x, dy, slots, "linear")
        assert one_ulp(inputs.grad, truth["dx"])
        assert one_ulp(layer.weight.grad, truth["dw"])
    assert recipe is None or type(layer.recipe).__name__ == recipe
    assert not recwarn.list


@pytest.mark.parametrize("policy", ["mxfp4", "mxfp8", "fp8_current"])
def test_weight_copies_are_made_once_a_step(policy):
    layer, part = alone(slots_of(policy))
    x, dy, old = draw(1, TOKENS, INPUTS), draw(1, TOKENS, OUTPUTS), layer.weight.detach().clone()

    def gradients() -> list[Tensor]:
        """Of two micro-batches that are under way together, as in a pipeline."""
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(each) for each in inputs]
        for y in outputs:
            y.backward(dy)
        return [each.grad for each in inputs if each.grad is not None]

    first, second = gradients()
    assert torch.equal(first, second)
    with torch.no_grad():
        layer.weight.mul_(2)
        layer(x)  # an evaluation makes its own copy and keeps none
    assert torch.equal(gradients()[0], first)
    part.prepare()
    truth = emulated(2 * old, None, x, dy, slots_of(policy), "linear")["dx"]
    assert all(distance(found, truth) < 3e-3 for found in gradients())


def test_delayed_scaling_is_native_over_our_histories():
    slots, common = slots_of("fp8_delayed"), shared()
    layer, part = alone(slots, common)
    twin = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)
    twin.weight.data.copy_(layer.weight)
    ours = LowPrecisionLinear(twin, "linear", slots, shared())
    for step in range(3):
        for each in (part, ours):
            each.prepare()
        for micro_batch in range(2):
            x, dy = draw(1, TOKENS, INPUTS, seed=step), draw(1, TOKENS, OUTPUTS, spread=1e-3, seed=micro_batch)
            inputs, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, truth = layer(inputs), ours(plain)
            with torch.no_grad():
                layer(100 * x)  # enters no history
            y.backward(dy)
            truth.backward(dy)
            assert distance(y, truth) < 3e-3 and distance(inputs.grad, plain.grad) < 3e-3
        assert part.delayed.keys() == ours.delayed.keys() == {"x", "w", "dy"}
        for kind, state in part.delayed.items():
            assert torch.equal(state.history, ours.delayed[kind].history), kind
            state.advance()
            ours.delayed[kind].advance()
            assert torch.equal(state.scale, ours.delayed[kind].scale) and (state.scale != 1 or not step)
    assert any("Float8Quantizer" in words for key in common.counts for words in key)


@pytest.mark.parametrize(("norm", "bias"), [(nn.RMSNorm, False), (nn.LayerNorm, True), (nn.LayerNorm, False)])
@pytest.mark.parametrize("policy", ["mxfp8", "mxfp4", "nvfp4"])
def test_what_is_joined_computes_the_same_under_the_same_names(policy, norm, bias):
    table = dict.fromkeys(MLP.linears)
    slots = slots_of(policy, rounding="nearest") if policy == "nvfp4" else slots_of(policy)
    ours, joined, apart = Block(norm, bias), Block(norm, bias), Block(norm, bias)
    names = [name for name, _ in ours.named_parameters()]
    common = shared()
    for name in table:
        parent, child = ours.mlp, name.removeprefix("mlp.")
        parent[child] = LowPrecisionLinear(parent[child], name, slots, shared())
    swapped(joined, dict.fromkeys(table, slots), MLP, common=common)
    other = replace(slots, scheme="another")  # of the same numbers
    swapped(apart, {"mlp.gate_up": slots, "mlp.down": other}, MLP)
    assert isinstance(joined.mlp, te_layers.TeNormMLP)
    assert [type(each) for each in apart.mlp.children()] == [te_layers.TeNormLinear, te_layers.TeLinear]
    x, dy = draw(2, TOKENS // 2, INPUTS), draw(2, TOKENS // 2, INPUTS, spread=1e-3)
    truth: dict[str, Tensor] = {}
    for model in (ours, joined, apart):
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        y.backward(dy)
        assert [name for name, _ in model.named_parameters()] == names == list(model.state_dict())
        found = {"y": y, "dx": inputs.grad} | {name: each.grad for name, each in model.named_parameters()}
        truth = truth or found
        # Between the layers BF16 rounds elsewhere, which the next rounding, to FP8 or FP4, may carry a number on.
        for name, value in found.items():
            assert distance(value, truth[name]) < (3e-2 if policy == "mxfp8" else 8e-2), (type(model.mlp), name)
    assert Counter({key[0]: n for key, n in common.counts.items()}) == {"fprop": 2, "dgrad": 2, "wgrad": 2}


def test_norms_are_joined_only_with_what_is_swapped():
    model = Block()
    swapped(model, {}, MLP, NormLinear("norm", "mlp.gate_up"))
    assert type(model.norm) is nn.RMSNorm and type(model.mlp) is nn.ModuleDict
    swapped(model, {"mlp.down": slots_of("mxfp8")}, MLP)
    assert type(model.norm) is nn.RMSNorm and isinstance(model.mlp["down"], te_layers.TeLinear)


def test_slots_that_part_in_a_later_phase_are_not_joined():
    """One layer has one recipe; two of Transformer Engine's own would become one that is emulated."""
    model = Block()
    later = dict(zip(MLP.linears, (slots_of("mxfp8"), slots_of("fp8_current")), strict=True))
    swapped(
        model,
        dict.fromkeys(MLP.linears, slots_of("mxfp8")),
        MLP,
        later=later,
    )
    assert [type(each) for each in model.mlp.children()] == [te_layers.TeNormLinear, te_layers.TeLinear]


def test_a_part_is_not_called_itself():
    model, parts = swapped(Block(), dict.fromkeys(MLP.linears, MXFP4), MLP)
    with pytest.raises(RuntimeError, match="mlp.gate_up is a part of TeNormMLP, which is called instead"):
        parts["mlp.gate_up"](draw(1, TOKENS, INPUTS))


def test_a_layer_that_does_not_quantize_is_an_error(monkeypatch):
    """Where `autocast` is without effect, whatever the reason."""
    layer, _ = alone(slots_of("mxfp8"))
    original = te.autocast
    monkeypatch.setattr("lowprec.te_layers.te.autocast", lambda enabled, recipe: original(enabled=False))
    with pytest.raises(RuntimeError, match="linear ran without FP8, although its recipe quantizes"):
        layer(draw(1, TOKENS, INPUTS))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_core_of_an_attention(groups):
    heads, length, size = 4, 48, 32
    core = te_layers.TeCore(Core("attention", heads, groups, size), attention)
    q, k, v = (draw(2, n, length, size, spread=0.2).requires_grad_() for n in (heads, groups, groups))
    y = core(q, k, v, None)
    wide = [each.detach().float().requires_grad_() for each in (q, k, v)]
    truth = attention(*wide, None)
    assert y.shape == truth.shape and distance(y, truth) < 1e-2  # scores are rounded to BF16
    dy = draw(2, heads, length, size)
    y.backward(dy)
    truth.backward(dy.float())
    for each, exact in zip((q, k, v), wide, strict=True):
        assert distance(each.grad, exact.grad) < 3e-2
    mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    mask[:, :, length // 2 :, : length // 2] = False  # two documents
    assert torch.equal(core(q, k, v, mask), attention(q, k, v, mask))
