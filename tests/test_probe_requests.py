"""Transformer Engine's debug YAML, the ranking, the proposal and its page."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import pytest
import torch
import yaml
from torch import nn

import recipe as recipes
from errors import UsageError
from lowprec.apply import Precision, RunFacts
from lowprec.policy import GEMMS, Gemm, Keep, Phase, PrecisionConfig, parse
from lowprec.probe import te_debug
from lowprec.probe.damage import THRESHOLD, as_yaml, legs, proposal, weights
from lowprec.probe.lab import Lab
from report.heatmap import LEVELS, Scale, columns, heatmap
from report.probe import main, read
from tests.test_probe_statistics import POLICY

# The shape of the examples in Transformer Engine's documentation (docs/debug), with every option of the features.
EXAMPLE = """
stats_collection:
  enabled: True
  layers:
    layer_types: [fc1, linear_proj]
  transformer_engine:
    LogTensorStats:
      enabled: True
      stats: [max, min, mean, std, l1_norm, {max_blockwise_dynamic_range: {block_size: 16, dims: 1}}]
      tensors: [activation]
      freq: 2
      start_step: 3
      end_step: 8
    LogFp8TensorStats:
      enabled: True
      tensors_struct:
        - tensor: activation
          stats: [mxfp8_underflows%]
          freq: 1
        - tensor: gradient
          stats: [underflows%, mse, scale_inv_min, mxfp8_mse_columnwise]
          start_end_list: [[0, 2], [10, 11]]
    DumpTensors:
      enabled: False
off:
  enabled: False
  layers: {layer_types: [nothing]}
  transformer_engine: {FakeQuant: {enabled: True}}
"""
NAMES = ["layers.0.attention.out", "layers.0.mlp.gate_up", "layers.0.mlp.down"]


def _table(low: tuple[str, ...] = ("layers.0.mlp.gate_up",)):
    policy = parse(POLICY, "test")
    return {name: policy.schemes["low" if name in low else "bf16"] for name in NAMES}


def test_requests_are_bound_to_layers_by_any_of_their_names():
    bounds, wanted = te_debug.bind(te_debug.parse(yaml.safe_load(EXAMPLE), "example"), NAMES, _table())
    names = {bound.name for bound in bounds}
    assert {"layers.0.mlp.gate_up_activation_max", "layers.0.attention.out_activation_std"} <= names
    assert "layers.0.mlp.gate_up_activation_max_blockwise_dynamic_range_block_size_16_dims_1" in names
    # Only what is quantized has statistics of its own format; another recipe can be simulated anywhere.
    assert "layers.0.mlp.gate_up_gradient_mse" in names and "layers.0.attention.out_gradient_mse" not in names
    assert "layers.0.attention.out_gradient_mxfp8_mse_columnwise" in names
    assert not any("mlp.down" in name for name in names)
    assert ("layers.0.attention.out", "wgrad.a", "mxfp8_e4m3") in wanted.others
    due = {bound.name: [step for step in range(13) if bound.when.due(step)] for bound in bounds}
    assert due["layers.0.mlp.gate_up_activation_max"] == [4, 6, 8]
    assert due["layers.0.mlp.gate_up_gradient_mse"] == [0, 1, 2, 10, 11]


def test_requested_statistics_are_those_of_the_tensors():
    text = """
s:
  enabled: true
  layers: {layer_name_regex_pattern: .*}
  transformer_engine:
    LogTensorStats: {tensors: [activation, gradient, weight, output, wgrad, dgrad], stats: [cur_amax, l2_norm]}
    LogFp8TensorStats: {tensors: [weight], stats: [mse, fp8_current_scaling_mse]}
    LogNvfp4TensorStats: {tensors: [gradient], stats: [underflows%, mse]}
