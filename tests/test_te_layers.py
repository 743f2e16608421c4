"""Transformer Engine's own layers on the CPU (tests/te_cpu), under our policies, beside our emulated linear.

This tests the integration: which quantizer a layer asks for where, what it multiplies, and what becomes of gradients.
NVIDIA's kernels are not in it.
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UsageError
from lowprec.linear import SLOT_AXES
from lowprec.native import native
from lowprec.policy import Gemm, Slots
from tests import te_cpu
from tests.linear_truth import (
    EXACT,
    INPUTS,
    NAME,
    OUTPUTS,
    ROUNDED,
    TOKENS,
    distance,
    draw,
    emulated,
    one_ulp,
    slots_of,
)
from tests.te_case import ACTIVATIONS, close, custom_recipe, ours, outcome, recipes, run, te, te_linear
from tests.te_cpu.native import specs as quantizer_specs

from tests import gpu_te  # isort: skip (after the stand-in)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("policy", [*EXACT, *ROUNDED])
def test_linear(policy, bias):
    layer, slots = te_linear(bias), slots_of(policy)
    x, dy = draw(4, TOKENS // 4, INPUTS), draw(4, TOKENS // 4, OUTPUTS, spread=1e-3)
    truth = emulated(layer.weight, layer.bias if bias else None, x, dy, slots)
    for name, value in outcome(layer, slots, x, dy).items():
        if policy in EXACT or name == "db":
            assert one_ulp(value, truth[name]), name
        else:
            assert distance(value, truth[name]) < 3e-3, name


@pytest.mark.parametrize("side", ["a", "b"])
def test_three_quarters_of_one_operand_alone(side):
    """4/3 then, not one of the two factors of 16/9; BF16 rounds a third's infinite mantissa."""
    slots = slots_of("mxfp4")
    plain = replace(getattr(slots.dgrad, side), three_quarters=False)
    slots = replace(slots, dgrad=replace(slots.dgrad, **{side: plain}))
    layer = te_linear(False)
    x, dy = draw(TOKENS, INPUTS), draw(TOKENS, OUTPUTS, spread=1e-3)
    truth = emulated(layer.weight, None, x, dy, slots)
    assert distance(outcome(layer, slots, x, dy)["dx"], truth["dx"]) < 3e-3


@pytest.mark.parametrize("policy", [*EXACT, *ROUNDED])
def test_linear_in_fp32_is_the_emulated_one(policy):
    """Nothing is rounded to BF16: only the factor 2 x 8/9 and the order of additions differ."""
    layer, slots = te_linear(False, torch.float32), slots_of(policy)
    x, dy = draw(TOKENS, INPUTS).float(), draw(TOKENS, OUTPUTS, spread=1e-3).float()
    truth = emulated(layer.weight, None, x, dy, slots)
    for name, value in outcome(layer, slots, x, dy).items():
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-5, atol=2e-6 * truth[name].abs().max().item())


def planted(matrix: Tensor, amax: float) -> Tensor:
    """The matrix, smaller than `amax` by a power of two or more, with one number that is `amax`."""
    matrix = matrix.clone()
    matrix.view(-1)[17] = amax * torch.exp2((matrix.abs().max() / amax).log2().ceil())
    return matrix


@pytest.mark.parametrize(
    ("policy", "changes", "amaxes"),
    [("nvfp4", {"hadamard": 0}, (21.0, 21.0, 21.0)), ("fp8_current", {}, (7.0, 7.0, 7.0))],
)
def test_linear_with_power_of_two_tensor_scales(policy, changes, amaxes):
    """Amaxes of 2688 = 21 x 128, 448 = 7 x 64 and 57344 = 7 x 8192 times powers of two: operands exact in BF16."""
    layer, slots = te_linear(False), slots_of(policy, **changes)
    with torch.no_grad():
        layer.weight.copy_(planted(layer.weight, amaxes[1]))
    x = planted(draw(TOKENS, INPUTS), amaxes[0])
    dy = planted(draw(TOKENS, OUTPUTS, spread=1e-3), amaxes[2])
    truth = emulated(layer.weight, None, x, dy, slots)
    for name, value in outcome(layer, slots, x, dy).items():
        assert one_ulp(value, truth[name]), name


