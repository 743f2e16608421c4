"""The low-precision linear against explicit products of quantized matrices, for every shipped policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import recipe as recipes
from errors import UsageError
from lowprec import StepContext, dispatch, linear, reference
from lowprec.apply import Precision, RunFacts
from lowprec.policy import Policy, PrecisionConfig, parse
from lowprec.slots import SLOT_AXES

PRESETS = ("mxfp8", "nvfp4", "fp8_current", "fp8_delayed", "fp8_block", "fp8_lm", "mxfp4")
FACTS = RunFacts(seed=3, steps=100, tokens_per_step=64)


def preset(name: str) -> Policy:
    path = recipes.RECIPES / "precision" / f"{name}.yaml"
    return parse(recipes.load_yaml(path.read_text(), str(path)), str(path))


class Model(nn.Module):
    """Two blocks of one linear and a head, under the names that rules speak of."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, size: int = 128) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(size, size, bias=True)}) for _ in range(2))
        self.lm_head = nn.Linear(size, 16, bias=False)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.nn.functional.silu(layer["mlp"](x))
        return self.lm_head(x)


def build(name: str, **config) -> tuple[Model, Precision]:
    model = Model()
    precision = Precision([model], preset(name), PrecisionConfig(policy=name, **config), FACTS)
    precision.begin_step(5)
    precision.at(64)
    return model, precision


