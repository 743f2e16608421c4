"""`train.py --plan`: layouts that fit, what is refused, options, JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from errors import UsageError
from recipe import load, resolve
from report.plan.hardware import GPUS, find_machine
from report.plan.plan import Planner
from report.plan.report import make_report, to_dict
from report.plan.search import search
from run.dry_run import dry_run
from tests.launch import train


def test_suggestions_fit_are_sorted_and_pass_what_a_run_would_check():
    recipe = load("nvfp4_10m", ("train.micro_batch=1",))
    found = search(Planner(recipe, GPUS["b200"], 4), recipe, 8, 6)
    assert len(found.plans) == 6 and found.tried >= found.fitting >= 6
    speeds = [plan.tokens_per_second for plan in found.plans]
    assert speeds == sorted(speeds, reverse=True)
    layouts = {(p.layout.tp, p.layout.pp, p.layout.recipe.zero.stage) for p in found.plans}
    assert len(layouts) == 6
    for plan in found.plans:
        layout = plan.layout
        assert plan.fits and layout.tp * layout.pp * layout.dp == 8 and not layout.recipe.problems(8)
        assert layout.recipe.train == recipe.train and layout.recipe.precision == recipe.precision
        dry_run(layout.recipe, 8, 7)


def test_recomputation_is_suggested_only_where_memory_asks_for_it():
    overrides = ("train.micro_batch=16", "model.vocab_size=512")  # much to recompute, few logits
    recipe = load("bf16_10m", overrides)
    planner = Planner(recipe, GPUS["h100"], 1)
    stages = [load("bf16_10m", (*overrides, f"zero.stage={stage}")) for stage in range(4)]
    fits = min(planner.in_bytes(layout, 1).fullest.peak for layout in stages)
    assert search(planner, recipe, 1, 1).plans[0].layout.recipe.model.recompute == "none"
    small = replace(GPUS["h100"], memory=0.95 * fits, usable=1.0)
    (best,) = search(Planner(recipe, small, 1), recipe, 1, 1).plans
    assert best.layout.recipe.model.recompute in ("selective", "full") and best.fullest.peak < fits
    tiny = replace(small, memory=1e6)
    nothing = search(Planner(recipe, tiny, 1), recipe, 1, 5)
    assert nothing.plans == () and nothing.tried > 0 and nothing.fitting == 0


def test_a_layout_that_is_refused_says_why_and_others_are_suggested():
    recipe = resolve("bf16_10m", ("parallel.tp=3",))
    report = make_report(Planner(recipe, GPUS["h100"], 2), recipe, 2, 2)
    assert report.plan is None and any("does not divide 2 processes" in line for line in report.problems)
    assert report.found is not None and len(report.found.plans) == 2
    answer = to_dict(report)
    assert answer["tokens_per_second"] is None and answer["parameters"] == recipe.model.parameter_count()
    with pytest.raises(UsageError, match="train.steps is 0"):
        make_report(Planner(recipe, GPUS["h100"], 2), resolve("bf16_10m", ("train.steps=0",)), 2, 2)


def test_the_answer_as_json(tmp_path):
    target = tmp_path / "plan.json"
    done = train("nvfp4_10m", "--plan", "--gpu", "b200", f"--json={target}", "train.micro_batch=4")
    assert done.returncode == 0, done.stderr
    plan = json.loads(target.read_text())
    assert plan["parameters"] == load("nvfp4_10m").model.parameter_count() and plan["fits"]
    assert plan["bytes_per_rank"] == sum(plan["bytes_by_kind"].values()) > 14 * plan["parameters"]
    assert plan["tokens_per_second"] == pytest.approx(16 * 256 / plan["step_seconds"])
    assert set(plan["mfu"]) == {"BF16 peak", "mixed peak", "recipe peak"}
    assert set(plan["activations"]) == {"none", "selective", "full"}
    assert plan["days"] == pytest.approx(640 * plan["step_seconds"] / 86400)
    assert "guessed" in done.stdout and "row copies, codes" in done.stdout and "Layouts that fit" in done.stdout
    alone = train("nvfp4_10m", "--plan", "--json", "-", "train.micro_batch=4")
    assert json.loads(alone.stdout)["bytes_per_rank"] == plan["bytes_per_rank"]


def test_what_does_not_fit_ends_with_1(tmp_path):
    gpu = tmp_path / "small.yaml"
    gpu.write_text("{base: h100, memory: 1e8, attained_gemm: 0.5}\n")
    done = train("bf16_10m", "--plan", "--gpu", str(gpu))
    assert done.returncode == 1, done.stderr
    assert "does not fit" in done.stdout and "0 of" in done.stdout


def test_wrong_options_are_one_message(tmp_path):
    for words, message in (
        (("--plan", "--gpu", "h10"), "did you mean h100?"),
        (("--plan", "--nodes", "0"), "--nodes is 0"),
        (("--gpu", "h100"), "are for --plan"),
        (("--plan", "--dry-run"), "--plan trains nothing"),
    ):
        done = train("bf16_10m", *words)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    for text, message in (
        ("{base: x100}", "with `base`"),
        ("{base: h100, tflops: 3}", "unknown key tflops"),
        ("{base: h100, attained_gemm: 1.5}", "a share above 0"),
        ("{base: h100, peaks: {fp4: 1e15}}", "it maps bf16, fp32, fp8"),
    ):
        path = tmp_path / "gpu.yaml"
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            find_machine(str(path))
    path.write_text("{base: h100, peaks: {fp8: 1.5e15}, inter: 25e9}")
    machine = find_machine(str(path))
    assert machine.peaks["fp8"] == 1.5e15 and machine.peaks["bf16"] == GPUS["h100"].peaks["bf16"]
    assert str(machine.peak("fp8")).endswith(f"{path})") and machine.source("latency") == "guessed"
