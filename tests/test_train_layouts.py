"""train.py under several layouts: records, validation, compilation, and a resume on another layout."""

from __future__ import annotations

import json

import pytest

from tests.launch import steps, tiny, train

MODEL = ("model.hidden_size=64", "model.num_layers=4", "model.ffn_size=128", "model.dtype=fp32", "model.num_kv_heads=2")
KEYS = (*MODEL, "train.steps=6", "checkpoint.interval=3", "eval.interval=3", "resume.verify=true")
EVERYTHING = ("parallel.tp=2", "parallel.sp=true", "parallel.pp=2", "parallel.schedule=zbv", "model.recompute=full")


def _records(run, kind):
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def test_a_run_moves_between_layouts(tmp_path):
    """One process; then four, of which two share every layer and two are stages; then one again."""
    straight = train(tiny(tmp_path, "straight"), *KEYS)
    assert straight.returncode == 0, straight.stderr
    recipe, run = tiny(tmp_path, "moved"), tmp_path / "moved"
    many = train(recipe, *KEYS, *EVERYTHING, "train.stop_at=3", ranks=4)
    assert many.returncode == 75, many.stderr
    (receipt,) = _records(run, "receipt")
    # every linear of both stages is there: split backwards swap all of them
    assert receipt["unquantized"] == [] and sum(receipt["gemms"].values()) > 0
    assert json.loads((run / "manifest.json").read_text())["starts"][-1]["topology"] == {"dp": 1, "tp": 2, "pp": 2}
    one = train(recipe, *KEYS)
    assert one.returncode == 0, one.stderr
    assert "replayed the batch of step 3" in one.stdout
    assert [r["loss"] for r in steps(run)] == pytest.approx([r["loss"] for r in steps(tmp_path / "straight")], rel=1e-4)
    runs = (tmp_path / "straight", run)
    validations = [[r["validation_loss"] for r in _records(path, "validation")] for path in runs]
    assert validations[1] == pytest.approx(validations[0], rel=1e-4)
    norms = [[r["param_norm"] for r in steps(path)] for path in runs]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.slow
def test_compiled_blocks_under_tensor_parallelism_follow_eager_ones(tmp_path):
    keys = (*MODEL, "train.steps=3", "parallel.tp=2", "parallel.sp=true")
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        done = train(tiny(tmp_path, name), *keys, f"train.compile={compiled}", ranks=2)
        assert done.returncode == 0, done.stderr
    losses = [[r["loss"] for r in steps(tmp_path / name)] for name in ("eager", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_gradients_reduced_in_two_levels(tmp_path):
    """Two nodes of two ranks. In FP32 the same numbers; in FP8 fewer bytes than one level."""
    losses, sent = {}, {}
    for name, payload, two_level in (("one", "fp32", "false"), ("two", "fp32", "true"), ("fp8", "fp8_lm", "true")):
        keys = (*MODEL, "train.steps=3", f"gradients.payload={payload}", f"gradients.two_level={two_level}")
        done = train(tiny(tmp_path, name), *keys, ranks=4, node_size=2)
        assert done.returncode == 0, done.stderr
        losses[name] = [record["loss"] for record in steps(tmp_path / name)]
        sent[name] = steps(tmp_path / name)[0]["sent_bytes"]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)
    assert losses["fp8"] == pytest.approx(losses["one"], rel=0.05)
    assert sent["fp8"] < sent["two"]
    refused = train(tiny(tmp_path, "alone"), *MODEL, "gradients.two_level=true", ranks=2)
    assert refused.returncode == 2 and "several nodes" in refused.stderr