def explicit(precision: Precision, name: str, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three products in FP64 from the operands that the reference quantizer gives."""
    layer = precision.layers[name]
    matrices = {"x": x, "w": layer.weight.detach(), "dy": dy}
    numbers = {}
    for slot, (kind, axis) in SLOT_AXES.items():
        spec = layer.specs[slot]
        matrix = matrices[kind]
        if spec is not None:
            key = StepContext(seed=3, step=5, row=64).key(name, slot, tokens=kind != "w")
            scale = torch.ones(()) if spec.amax_history else None
            found = reference.operand(matrix, spec, axis=axis, seed=key, encode_scale=scale, dtype=torch.float32)
            values, factor, _ = found
            matrix = values.double() * (1.0 if factor is None else factor.double())
        numbers[slot] = matrix.double()
    return {
        "y": numbers["fprop.a"] @ numbers["fprop.b"].T + layer.bias.double(),
        "dx": numbers["dgrad.a"] @ numbers["dgrad.b"],
        "dw": numbers["wgrad.a"].T @ numbers["wgrad.b"],
    }


def one_bf16_ulp(value: torch.Tensor, truth: torch.Tensor) -> bool:
    """|value - truth| within one BF16 ulp of the truth, or of FP32 accumulation noise where terms cancel."""
    ulp = torch.exp2(truth.abs().clamp_min(1e-30).log2().floor() - 7)
    return bool(((value.double() - truth).abs() <= ulp + 1e-6 * truth.abs().max()).all())


@pytest.mark.parametrize("wgrad_output", ["bf16", "fp32"])
@pytest.mark.parametrize("pack_saved", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_three_gemms_multiply_the_quantized_operands(name, pack_saved, wgrad_output):
    _, precision = build(name, pack_saved=pack_saved, wgrad_output=wgrad_output)
    layer = precision.layers["layers.0.mlp"]
    layer.weight.grad_dtype = torch.float32
    x = torch.randn(64, 128).bfloat16().requires_grad_()
    dy = (torch.randn(64, 128) * 1e-3).bfloat16()
    y = layer(x)
    y.backward(dy)
    truth = explicit(precision, "layers.0.mlp", x.detach(), dy)
    assert one_bf16_ulp(y.detach(), truth["y"])
    assert one_bf16_ulp(x.grad, truth["dx"])
    assert layer.weight.grad.dtype == torch.float32
    assert one_bf16_ulp(layer.weight.grad, truth["dw"])
    if wgrad_output == "fp32":
        torch.testing.assert_close(layer.weight.grad.double(), truth["dw"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pack_saved", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_what_two_gemms_share_is_made_once_and_changes_nothing(name, pack_saved, monkeypatch):
    """Bit-equal, amax histories included, to a linear that quantizes for each of its GEMMs."""

    def run() -> tuple[list[torch.Tensor], int]:
        calls = []
        model, precision = build(name, pack_saved=pack_saved)
        for function in ("operand", "save"):
            original = getattr(dispatch, function)
            monkeypatch.setattr(dispatch, function, lambda *a, f=original: calls.append(a[-1]) or f(*a))
        x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        y = model(x)
        y.sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        histories = [s.history for layer in precision.layers.values() for s in layer.delayed.values()]
        monkeypatch.undo()
        return [y, x.grad, *grads, *histories], sum(amax is None for amax in calls)

    shared, found = run()
    monkeypatch.setattr(linear, "same_amax", lambda *_: False)
    monkeypatch.setattr(linear, "same_both_ways", lambda *_: False)
    apart, each = run()
    assert len(shared) == len(apart) and all(map(torch.equal, shared, apart))
    assert found < each if name.startswith(("fp8_current", "fp8_delayed", "fp8_lm")) else found <= each


@pytest.mark.parametrize("name", PRESETS)
def test_names_parameters_and_unquantized_linears_stay(name):
    before = {name: parameter.data_ptr() for name, parameter in Model().named_parameters()}
    model, precision = build(name, bf16_last=1)
    assert [n for n, _ in model.named_parameters()] == list(before)
    assert set(precision.layers) == {"layers.0.mlp"}
    assert type(model.layers[1]["mlp"]) is nn.Linear and type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "mxfp4"])
def test_recomputation_gives_the_same_bits(name):
    gradients = []
    for recompute in (False, True):
        model, _ = build(name)
        torch.manual_seed(1)
        x = torch.randn(64, 128).bfloat16().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.float().square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_micro_batches_draw_the_bits_of_their_rows():
    """One batch of 64 tokens, or two of 32 at their own rows: the same input gradients, which are rounded at random."""
    _, precision = build("mxfp4")
    layer, x = precision.layers["layers.0.mlp"], torch.randn(64, 128).bfloat16()
    dy = (torch.randn(64, 128) * 1e-3).bfloat16()

    def input_gradient(first: int, count: int, row: int) -> torch.Tensor:
        precision.at(row)
        part = x[first : first + count].clone().requires_grad_()
        layer(part).backward(dy[first : first + count])
        return part.grad

    whole = input_gradient(0, 64, 64)
    assert torch.equal(whole, torch.cat((input_gradient(0, 32, 64), input_gradient(32, 32, 96))))
    assert not torch.equal(whole[32:], input_gradient(32, 32, 64)), "other rows have other bits"


def test_split_backward_runs_each_weight_gemm_once():
    x = torch.randn(64, 128).bfloat16()
    joint, first = build("nvfp4")
    joint(x).float().sum().backward()
    split, precision = build("nvfp4")
    precision.shared.deferred = []
    split(x).float().sum().backward()
    assert all(layer.weight.grad is None for layer in precision.layers.values())
    for weight, gradient in precision.shared.deferred:
        weight.grad = gradient()
    for name, layer in precision.layers.items():
        assert torch.equal(layer.weight.grad, first.layers[name].weight.grad)
    assert precision.receipt() == first.receipt()
    assert sum(precision.receipt().values()) == 2 * 3 - 1  # the first layer's input needs no gradient


def test_saved_activations_are_packed():
    saved: dict[str, int] = {}
    for name in ("bf16", "mxfp8", "nvfp4"):
        model, _ = build(name)
        x = torch.randn(320, 128).bfloat16()
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.layers[0]["mlp"](x)
        saved[name] = sum(size for size in sizes if size != model.layers[0]["mlp"].weight.nbytes)
    assert saved["mxfp8"] / saved["bf16"] == pytest.approx(0.516, abs=0.01)
    assert saved["nvfp4"] / saved["bf16"] == pytest.approx(0.281, abs=0.01)


def test_schedule_switches_gemms_at_their_step():
    config = {"schedule": [{"start": 0.82, "fprop": "bf16"}, {"tokens": 90 * 64, "dgrad": "bf16", "wgrad": "bf16"}]}
    tree = recipes.merge(TINY, {"precision": {"policy": "nvfp4"} | config})
    precision_config = recipes.from_dict(tree, "test").precision
    model = Model()
    precision = Precision([model], preset("nvfp4"), precision_config, FACTS)
    assert precision.begin_step(81) is None
    layer = precision.layers["layers.0.mlp"]
    assert layer.slots.quantized and layer.specs["fprop.a"] is not None
    assert "fprop bf16" in (precision.begin_step(82) or "")
    assert layer.specs["fprop.a"] is None and layer.specs["dgrad.a"] is not None
    assert precision.begin_step(90) is not None and not layer.slots.quantized
    x = torch.randn(16, 128).bfloat16()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    resumed = Precision([Model()], preset("nvfp4"), precision_config, FACTS)
    resumed.begin_step(95)
    assert not resumed.layers["layers.0.mlp"].slots.quantized


TINY = {
    "name": "tiny",
    "model": {"vocab_size": 16, "hidden_size": 128, "num_layers": 2, "num_heads": 2, "ffn_size": 128},
    "train": {"steps": 100, "global_batch": 2, "micro_batch": 1, "seq_len": 32},
}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"schemes": {"a": {"fprop": {"a": "mxfp9"}}}, "rules": []}, "mxfp9"),
        ({"schemes": {"a": {"fprop": {"c": "mxfp8_e4m3"}}}}, "unknown key c"),
        ({"schemes": {"a": {"fprop": {"a": {"spec": "nvfp4", "roundng": "nearest"}}}}}, "roundng"),
        ({"schemes": {"a": {"wgrad": {"a": {"spec": "nvfp4", "hadamard": 16}, "b": "nvfp4"}}}}, "need the same"),
        ({"rules": [{"match": "*"}]}, "needs match and use"),
        ({"schemes": {"bf16": {}}}, "choose another"),
        ({"rulez": []}, "unknown key rulez"),
    ],
)
def test_bad_policies_are_refused_with_the_place(tree, words):
    with pytest.raises(UsageError, match=words):
        parse(tree, "mine.yaml")


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([{"match": "layers.*", "use": "bf16"}], "no precision rule covers 'lm_head'"),
        ([{"match": "layer.*", "use": "bf16"}, {"match": "*", "use": "bf16"}], "reach no linear"),
        ([{"match": "*", "use": "fp7"}], "unknown schemes"),
    ],
)
def test_gaps_dead_rules_and_unknown_schemes_are_errors(rules, words):
    with pytest.raises(UsageError, match=words):
        parse({"rules": rules}, "mine.yaml").resolve(["layers.0.mlp", "lm_head"], 1)


def test_every_preset_is_tested():
    files = {path.stem for path in Path(recipes.RECIPES / "precision").glob("*.yaml")}
    assert files == {*PRESETS, "bf16"}


GOLDEN = Path(__file__).parent / "golden" / "te_linear_fwd_bwd.npz"
NVFP4_2D_RHT = {
    "fprop": {"a": "nvfp4", "b": "nvfp4_2d"},
    "dgrad": {"a": "nvfp4", "b": "nvfp4_2d"},
    "wgrad": {"a": {"spec": "nvfp4", "hadamard": 16}, "b": {"spec": "nvfp4", "hadamard": 16}},
}
PLAIN = {gemm: {"a": "nvfp4", "b": "nvfp4"} for gemm in ("fprop", "dgrad", "wgrad")}
FOUR_OVER_SIX = {"spec": "nvfp4", "four_over_six": "mae", "four_over_six_max": 448}
FP8 = {
    "fprop": {"a": "fp8_e4m3", "b": "fp8_e4m3"},
    "dgrad": {"a": "fp8_e5m2", "b": "fp8_e4m3"},
    "wgrad": {"a": "fp8_e5m2", "b": "fp8_e4m3"},
}


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize(
    ("factory", "scheme"),
    [
        ("nvfp4_ref_rht_2d", NVFP4_2D_RHT),
        ("nvfp4_1x16_plain", PLAIN),
        ("nvfp4_4over6", {gemm: {"a": FOUR_OVER_SIX, "b": FOUR_OVER_SIX} for gemm in PLAIN}),
        ("fp8_current_e4m3_e5m2", FP8),
    ],
)
def test_transformer_engine_linear(factory, scheme, dtype):
    """te.Linear 64 -> 96 of Transformer Engine 2.20.2, forward and backward: within one ulp of the output's dtype."""
    stored = np.load(GOLDEN)
    torch_dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[dtype]
    x, w, dy = (torch.from_numpy(stored[f"{dtype}/{key}"]).to(torch_dtype) for key in ("x", "w", "dy"))
    linear = nn.Linear(64, 96, bias=False, dtype=torch_dtype)
    linear.weight.data.copy_(w)
    model = nn.ModuleDict({"linear": linear})
    policy = parse({"schemes": {"te": scheme}, "rules": [{"match": "*", "use": "te"}]}, "te")
    output = "bf16" if dtype == "bf16" else "fp32"
    precision = Precision([model], policy, PrecisionConfig(wgrad_output=output), FACTS)
    precision.begin_step(0)
    x.requires_grad_()
    y = model["linear"](x)
    y.backward(dy)
    for name, value in (("y", y.detach()), ("dx", x.grad), ("dw", model["linear"].weight.grad)):
        truth = torch.from_numpy(stored[f"{dtype}/{factory}/{name}"])
        if dtype == "bf16":
            assert one_bf16_ulp(value, truth.double()), name
        else:
            torch.testing.assert_close(value, truth, rtol=2e-6, atol=2e-6 * truth.abs().max().item())


def test_policies_are_checked_for_types_and_second_rests():
    rule = {"match": "*", "use": "bf16"}
    for tree, words in (
        (
            {"schemes": {"s": {"fprop": {"a": {"spec": "nvfp4", "hadamard": "16"}}}}, "rules": [rule]},
            "hadamard is '16'",
        ),
        ({"rules": [{**rule, "first": "two"}]}, "first is 'two'"),
    ):
        with pytest.raises(UsageError, match=words):
            parse(tree, "test")
    with pytest.raises(UsageError, match="reach no linear"):
        parse({"rules": [rule, rule]}, "test").resolve(["lm_head"], 0)


def test_forward_without_gradients_saves_and_records_nothing():
    model, precision = build("fp8_delayed")
    x = torch.randn(32, 128).bfloat16()
    before = {name: tensor.clone() for name, tensor in precision.state().items()}
    with torch.no_grad():
        model(x)
    for name, tensor in precision.state().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(RuntimeError, match="ran elsewhere or not at all"):
        precision.check_ran()
    model(x).float().sum().backward()
    assert precision.layers["layers.0.mlp"].ran == {"fprop", "wgrad"}  # x wants no gradient


def test_two_formats_cannot_share_one_amax_history():
    delayed = {"spec": "fp8_e4m3", "amax_history": 4}
    scheme = {"fprop": {"a": delayed}, "wgrad": {"b": {**delayed, "spec": "fp8_e5m2"}}}
    policy = parse({"schemes": {"s": scheme}, "rules": [{"match": "*", "use": "s"}]}, "test")
    with pytest.raises(UsageError, match="one amax history of x"):
        Precision([Model()], policy, PrecisionConfig(policy="mine"), FACTS)
