"""Transformer Engine's own layers on the CPU (tests/te_cpu), under our policies, beside our emulated linear.

This tests the integration: which quantizer a layer asks for where, what it multiplies, and what becomes of gradients.
NVIDIA's kernels are not in it.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UsageError
from lowprec import StepContext
from lowprec.linear import SLOT_AXES, LowPrecisionLinear, Shared
from lowprec.native import native
from lowprec.policy import GEMMS, Gemm, Slots
from recipe import load_policy
from tests import te_cpu

te = te_cpu.install()
from lowprec import te as ours  # noqa: E402
from tests.te_cpu.native import specs as quantizer_specs  # noqa: E402

NAME = "layers.0.mlp"
TOKENS, INPUTS, OUTPUTS = 128, 256, 384
EXACT = ("mxfp8", "fp8_block", "fp8_lm", "mxfp4")  # their dequantized operands and factors keep within one ulp
ROUNDED = ("nvfp4", "fp8_current")

ACTIVATIONS = {
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "srelu": lambda x: F.relu(x).square(),
}


def slots_of(policy: str, **changes: Any) -> Slots:
    """The slots of a shipped policy, with `changes` to every spec."""
    slots = load_policy(policy).resolve([NAME], 1)[NAME]
    for gemm in GEMMS:
        sides = {side: replace(spec, **changes) for side in ("a", "b") if (spec := getattr(getattr(slots, gemm), side))}
        slots = replace(slots, **{gemm: replace(getattr(slots, gemm), **sides)})
    return slots


def shared() -> Shared:
    return Shared(position=StepContext(seed=3, step=5, row=64))


def draw(*shape: int, spread: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers times random powers of two, in BF16."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    exponents = torch.randint(-3, 4, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * spread).ldexp(exponents).bfloat16()


def emulated(weight: Tensor, bias: Tensor | None, x: Tensor, dy: Tensor, slots: Slots, name: str = NAME) -> dict:
    """y, dx, dw and db from the operands of our linear, multiplied in FP64: before anything is rounded to BF16."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    layer = LowPrecisionLinear(linear, name, slots, shared())
    matrices = {"x": x.detach().reshape(-1, x.shape[-1]), "w": weight.detach(), "dy": dy.reshape(-1, dy.shape[-1])}
    number = {}
    for slot, (kind, _) in SLOT_AXES.items():
        values, scale, _ = layer.operand(slot, matrices[kind], layer.shared.position)
        number[slot] = values.double() * (1.0 if scale is None else scale.double())
    y = number["fprop.a"] @ number["fprop.b"].T + (0.0 if bias is None else bias.detach().double())
    return {
        "y": y.view(dy.shape),
        "dx": (number["dgrad.a"] @ number["dgrad.b"]).view(x.shape),
        "dw": number["wgrad.a"].T @ number["wgrad.b"],
        "db": matrices["dy"].double().sum(0),
    }


def run(layer: nn.Module, table: Mapping[str, Slots], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx of a layer of Transformer Engine under a custom recipe for the linears of `table`."""
    x = x.clone().requires_grad_()
    with te.autocast(recipe=ours.custom_recipe(table, shared())):
        y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad


def one_ulp(value: Tensor, truth: Tensor) -> bool:
    """Within one BF16 ulp of the truth, or of FP32 accumulation where terms cancel."""
    ulp = torch.exp2(truth.abs().clamp_min(1e-30).log2().floor() - 7)
    return bool(((value.double() - truth).abs() <= ulp + 1e-6 * truth.abs().max()).all())


def distance(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def close(value: Tensor, truth: Tensor, policy: str) -> bool:
    """One ulp; or the rounding of two operands and the result to BF16, of which a scale's mantissa decides how much."""
    return one_ulp(value, truth) if policy in EXACT else distance(value, truth) < 3.5e-3


def te_linear(bias: bool, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    layer = te.Linear(INPUTS, OUTPUTS, bias=bias, params_dtype=dtype, device="cpu", name=NAME)
    with torch.no_grad():
        layer.weight.copy_(draw(OUTPUTS, INPUTS, spread=0.05))
        if bias:
            layer.bias.copy_(draw(OUTPUTS))
    return layer


def outcome(layer: nn.Module, slots: Slots, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    y, dx = run(layer, {NAME: slots}, x, dy)
    found = {"y": y, "dx": dx, "dw": layer.weight.grad}
    return found | {"db": layer.bias.grad} if layer.use_bias else found


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
    with te.autocast(recipe=ours.custom_recipe({NAME: slots}, shared())):
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
        seen[quantizer.name.removeprefix(f"{NAME}."), SLOT_AXES[quantizer.slot][0]] = tensor.detach().clone()
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
    factory = pickle.loads(pickle.dumps(ours.custom_recipe({NAME: slots_of("mxfp8")}, shared()))).qfactory
    assert factory.table == {NAME: slots_of("mxfp8")}
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


def test_a_phase_with_a_new_recipe_object_changes_what_is_multiplied():
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)
    before, after = slots_of("mxfp4"), replace(slots_of("mxfp4"), dgrad=Gemm(), wgrad=Gemm())
    layer = ours.TeLinear(linear, NAME, before, shared())
    x, dy = draw(TOKENS, INPUTS), draw(TOKENS, OUTPUTS)
    for slots in (before, after):
        layer.use(slots)
        inputs = x.clone().requires_grad_()
        layer(inputs).backward(dy)
        assert one_ulp(inputs.grad, emulated(linear.weight, None, x, dy, slots)["dx"])


def test_weight_copies_are_made_once_a_step():
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)
    layer = ours.TeLinear(linear, NAME, slots_of("mxfp4"), shared())
    x, slots = draw(TOKENS, INPUTS), slots_of("mxfp4")
    dy, old = draw(TOKENS, OUTPUTS), linear.weight.detach().clone()

    def gradient() -> Tensor:
        inputs = x.clone().requires_grad_()
        layer(inputs).backward(dy)
        return inputs.grad

    first = gradient()
    with torch.no_grad():
        linear.weight.mul_(2)
        layer(x)  # an evaluation makes its own copy and keeps none
    assert torch.equal(gradient(), first)
    layer.prepare()
    assert one_ulp(gradient(), emulated(2 * old, None, x, dy, slots)["dx"])


def test_delayed_scaling_has_no_custom_recipe():
    with pytest.raises(UsageError, match=f"{NAME}: fprop.a has delayed scaling"):
        ours.custom_recipe({NAME: slots_of("fp8_delayed")}, shared())


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