"""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(96, 48, bias=False))
    facts = RunFacts(seed=5, steps=10, tokens_per_step=64, gemm_dtype=torch.float32)
    precision = Precision(
        [model], parse(POLICY | {"rules": [{"match": "*", "use": "low"}]}, "t"), PrecisionConfig(), facts
    )
    precision.begin_step(0)
    bounds, wanted = te_debug.bind(te_debug.parse(yaml.safe_load(text), "t"), ["first"], precision.now)
    x, seen = torch.randn(64, 96, requires_grad=True), {}
    with Lab([model], precision, {}, ["*"]).low(0, wanted) as sample:
        y = model(x)
        y.register_hook(lambda g: seen.update(gradient=g))
        y.square().sum().backward()
    seen |= {"activation": x, "weight": model[0].weight, "output": y, "wgrad": model[0].weight.grad, "dgrad": x.grad}
    values = {bound.name: bound.read(sample) for bound in bounds}
    for tensor, held in seen.items():
        assert values[f"first_{tensor}_cur_amax"] == pytest.approx(float(held.detach().abs().max()), rel=1e-5), tensor
        assert values[f"first_{tensor}_l2_norm"] == pytest.approx(float(held.detach().norm()), rel=1e-5), tensor
    assert values["first_weight_mse"] == sample.operands["first", "fprop.b"].record()["mse"]
    assert 0 < values["first_weight_fp8_current_scaling_mse"] < values["first_weight_mse"], "FP8 against FP4"
    assert values["first_gradient_underflows%"] == 100 * sample.operands["first", "dgrad.a"].record()["underflow"]


FEATURE = "a: {enabled: true, layers: {layer_types: [mlp]}, transformer_engine: {%s}}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            FEATURE % "DisableQuantizationLayer: {enabled: true}",
            ["DisableQuantizationLayer is not built", "precision.keep"],
        ),
        (FEATURE % "DisableFP8GEMM: {enabled: true, gemms: [fprop]}", ["DisableFP8GEMM is not built"]),
        (FEATURE % "FakeQuant: {enabled: true}", ["FakeQuant is not built", "scheme"]),
        (FEATURE % "PerTensorScaling: {enabled: true}", ["PerTensorScaling is not built"]),
        (FEATURE % "DumpTensors: {enabled: true}", ["DumpTensors is not built"]),
        (FEATURE % "LogTensorStat: {enabled: true}", ["unknown feature LogTensorStat", "LogTensorStats"]),
        (FEATURE % "LogTensorStats: {tensors: [weight], stats: [median]}", ["unknown statistic 'median'"]),
        (FEATURE % "LogFp8TensorStats: {tensors: [output], stats: [mse]}", ["tensor 'output'", "activation"]),
        (FEATURE % "LogTensorStats: {tensors: [weight], stats: [max], every: 2}", ["unknown key every", "freq"]),
        (FEATURE % "LogTensorStats: {tensors: [weight], stats: [max], freq: 0}", ["freq is 0"]),
        (FEATURE % "LogNvfp4TensorStats: {tensors: [weight], stats: [overflows%]}", ["overflows%", "underflows%, mse"]),
        (
            "a: {enabled: true, layers: {layer_types: [x], layer_name_regex_pattern: y}, transformer_engine: {}}",
            ["either"],
        ),
        ("a: {enabled: true, layers: {layer_name_regex_pattern: '('}, transformer_engine: {}}", ["regex_pattern"]),
        ("[1]", ["map of sections"]),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(text, words):
    with pytest.raises(UsageError) as error:
        te_debug.parse(yaml.safe_load(text), "file.yaml")
    assert all(word in str(error.value) for word in ["file.yaml", *words]), error.value


def test_requests_that_reach_nothing_are_refused():
    for text, words in (
        (FEATURE.replace("[mlp]", "[fc9]") % "LogTensorStats: {tensors: [weight], stats: [max]}", "reach no linear"),
        (FEATURE % "LogNvfp4TensorStats: {tensors: [weight], stats: [mse]}", "none of the 2 layers quantizes it so"),
        (FEATURE % "LogFp8TensorStats: {tensors: [weight], stats: [fp8_delayed_scaling_mse]}", "none of the 2 layers"),
    ):
        with pytest.raises(UsageError, match=words):
            te_debug.bind(te_debug.parse(yaml.safe_load(text), "f"), NAMES, _table(()))


def _records(errors: dict[tuple[str, str], list[float]], ratios: dict[str, list[float | None]]) -> list[dict]:
    found = [
        {"kind": "gemm", "step": step, "layer": layer, "gemm": gemm, "relative_error": value}
        for (layer, gemm), values in errors.items()
        for step, value in enumerate(values)
    ]
    return found + [
        {"kind": "gradient", "step": step, "parameter": name, "gradient_to_noise": value, "cosine": 0.9}
        for name, values in ratios.items()
        for step, value in enumerate(values)
    ]


def test_legs_are_ranked_by_the_median_and_outliers_are_proposed():
    errors = {
        (f"layers.{i}.mlp.down", gemm): [0.1, 0.11, 5.0] for i in range(8) for gemm in ("fprop", "dgrad", "wgrad")
    }
    errors["layers.2.mlp.down", "wgrad"] = [0.3, 0.3, 0.3]  # 2.7 times the others
    errors["layers.5.mlp.down", "dgrad"] = [0.0, 0.9, 0.9]
    ranked = legs(_records(errors, {}))
    assert [(leg.layer, leg.gemm) for leg in ranked[:2]] == [
        ("layers.5.mlp.down", "dgrad"),
        ("layers.2.mlp.down", "wgrad"),
    ]
    assert ranked[0].error == 0.9 and ranked[2].error == 0.11
    chosen = proposal(ranked)
    assert chosen == ranked[:2] and proposal(ranked, 0.04) == ranked[:1]
    tree = yaml.safe_load(as_yaml(chosen))
    assert tree == {
        "precision": {
            "keep": [
                {"match": "layers.5.mlp.down", "gemms": ["dgrad"]},
                {"match": "layers.2.mlp.down", "gemms": ["wgrad"]},
            ]
        }
    }
    every = [leg for leg in ranked if leg.layer == "layers.5.mlp.down"]
    assert yaml.safe_load(as_yaml(every))["precision"]["keep"] == [{"match": "layers.5.mlp.down"}]
    assert proposal(ranked[2:]) == [] and as_yaml([]) == ""


def test_weights_below_the_square_root_of_three_are_told():
    found = weights(_records({}, {"a": [2.0, 1.0, 1.5], "b": [2.0, None, 1.8]}))
    assert [(w.name, w.ratio, w.drowned) for w in found] == [("a", 1.5, True), ("b", 2.0, False)]
    assert math.isclose(THRESHOLD**2, 3)


def test_a_kept_gemm_is_bf16_in_every_phase_and_a_keep_that_reaches_nothing_is_refused():
    def made(*keep: Keep, schedule: tuple[Phase, ...] = ()) -> Precision:
        model = nn.Sequential()
        for name in ("first", "second"):
            model.add_module(name, nn.Linear(32, 32))
        facts = RunFacts(seed=0, steps=10, tokens_per_step=1)
        return Precision([model], parse(POLICY, "t"), PrecisionConfig(policy="t", keep=keep, schedule=schedule), facts)

    phases = (Phase(start=2, wgrad="low", dgrad="bf16"), Phase(start=4, fprop="bf16"))
    precision = made(Keep(match="fir*", gemms=("wgrad",)), schedule=phases)
    for step, quantized in ((0, {"fprop", "dgrad"}), (2, {"fprop"}), (4, set())):
        precision.begin_step(step)
        slots = precision.now["first"]
        assert {gemm for gemm in GEMMS if getattr(slots, gemm) != Gemm()} == quantized, step
        if step == 0:
            assert slots.scheme == "low (wgrad bf16)"
    assert made(Keep(match="first")).layers == {}, "what is never quantized stays the model's own"
    with pytest.raises(UsageError, match=r"precision.keep reaches no quantized GEMM .*second \(fprop, dgrad, wgrad\)"):
        made(Keep(match="second"))


def test_levels_of_a_heat_map():
    error = Scale(fine=0.01, bad=1.0, limit=0.5, percent=True)
    assert [error.level(v) for v in (0.0, 0.005, 0.011, 0.09, 0.99, 7.0, math.inf)] == [0, 0, 0, 4, 9, 9, 9]
    ratio = Scale(fine=100.0, bad=1.0, limit=THRESHOLD)
    assert [ratio.level(v) for v in (math.inf, 150.0, 99.0, 1.01, 0.5, 0.0)] == [0, 0, 0, 9, 9, 9]
    assert error.beyond(0.6) and not error.beyond(0.4) and ratio.beyond(1.7) and not ratio.beyond(1.8)
    for scale in (error, ratio):
        assert [scale.level(border * 1.0001 ** (1 if scale is error else -1)) for border in scale.borders()] == [
            *range(LEVELS)
        ]
    assert columns(range(1000))[0] == 0 and columns(range(1000))[-1] == 999 and len(columns(range(1000))) == 80
    page = heatmap({"a": {1: 0.6, 2: 0.02}, "b": {2: 0.1}}, error)
    assert page.count("<td></td>") == 1 and 'title="step 1: 60 %">&times;' in page and page.count("<tr>") == 3


class _Page(HTMLParser):
    """Checks nesting, and collects what the page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "!doctype"):
            self.open.append(tag)
        self.loads += [str(value) for key, value in attrs if key in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def test_the_report_of_a_run(tmp_path, capsys):
    run = tmp_path / "my <run>"
    run.mkdir()
    sample = {"kind": "sample", "step": 5, "policy": "nvfp4", "loss_low": 2.5, "loss_high": 2.4}
    sample |= {"cosine": 0.99, "gradient_to_noise": None}
    errors = {(f"layers.{i}.mlp.down", "wgrad"): [0.1] for i in range(7)} | {("layers.7.mlp.down", "wgrad"): [0.8]}
    records = [sample, *({**r, "step": 5} for r in _records(errors, {"w": [1.2], "v": [None]}))]
    operand = {"kind": "operand", "step": 5, "layer": "layers.7.mlp.down", "slot": "wgrad.a", "underflow": 0.4}
    records.append(operand | {"overflow": 0.001, "scales": {"zero": 1, "-3": 9}})
    (run / "probe.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"torn')
    assert main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert "- {match: layers.7.mlp.down, gemms: [wgrad]}  # wgrad: error 80.0%" in printed
    page = (run / "probe.html").read_text()
    checked = _Page()
    checked.feed(page)
    assert checked.open == [] and checked.loads == [] and "<script" not in page and "url(" not in page
    assert "prefers-color-scheme: dark" in page and "my &lt;run&gt;" in page
    for words in ("Gradient over quantization noise", "Error of the GEMMs", "Underflow", "Overflow", "by octave"):
        assert f"<h2>{words}" in page or words == "by octave" and words in page
    assert main([str(run), "--yaml", "-", "--budget", "0"]) == 0 and capsys.readouterr().out == ""
    assert len(read(run)) == len(records)
    assert main([str(tmp_path)]) == 2 and "probe.interval" in capsys.readouterr().err


def test_settings_that_mean_nothing_are_refused():
    for override, words in (("probe.interval=-1", "interval is -1"), ("probe.policy=nvfp4", "set an interval")):
        with pytest.raises(UsageError, match=words):
            recipes.load("quickstart", (override,), 1)
