"""The probe in runs: it changes nothing, sees the same under any layout, and its proposal helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from report.probe import main
from tests.launch import steps, tiny, train

MODEL = ("model.hidden_size=64", "model.num_layers=4", "model.ffn_size=128", "model.num_kv_heads=2")
DEBUG = """
log:
  enabled: True
  layers: {layer_name_regex_pattern: '.*(fc2|lm_head)'}
  transformer_engine:
    LogTensorStats: {enabled: True, tensors: [activation, output], stats: [max, std], freq: 2}
"""


def _records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "probe.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def _losses(run: Path) -> list[float]:
    return [record["loss"] for record in steps(run)]


def test_a_probed_run_is_the_same_run_and_goes_on_after_a_resume(tmp_path):
    """Amax histories, random bits and recomputation included."""
    (tmp_path / "te.yaml").write_text(DEBUG)
    keys = ("precision.policy=fp8_delayed", "train.steps=6", "checkpoint.interval=3", "model.recompute=full")
    assert train(tiny(tmp_path, "plain"), *keys).returncode == 0
    probe = ("probe.interval=1", f"probe.te_debug={tmp_path / 'te.yaml'}", "metrics.tensorboard=true")
    recipe, run = tiny(tmp_path, "probed"), tmp_path / "probed"
    stopped = train(recipe, *keys, *probe, "train.stop_at=5")
    assert stopped.returncode == 75, stopped.stderr
    (run / "checkpoints" / "latest").write_text("step-00000003")
    done = train(recipe, *keys, *probe)
    assert done.returncode == 0, done.stderr
    assert _losses(run) == _losses(tmp_path / "plain")
    samples = _records(run, "sample")
    assert [sample["step"] for sample in samples] == [1, 2, 3, 4, 5, 6]
    moved = (run / "probe.discarded.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in moved} == {4, 5}
    # Delayed scaling clips what grows in these first steps.
    assert all(0.8 < sample["cosine"] < 1 and sample["gradient_to_noise"] > 1 for sample in samples)
    assert [s["loss_low"] for s in samples] != [s["loss_high"] for s in samples]
    asked = {(r["step"], r["name"]) for r in _records(run, "te")}
    layers = ("layers.0.mlp.down", "layers.1.mlp.down", "lm_head")  # also what is not quantized
    names = {
        f"{layer}_{which}_{stat}" for layer in layers for which in ("activation", "output") for stat in ("max", "std")
    }
    assert asked == {(step, name) for step in (2, 4, 6) for name in names}
    assert list((run / "tensorboard").rglob("events*"))


LAYOUTS = {
    "tp, pp": (
        4,
        "parallel.tp=2",
        "parallel.sp=true",
        "parallel.pp=2",
        "parallel.schedule=zbv",
        "model.recompute=full",
    ),
    "zero 3": (2, "zero.stage=3"),
    "tied": (2, "parallel.pp=2", "parallel.schedule=1f1b"),
}
TENSORS = """
all:
  enabled: True
  layers: {layer_name_regex_pattern: '.*'}
  transformer_engine:
    LogTensorStats: {enabled: True, tensors: [activation, weight, gradient, output, dgrad, wgrad], stats: [l2_norm]}
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_those_of_one_process(tmp_path, layout):
    ranks, *spread = LAYOUTS[layout]
    (tmp_path / "te.yaml").write_text(TENSORS)
    keys = (*MODEL, "train.steps=1", "probe.interval=1", "precision.policy=mxfp8", "model.dtype=fp32")
    keys += (f"probe.te_debug={tmp_path / 'te.yaml'}", f"model.tied_embeddings={str(layout == 'tied').lower()}")
    for name, more, count in (("alone", (), 1), ("spread", spread, ranks)):
        done = train(tiny(tmp_path, name), *keys, *more, ranks=count)
        assert done.returncode == 0, done.stderr
    alone, other = tmp_path / "alone", tmp_path / "spread"
    for kind, keys_of, close in (
        ("operand", ("layer", "slot"), ("amax", "relative_error", "underflow", "scale_max", "scale_min")),
        ("gradient", ("parameter",), ("norm", "cosine", "relative_error")),
        ("gemm", ("layer", "gemm"), ("relative_error",)),
        ("te", ("name",), ("value",)),
        ("sample", ("step",), ("loss_low", "loss_high", "cosine")),
    ):
        one, many = ({tuple(r[k] for k in keys_of): r for r in _records(run, kind)} for run in (alone, other))
        assert one.keys() == many.keys() and len(one) == len(_records(other, kind)), kind
        for key, record in one.items():
            for value in close:
                # A GEMM whose reduction is split is compared summand by summand.
                loose = 0.2 if kind == "gemm" else 0.02
                assert many[key][value] == pytest.approx(record[value], rel=loose, abs=1e-4), (key, value)
        if kind == "operand":
            assert sum(one[key]["scales"] == many[key]["scales"] for key in one) > 0.8 * len(one)


