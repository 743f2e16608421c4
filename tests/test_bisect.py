"""A step that went wrong, repeated until its cause is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from report.bisect import Limits, judge, smallest
from run.replay import Outcome
from tests.launch import ROOT, run_script, steps, tiny, train

BISECT, FAULTY = str(ROOT / "report" / "bisect.py"), ROOT / "tests" / "faulty_train.py"
MODEL = ("model.hidden_size=64", "model.num_layers=4", "model.ffn_size=128")
POLICY = """
schemes:
  good:
    fprop: {a: mxfp8_e4m3, b: mxfp8_e4m3}
    dgrad: {a: {spec: mxfp8_e4m3, rounding: stochastic}, b: mxfp8_e4m3}
    wgrad: {a: {spec: mxfp8_e4m3, hadamard: 32}, b: {spec: mxfp8_e4m3, hadamard: 32}}
  bad:
    fprop: {a: {spec: fp8_e4m3, element: e0m1}, b: mxfp8_e4m3}
    dgrad: {a: mxfp8_e4m3, b: mxfp8_e4m3}
    wgrad: {a: mxfp8_e4m3, b: mxfp8_e4m3}
rules:
  - {match: lm_head, use: bad}
  - {match: "layers.*", use: good}
  - {match: "*", use: bf16}
"""


def _state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file of a folder: size, time, content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns, f.read_bytes()) for f in files}


def test_a_bad_quantizer_setting_is_found_and_the_run_stays_as_it_is(tmp_path):
    (tmp_path / "policy.yaml").write_text(POLICY.replace("{match: lm_head, use: bad}", "{match: lm_head, use: bf16}"))
    keys = (*MODEL, "train.steps=8", "checkpoint.interval=2", f"precision.policy={tmp_path / 'policy.yaml'}")
    keys += ("gradients.payload=fp8_lm",)
    assert train(tiny(tmp_path), *keys, "train.stop_at=6").returncode == 75
    run = tmp_path / "run"
    (tmp_path / "policy.yaml").write_text(POLICY)
    assert train(tiny(tmp_path), *keys, "--allow-precision-change").returncode == 0
    (tmp_path / "policy.yaml").unlink()  # the run has its own copy
    before = _state(run)
    found = run_script(BISECT, str(run), "8", "--json", str(tmp_path / "found.json"))
    assert found.returncode == 0, found.stdout + found.stderr
    assert _state(run) == before
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["cures"] == [
        "fprop in BF16",
        "lm_head fprop in BF16",
        "lm_head fprop.a (e0m1 fp32/tensor) in BF16",
    ]
    trials = {trial["what"]: trial for trial in result["trials"]}
    # Trained again in memory from the checkpoint before it, the step is what it was, to the bit.
    recorded = steps(run)[7]
    assert "repeated from step 6" in found.stdout
    assert (trials["as it was"]["loss"], trials["as it was"]["grad_norm"]) == (recorded["loss"], recorded["grad_norm"])
    assert "loss" in trials["as it was"]["wrong"]
    for what in ("nearest instead of stochastic rounding", "no Hadamard rotation", "wgrad in BF16", "dgrad in BF16"):
        assert trials[what]["wrong"] and trials[what]["loss"] == recorded["loss"], what
        assert trials[what]["grad_norm"] != recorded["grad_norm"], what
    travelled = trials["gradients add up and travel in FP32"]
    assert travelled["wrong"] and travelled["grad_norm"] != recorded["grad_norm"]
    healthy = run_script(BISECT, str(run), "8", "--norm-limit", "1e9", "--loss-limit", "1e9")
    assert healthy.returncode == 2 and "does not go wrong" in healthy.stdout


def test_a_planted_nan_is_found_under_a_pipeline(tmp_path):
    fault = "faulty=1,layers.2.mlp.down,wgrad,2,nan"
    layout = ("parallel.pp=2", "parallel.schedule=1f1b")
    keys = (
        *MODEL,
        *layout,
        "train.steps=4",
        "checkpoint.interval=2",
        "precision.policy=mxfp8",
        "spikes.diagnose=false",
    )
    assert train(tiny(tmp_path), *keys, fault, ranks=2, script=FAULTY).returncode == 0
    run = tmp_path / "run"
    assert [record["nan"] for record in steps(run)] == [False, False, True, False]
    found = run_script(str(FAULTY), fault, "bisect", str(run), "3", ranks=2)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "First on rank 1: layers.2.mlp.down wgrad, product of finite operands" in found.stdout
    assert "layers.2.mlp.down wgrad in BF16" in found.stdout
    assert "layers.2.mlp.down wgrad.a (e4m3 e8m0/1x32 rceil) in BF16" in found.stdout
    wrong = run_script(BISECT, str(run), "3")
    assert wrong.returncode == 2 and "parallel.pp=1" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(("arguments", "words"), [(["nowhere", "1"], "resolved.yaml"), (["RUN", "99"], "steps 1 to 2")])
def test_what_cannot_be_repeated_is_one_message(tmp_path, arguments, words):
    assert train(tiny(tmp_path), "train.steps=2").returncode == 0
    failed = run_script(BISECT, *(word.replace("RUN", str(tmp_path / "run")) for word in arguments))
    assert failed.returncode == 2 and words in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.parametrize("guilty", [["l3"], ["l0", "l7"], ["l2", "l3", "l9"], [f"l{i}" for i in range(10)]])
def test_the_smallest_set_of_culprits(guilty):
    asked: list[frozenset[str]] = []

    def cures(chosen: frozenset[str]) -> bool:
        asked.append(chosen)
        return set(guilty) <= chosen

    assert sorted(smallest([f"l{i}" for i in range(10)], cures, 200)) == guilty
    assert len(guilty) > 1 or len(asked) <= 2 * 4, "halving"


def test_a_step_is_judged_by_the_same_step_in_bf16():
    reference, limits = Outcome(4.0, 2.0), Limits()
    assert judge(Outcome(4.03, 2.1), reference, limits) is None
    assert judge(Outcome(4.1, 2.1), reference, limits) == "loss +2.5%"
    assert judge(Outcome(4.0, 1.0), reference, limits) == "gradient norm -50%"
    assert judge(Outcome(4.0, float("inf")), reference, limits) == "not finite"
    assert judge(Outcome(4.0, 1.0), Outcome(float("nan"), float("inf")), limits) is None
