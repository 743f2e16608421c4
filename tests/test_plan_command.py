"""`train.py --plan`: layouts that fit, what is refused, options, JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from errors import UsageError
from recipe import load, resolve
from report.plan import command
from report.plan.command import Options
from report.plan.hardware import GPUS, find_machine
from report.plan.plan import Planner
from report.plan.report import how_quantized, make_report, to_dict, verdict
from report.plan.search import search
from run.dry_run import dry_run
from tests.launch import train

FEW = ("model.num_layers=2", "model.vocab_size=512", "model.hidden_size=64", "model.ffn_size=128")  # quick to search


def test_suggestions_fit_are_sorted_and_pass_what_a_run_would_check():
    recipe = load("nvfp4_10m", ("train.micro_batch=1", "model.num_layers=4"))
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
        words = ("train.micro_batch=1", "model.num_layers=4", *layout.overrides().split())
        assert lay(resolve("nvfp4_10m", words)) == lay(layout.recipe)
    dry_run(found.plans[0].layout.recipe, 8, 7)


def lay(recipe):
    """What a layout may change of a recipe."""
    own = recipe.parallel
    return own.tp, own.sp, own.pp, own.schedule, recipe.zero.stage, recipe.model.recompute


def test_recomputation_is_suggested_only_where_memory_asks_for_it():
    recipe = load("bf16_10m", ("train.micro_batch=16", "model.vocab_size=512"))  # much to recompute, few logits
    planner = Planner(recipe, GPUS["h100"], 1)
    fits = planner.in_bytes(recipe, 1).fullest.peak
    assert search(planner, recipe, 1, 1).plans[0].layout.recipe.model.recompute == "none"
    planner.machine = small = replace(GPUS["h100"], memory=0.95 * fits, usable=1.0)
    (best,) = search(planner, recipe, 1, 1).plans
    assert best.layout.recipe.model.recompute in ("selective", "full") and best.fullest.peak < fits
    planner.machine = replace(small, memory=1e6)
    nothing = search(planner, recipe, 1, 5)
    assert nothing.plans == () and nothing.tried > 0 and nothing.fitting == 0


def test_a_layout_that_is_refused_says_why_and_others_are_suggested():
    recipe = resolve("bf16_10m", (*FEW, "parallel.tp=3"))
    report = make_report(Planner(recipe, GPUS["h100"], 2), recipe, 2, 2)
    assert report.plan is None and any("does not divide 2 processes" in line for line in report.problems)
    assert report.found is not None and len(report.found.plans) == 2
    answer = to_dict(report)
    assert answer["tokens_per_second"] is None and answer["parameters"] == recipe.model.parameter_count()
    said = verdict(report) or ""
    assert "bf16_10m on 2 x h100 is refused:" in said and f"fastest: {report.found.plans[0].layout.overrides()}" in said
    with pytest.raises(UsageError, match="train.steps is 0"):
        make_report(Planner(recipe, GPUS["h100"], 2), resolve("bf16_10m", ("train.steps=0",)), 2, 2)


def test_ranks_that_no_layout_divides():
    with pytest.raises(UsageError, match="batch 16 is not divisible(.|\n)*no other layout of these ranks is valid"):
        command.run(resolve("bf16_10m", FEW), Options(gpu="h100", nodes=7, json="-"))


def test_the_answer_as_json(tmp_path, capsys):
    target = tmp_path / "plan.json"
    recipe = resolve("nvfp4_10m", (*FEW, "train.micro_batch=4"))
    command.run(recipe, Options(gpu="b200", json=str(target)))
    shown = capsys.readouterr().out
    plan = json.loads(target.read_text())
    assert plan["parameters"] == recipe.model.parameter_count() and plan["fits"]
    assert plan["bytes_per_rank"] == sum(plan["bytes_by_kind"].values()) > 14 * plan["parameters"]
    assert plan["bytes_per_rank"] == max(plan["bytes_by_moment"].values())
    assert plan["bytes_logits"] == 4 * 256 * 512 * 2 and 8 <= plan["bytes_buckets"] / plan["parameters"] < 8.1
    assert plan["tokens_per_second"] == pytest.approx(16 * 256 / plan["step_seconds"])
    assert set(plan["mfu"]) == {"BF16 peak", "mixed peak", "recipe peak"}
    assert set(plan["activations"]) == {"none", "selective", "full"}
    assert plan["days"] == pytest.approx(640 * plan["step_seconds"] / 86400)
    for words in ("guessed", "row copies, codes", "Layouts that fit", "logits of a micro-batch", "in its reduction"):
        assert words in shown


def test_what_does_not_fit_is_one_message_after_the_plan(tmp_path, capsys):
    gpu = tmp_path / "small.yaml"
    gpu.write_text("{base: h100, memory: 1e7, attained_gemm: 0.5}\n")
    message = "bf16_10m on 1 x small does not fit: tp 1(.|\n)*none of 3 layouts fits; take more"
    with pytest.raises(UsageError, match=message):
        command.run(resolve("bf16_10m", FEW), Options(gpu=str(gpu), json="-"))
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_where_the_emulation_is_planned():
    """MXFP4 has no kernel here on any GPU, NVFP4 none on an H100, and none beside ZeRO 3."""
    for name, gpu, overrides, why in (
        ("mxfp4_10m", "b200", (), "scheme mxfp4 is none of its own recipes"),
        ("nvfp4_10m", "h100", (), "h100 multiplies none of these formats"),
        ("nvfp4_10m", "b200", ("zero.stage=3",), "zero.stage is 3"),
        ("nvfp4_10m", "b200", (), None),
    ):
        recipe = resolve(name, (*FEW, *overrides))
        plan = Planner(recipe, GPUS[gpu], 1).plan(recipe, 1)
        elements = {share.element for share in plan.shares if share.a}
        assert elements == ({"fp4"} if why is None else {"bf16"})
        (note,) = how_quantized(plan)
        assert (why or "Transformer Engine's") in note


def test_wrong_options_are_one_message(tmp_path):
    for words, message in (
        (("--plan", "--gpu", "h10"), "did you mean h100?"),
        (("--plan", "--nodes", "0"), "--nodes is 0"),
        (("--plan", "--json", "/nowhere/plan.json"), "there is no directory /nowhere"),
        (("--gpu", "h100"), "are for --plan"),
        (("--plan", "--dry-run"), "--plan trains nothing"),
    ):
        done = train("bf16_10m", *words)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    for text, message in (
        ("{base: x100}", "with `base`"),
        ("{base: h100, tflops: 3}", "unknown key tflops"),
        ("{base: h100, attained_gemm: 1.5}", "a share above 0"),
        ("{base: gb200, domain: 7.5}", "a whole number of devices"),
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