BAD = """
schemes:
  good:
    fprop: {a: mxfp8_e4m3, b: mxfp8_e4m3}
    dgrad: {a: mxfp8_e4m3, b: mxfp8_e4m3}
    wgrad: {a: mxfp8_e4m3, b: mxfp8_e4m3}
  bad:
    fprop: {a: mxfp8_e4m3, b: mxfp8_e4m3}
    dgrad: {a: {spec: fp8_e4m3, element: e0m2}, b: mxfp8_e4m3}
rules:
  - {match: layers.2.mlp.down, use: bad}
  - {match: "layers.*", use: good}
  - {match: "*", use: bf16}
"""


def test_a_bad_leg_is_ranked_first_and_the_pasted_proposal_mends_the_gradient(tmp_path, capsys):
    (tmp_path / "policy.yaml").write_text(BAD)
    # One step: the two samples are of the same weights.
    keys = (*MODEL, "train.steps=1", "probe.interval=1", f"precision.policy={tmp_path / 'policy.yaml'}")
    recipe = tiny(tmp_path, "bad")
    assert train(recipe, *keys).returncode == 0
    assert main([str(tmp_path / "bad"), "--yaml", str(tmp_path / "keep.yaml")]) == 0
    printed = capsys.readouterr().out
    assert printed.split("worst GEMMs")[1].split("\n")[2].split()[:2] == ["layers.2.mlp.down", "dgrad"]
    proposed = yaml.safe_load((tmp_path / "keep.yaml").read_text())
    assert proposed == {"precision": {"keep": [{"match": "layers.2.mlp.down", "gemms": ["dgrad"]}]}}
    tree = yaml.safe_load(recipe.read_text()) | proposed
    tree["run"]["dir"] = str(tmp_path / "kept")
    (tmp_path / "kept.yaml").write_text(yaml.safe_dump(tree))
    done = train(tmp_path / "kept.yaml", *keys)
    assert done.returncode == 0, done.stderr
    assert "bad (dgrad bf16)" in done.stdout
    # The first gradient that the leg is upstream of; that of all weights together has noise enough of its own.
    before, after = (
        next(r for r in _records(tmp_path / name, "gradient") if r["parameter"] == "layers.2.mlp.gate_up.weight")
        for name in ("bad", "kept")
    )
    assert after["gradient_to_noise"] > 1.5 * before["gradient_to_noise"]
    assert ("layers.2.mlp.down", "dgrad") not in {(r["layer"], r["gemm"]) for r in _records(tmp_path / "kept", "gemm")}


POLICY = """
schemes:
  low:
    fprop: {a: %s, b: {spec: mxfp8_e4m3, hadamard: 128}}
rules:
  - {match: "*", use: low}
"""


def test_a_bf16_run_can_look_at_another_policy(tmp_path):
    keys = ("train.steps=2", "probe.interval=1", "model.hidden_size=64", 'probe.layers=["layers.1.*"]')
    done = train(tiny(tmp_path), *keys, "probe.policy=nvfp4", "probe.gradients=false")
    assert done.returncode == 0, done.stderr
    assert (
        train(
            tiny(tmp_path, "plain"),
            *keys[::2],
        ).returncode
        == 0
    )
    run = tmp_path / "run"
    assert {r["layer"].split(".")[1] for r in _records(run, "gemm")} == {"1"} and _records(run, "gradient") == []
    assert all("e2m1" in r["format"] for r in _records(run, "operand"))
    assert _losses(run) == _losses(tmp_path / "plain")
    rotated = POLICY % "{spec: mxfp8_e4m3, hadamard: 128}"
    (tmp_path / "rotated.yaml").write_text(rotated)
    refused = train(tiny(tmp_path, "unfit"), *keys, f"probe.policy={tmp_path / 'rotated.yaml'}")
    assert refused.returncode == 2 and "groups of 128 features, which do not divide 64" in refused.stderr
    refused = train(tiny(tmp_path, "none"), *keys)
    assert refused.returncode == 2 and "probe.policy" in refused.stderr and "Traceback" not in refused.stderr
    (tmp_path / "debug.yaml").write_text(DEBUG.replace("LogTensorStats", "FakeQuant"))
    refused = train(tiny(tmp_path, "te"), f"probe.te_debug={tmp_path / 'debug.yaml'}")
    assert refused.returncode == 2 and "FakeQuant is not built" in refused.stderr and "Traceback" not in refused.stderr
