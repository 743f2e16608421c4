"""Low-precision runs from the command line: receipts, resuming, changing the policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import ROOT, steps, tiny, train


def _losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in steps(run_dir)]


def _receipt(run_dir: Path) -> dict[str, int]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return next(record["gemms"] for record in records if record["kind"] == "receipt")


SLOW = pytest.param("mxfp8", 3, 2, "e4m3", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("policy", "stage", "ranks", "element"),
    [("nvfp4", 1, 1, "e2m1"), ("fp8_delayed", 2, 2, "e4m3"), ("mxfp4", 0, 1, "e2m1"), SLOW],
)
def test_stopped_and_resumed_is_bit_equal_and_the_receipt_shows_the_format(tmp_path, policy, stage, ranks, element):
    """Stochastic rounding and amax histories included; recomputation on, so that it must repeat the same bits."""
    keys = (f"precision.policy={policy}", f"zero.stage={stage}", "model.recompute=full", "train.steps=6")
    keys += ("checkpoint.interval=3",) if policy != "mxfp4" else ("checkpoint.interval=3", "model.hidden_size=64")
    straight = train(tiny(tmp_path, "straight"), *keys, ranks=ranks)
    assert straight.returncode == 0, straight.stderr
    recipe = tiny(tmp_path, "stopped")
    assert train(recipe, *keys, "train.stop_at=3", ranks=ranks).returncode in (0, 75)
    resumed = train(recipe, *keys, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert _losses(tmp_path / "stopped") == _losses(tmp_path / "straight")
    receipt = _receipt(tmp_path / "straight")
    assert {name.split()[0] for name in receipt} == {"fprop", "dgrad", "wgrad"}
    wgrad = next(name for name in receipt if name.startswith("wgrad"))
    assert element in wgrad or "e5m2" in wgrad


def test_another_policy_on_resume_needs_to_be_allowed(tmp_path):
    recipe, keys = tiny(tmp_path), ("train.steps=4", "checkpoint.interval=2")
    assert train(recipe, *keys, "train.stop_at=2", "precision.policy=fp8_delayed").returncode == 75
    refused = train(recipe, *keys, "precision.policy=mxfp8")
    assert refused.returncode == 4 and "--allow-precision-change" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr
    allowed = train(recipe, *keys, "precision.policy=mxfp8", "--allow-precision-change")
    assert allowed.returncode == 0, allowed.stderr
    assert "precision.policy: fp8_delayed -> mxfp8" in allowed.stdout


def test_a_phase_of_the_schedule_is_announced_and_counted(tmp_path):
    done = train(
        tiny(tmp_path), "train.steps=4", "precision.policy=mxfp8", "precision.schedule=[{start: 0.5, fprop: bf16}]"
    )
    assert done.returncode == 0, done.stderr
    assert "precision from step 2 on:" in done.stdout and "mxfp8 (fprop bf16)" in done.stdout


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("precision.policy=mxfp9", ["mxfp9", "did you mean mxfp8?"]),
        ("precision.schedule=[{start: 2}]", ["changes nothing"]),
        ("precision.schedule=[{start: 99, fprop: bf16}]", ["99", "train.steps"]),
        ("precision.bf16_first=2", ["reach no linear"]),
        ("precision.bf16_first=99", ["99", "2 blocks"]),
        ("precision.schedule=[{start: 2, fprop: bf16, wgard: bf16}]", ["schedule[0].wgard", "did you mean wgrad?"]),
    ],
)
def test_precision_errors_are_one_message(tmp_path, override, words):
    failed = train(tiny(tmp_path), "precision.policy=mxfp8", override)
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    for word in words:
        assert word in failed.stderr


def test_validation_changes_nothing_that_trains(tmp_path):
    """Delayed scaling takes its amaxes from training alone."""
    keys = ("train.steps=4", "precision.policy=fp8_delayed")
    assert train(tiny(tmp_path, "without"), *keys, "eval.interval=0").returncode == 0
    assert train(tiny(tmp_path, "with"), *keys, "eval.interval=1").returncode == 0
    assert _losses(tmp_path / "with") == _losses(tmp_path / "without")


def test_a_run_with_a_policy_of_the_users_own_is_reproduced_by_its_resolved_recipe(tmp_path):
    """Also when the policy file has changed since."""
    policy = tmp_path / "mine.yaml"
    text = (ROOT / "recipes/precision/mxfp8.yaml").read_text()
    policy.write_text(text)
    done = train(tiny(tmp_path, "first"), "train.steps=3", f"precision.policy={policy}")
    assert done.returncode == 0, done.stderr
    policy.write_text(text.replace("mxfp8_e4m3", "mxfp4"))
    again = train(tmp_path / "first/resolved.yaml", f"run.dir={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    assert _losses(tmp_path / "again") == _losses(tmp_path / "first")
    assert json.loads((tmp_path / "first/precision.json").read_text())["phases"]["0"]