@pytest.mark.parametrize("policy", [*EXACT, *ROUNDED])
@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_layernorm_linear(policy, norm):
    layer = te.LayerNormLinear(
        INPUTS, OUTPUTS, bias=True, normalization=norm, params_dtype=torch.bfloat16, device="cpu", name=NAME,
        return_layernorm_output=True,
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(draw(OUTPUTS, INPUTS, spread=0.05))
        layer.bias.copy_(draw(OUTPUTS))
        layer.layer_norm_weight.copy_(1 + 0.1 * draw(INPUTS))
    slots, dy = slots_of(policy), draw(TOKENS, OUTPUTS, spread=1e-3)
    x = draw(TOKENS, INPUTS).requires_grad_()
    with te.autocast(recipe=custom_recipe({NAME: slots})):
        y, normed = layer(x)
    y.backward(dy)
    truth = emulated(layer.weight, layer.bias, normed.detach(), dy, slots)
    wide = x.detach().float().requires_grad_()
    weight, offset = layer.layer_norm_weight.float(), getattr(layer, "layer_norm_bias", None)
    plain = (
        F.rms_norm(wide, (INPUTS,), weight, layer.eps)
        if offset is None
        else F.layer_norm(wide, (INPUTS,), weight, offset.float(), layer.eps)
    )
    assert one_ulp(normed, plain.detach().double())
    plain.backward(truth["dx"].float())
    assert distance(x.grad, wide.grad) < 4e-3  # dx of the linear is rounded before it enters the norm's backward
    for name, value in (("y", y.detach()), ("dw", layer.weight.grad), ("db", layer.bias.grad)):
        assert close(value, truth[name], policy), name


@pytest.mark.parametrize("policy", [*EXACT, *ROUNDED])
@pytest.mark.parametrize(("activation", "width"), [("swiglu", 2), ("gelu", 1), ("srelu", 1)])
def test_layernorm_mlp(policy, activation, width, monkeypatch):
    """Each of its six GEMMs against ours, from the matrices that it gave to its quantizers."""
    hidden = 192
    layer = te.LayerNormMLP(
        INPUTS, hidden, bias=False, normalization="RMSNorm", activation=activation, params_dtype=torch.bfloat16,
        device="cpu", name=NAME,
    )  # fmt: skip
    with torch.no_grad():
        layer.fc1_weight.copy_(draw(width * hidden, INPUTS, spread=0.05))
        layer.fc2_weight.copy_(draw(INPUTS, hidden, spread=0.05))
    seen, original = {}, ours.QuantizeDequantize._maybe_cast

    def note(quantizer: Any, tensor: Tensor) -> Tensor:
        seen[quantizer.linear.name.removeprefix(f"{NAME}."), SLOT_AXES[quantizer.slot][0]] = tensor.detach().clone()
        return original(quantizer, tensor)

    monkeypatch.setattr(ours.QuantizeDequantize, "_maybe_cast", note)
    slots, names = slots_of(policy), [f"{NAME}.fc1", f"{NAME}.fc2"]
    dy = draw(TOKENS, INPUTS, spread=1e-3)
    y, _ = run(layer, dict.fromkeys(names, slots), draw(TOKENS, INPUTS), dy)
    assert torch.equal(seen["fc2", "dy"], dy)
    first, second = (
        emulated(seen[fc, "w"], None, seen[fc, "x"], seen[fc, "dy"], slots, f"{NAME}.{fc}") for fc in ("fc1", "fc2")
    )
    assert close(y, second["y"], policy)
    assert close(layer.fc1_weight.grad, first["dw"], policy)
    assert close(layer.fc2_weight.grad, second["dw"], policy)
    # Between the two: the activation, of what the first GEMM gave, rounded.
    between = first["y"].bfloat16().float().requires_grad_()
    after = ACTIVATIONS[activation](between)
    assert distance(seen["fc2", "x"], after.detach().double()) < 1e-2
    after.backward(second["dx"].bfloat16().float())
    assert distance(seen["fc1", "dy"], between.grad.double()) < 1e-2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("policy", ["mxfp8", "nvfp4", "fp8_current", "fp8_block", "fp8_lm"])
def test_native_recipes_set_what_the_policy_says(policy, bias):
    """Transformer Engine's own quantizers, of which the stand-in computes what their switches say."""
    layer, slots = te_linear(bias), slots_of(policy)
    if policy == "nvfp4":
        slots = slots_of(policy, rounding="nearest")  # whose random bits are no contract
    found = native(slots)
    assert found is not None
    x, dy = draw(TOKENS, INPUTS), draw(TOKENS, OUTPUTS, spread=1e-3)
    inputs = x.clone().requires_grad_()
    with te.autocast(recipe=ours.native_recipe(found)):
        y = layer(inputs)
    y.backward(dy)
    truth = emulated(layer.weight, layer.bias if bias else None, x, dy, slots)
    outcomes = {"y": y.detach(), "dx": inputs.grad, "dw": layer.weight.grad}
    for name, value in outcomes.items():
        assert one_ulp(value, truth[name]), name


def test_every_switch_of_a_native_recipe_reaches_its_quantizers():
    """Slots -> recipe -> the quantizers that Transformer Engine makes for it -> the same slots."""
    weights = (slots_of(policy) for policy in ("mxfp8", "nvfp4", "fp8_current", "fp8_block", "fp8_lm"))
    variants = [
        *weights,
        slots_of("nvfp4", rounding="nearest"),
        slots_of("nvfp4", hadamard=0),
        e4m3(slots_of("fp8_lm")),
    ]
    for slots in variants:
        found = native(slots)
        assert found is not None
        layer = te_linear(False)
        with te.autocast(recipe=ours.native_recipe(found)):
            layer(draw(TOKENS, INPUTS))
        x, weight, _ = (quantizer_specs(q) for q in layer.quantizers["scaling_fwd"])
        dy, _ = (quantizer_specs(q) for q in layer.quantizers["scaling_bwd"])
        made = (Gemm(x[0], weight[0]), Gemm(dy[0], weight[1]), Gemm(dy[1], x[1]))
        assert made == (slots.fprop, slots.dgrad, slots.wgrad), found


def e4m3(slots: Slots) -> Slots:
    """The same with E4M3 gradients."""
    return replace(
        slots,
        dgrad=Gemm(replace(slots.dgrad.a, element="e4m3"), slots.dgrad.b),
        wgrad=Gemm(replace(slots.wgrad.a, element="e4m3"), slots.wgrad.b),
    )


def test_factory_survives_a_pickle_and_answers_every_role():
    factory = pickle.loads(pickle.dumps(custom_recipe({NAME: slots_of("mxfp8")}))).qfactory
    assert factory.linears[NAME].slots == slots_of("mxfp8")
    for role in (
        None,
        te.QuantizerRole(),
        te.QuantizerRole("linear", "input", "another"),
        te.QuantizerRole("linear", "output", NAME),
        te.QuantizerRole("dpa", "qkv", NAME),
    ):
        assert type(factory(role)) is te.IdentityQuantizer, role
    both = factory(te.QuantizerRole("linear", "grad_output", NAME))
    assert [both.rowwise_quantizer.slot, both.columnwise_quantizer.slot] == ["dgrad.a", "wgrad.a"]


# Fields whose default an environment variable is, but which say nothing where another field says what a policy means.
SETTLED = {"use_power_2_scales", "use_f32_scales", "nvfp4_4over6_e4m3_use_256", "nvfp4_4over6_err_mode"}


@pytest.mark.parametrize("policy", ["mxfp8", "nvfp4", "fp8_current", "fp8_block"])
def test_environment_variables_change_no_recipe(policy, monkeypatch):
    found = native(slots_of(policy))
    assert found is not None
    kind, given = getattr(recipes, found.recipe), {}
    source = inspect.getsource(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    read = {name for name in fields if re.search(rf"^    {name}: \w.*=\s*\(?\s*os\.getenv", source, re.M)}
    assert "backward_override" in read

    def note(**options: Any) -> Any:
        given.update(options)
        return kind(**options)

    monkeypatch.setattr(recipes, found.recipe, note)
    ours.native_recipe(found)
    assert read - SETTLED <= given.keys()


def test_rotations_that_cut_a_group_of_tokens_are_refused():
    layer, slots = te_linear(False), slots_of("mxfp4")
    with pytest.raises(UsageError, match="wgrad.b rotates groups of 64, which do not divide the 96 numbers"):
        run(layer, {NAME: slots}, draw(96, INPUTS), draw(96, OUTPUTS))


def test_edits_of_the_stand_in_fail_loudly():
    for source in ("", "torch.Tensor().cuda()\n" * 2):
        with pytest.raises(ImportError, match="upstream moved"):
            te_cpu.edited(source, (("torch.Tensor().cuda()", "torch.Tensor()", 1),), "utils")
    with pytest.raises(NotImplementedError, match="te_cpu has no transformer_engine_torch.fused_attn_fwd"):
        te_cpu.tex.fused_attn_fwd()


@pytest.mark.parametrize("check", ["custom", "own_recipes", "defects"])
def test_the_checks_for_gpus_pass_over_the_stand_in(check, monkeypatch):
    """So that they are known to work where a GPU is there; and that the defects that we walk around are there."""
    monkeypatch.setattr(gpu_te, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_te, "TOKENS", 128)
    lines = list(gpu_te.CHECKS[check]())
    assert lines and not any("not on this GPU" in line for line in lines)
    if check == "defects":
        assert lines == [
            "a recipe of the same class with other switches is ignored",
            "is_first_microbatch=True overwrites main_grad",
        ]
