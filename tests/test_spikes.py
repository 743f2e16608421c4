"""Steps that go wrong: judged, skipped on all ranks, named, rolled back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import recipe as recipes
from errors import UsageError, UserError
from lowprec.engine import StepResult
from lowprec.linear import LowPrecisionLinear
from lowprec.watch import watching
from run.spikes import SpikeGuard
from sections import SpikesConfig
from tests.launch import ROOT, steps, tiny, train
from tests.layout_case import Case
from tests.spawn import run_ranks

FAULTY = ROOT / "tests" / "faulty_train.py"


def _guard(**options: Any) -> SpikeGuard:
    return SpikeGuard(SpikesConfig(window=32, **options))


def _feed(guard: SpikeGuard, losses: list[float], norms: list[float] | None = None) -> list[tuple[int, dict, bool]]:
    """(step, spikes, whether it was applied) of every step with a spike."""
    found = []
    for step, loss in enumerate(losses):
        norm = norms[step] if norms else 1.0
        applied = guard.judge(loss)(norm)
        guard.finish(loss, StepResult(norm, not applied, update_norm=0.1 if applied else None))
        if guard.spikes:
            found.append((step, dict(guard.spikes), applied))
    return found


def _noise(count: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (4 + 0.02 * torch.randn(count, generator=generator)).tolist()


def test_a_spike_is_one_rise_far_above_the_steps_before():
    losses = _noise(100)
    losses[60], losses[70] = 5.0, 3.0  # a fall is none
    ((step, spikes, applied),) = _feed(_guard(), losses)
    assert step == 60 and set(spikes) == {"loss"} and applied
    window = sorted(losses[28:60])
    median = (window[15] + window[16]) / 2
    spread = sorted(abs(x - median) for x in window)
    assert spikes["loss"] == pytest.approx((5.0 - median) / (1.4826 * (spread[15] + spread[16]) / 2))


@pytest.mark.parametrize(("action", "applied"), [("warn", True), ("skip", False), ("rollback", False)])
def test_what_a_spike_of_the_gradient_norm_does_to_the_step(action, applied):
    norms = [1.0] * 40
    norms[30] = 10.0
    found = _feed(_guard(action=action), _noise(40), norms)
    assert [(step, set(spikes), done) for step, spikes, done in found] == [(30, {"grad_norm"}, applied)]
    assert _feed(_guard(action="off"), _noise(40), norms) == []


def test_a_level_that_stays_is_accepted_after_half_a_window():
    losses = _noise(60) + [x + 1 for x in _noise(60, 1)]
    found = [step for step, _, _ in _feed(_guard(action="skip"), losses)]
    assert found[0] == 60 and 74 <= found[-1] <= 78, found


def test_early_steps_and_numbers_that_are_not_finite_are_no_spikes():
    assert _feed(_guard(), [10.0, 9.0, 20.0, 8.0]) == []
    guard = _guard()
    losses = _noise(40)
    losses[30] = math.nan
    assert _feed(guard, losses) == []
    assert not guard.judge(math.nan)(1.0), "a loss that is not finite is never applied"


def test_losses_of_real_runs_are_no_spikes():
    """33 real runs of 500 steps that ended well, by the default limits."""
    data = np.load(ROOT / "tests" / "data" / "paired_losses.npz")
    baseline, behind = 2e-5 * data["baseline"], 2e-5 * data["behind"]
    for losses in [*baseline, *(baseline + behind).reshape(-1, baseline.shape[-1])]:
        assert _feed(SpikeGuard(SpikesConfig()), losses.tolist()) == []


def test_the_guard_goes_on_from_its_state():
    losses = _noise(80)
    losses[70] = 4.5
    straight, first, second = _guard(), _guard(), _guard()
    expected = _feed(straight, losses)
    assert _feed(first, losses[:50]) == []
    second.load(json.loads(json.dumps(first.state())))
    assert [(step + 50, *rest) for step, *rest in _feed(second, losses[50:])] == expected != []


def test_rollbacks_that_do_not_get_past_a_step_end_the_run():
    guard = _guard(max_rollbacks=2)
    for step in (50, 60, 40):  # past 50; then back before 60
        guard.roll_back(step)
    with pytest.raises(UserError, match=r"step 55 .*2 rollbacks .*past step 60"):
        guard.roll_back(55)


SKIPS = [("zero.stage=0",), ("zero.stage=1",), ("zero.stage=2",), ("zero.stage=3",), ("parallel.tp=2",)]
SKIPS += [("parallel.pp=2", f"parallel.schedule={schedule}") for schedule in ("1f1b", "zbv")]
SMALL = ("model.num_layers=4", "train.global_batch=8", "spikes.update_norm=true")


def _spoil(case: Case, value: float) -> Any:
    """Add `value` to one gradient number of one rank in the next backward; returns what ends it."""
    name, parameter = next((n, p) for part in case.local.parts for n, p in part.named_parameters() if "down" in n)

    def hook(gradient: torch.Tensor | None) -> torch.Tensor | None:
        if gradient is None or dist.get_rank() != 1:
            return gradient
        spoilt = gradient.clone()
        spoilt.view(-1)[0] += value
        return spoilt

    return parameter.register_hook(hook)


def _skips(rank: int, cases: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    """What a step that is not finite, and one that is not accepted, do to each case: nothing."""
    found = []
    for overrides in cases:
        plain, spoilt = Case((*SMALL, *overrides)), Case((*SMALL, *overrides))
        expected = plain.run(0, 2)
        first = spoilt.run(0, 1)
        engine = spoilt.local.engine
        before, updates = engine.parameter_norm(), engine.updates
        hook = _spoil(spoilt, math.nan)
        nan = spoilt.update(1)
        hook.remove()
        norms: list[float] = []
        refused = spoilt.update(1, lambda norm, seen=norms: bool(seen.append(norm)))
        assert engine.parameter_norm() == before and engine.updates == updates
        second = spoilt.run(1, 1)
        found.append({"nan": nan, "refused": refused, "seen": norms, "same": [*first.norms, *second.norms]})
        found[-1]["straight"] = expected.norms
        found[-1]["equal"] = second.parameter_norm == expected.parameter_norm
    return found


@pytest.mark.slow
def test_a_step_that_is_not_finite_or_not_accepted_changes_nothing_under_any_layout():
    ranks = run_ranks(_skips, 2, SKIPS)
    for case, *results in zip(SKIPS, *ranks, strict=True):
        for found in results:
            assert found["nan"].skipped and found["nan"].grad_norm == math.inf, case
            assert found["refused"].skipped and found["refused"].update_norm is None, case
            assert found["seen"] == [found["refused"].grad_norm] == [found["straight"][1]], case
            assert found["same"] == found["straight"] and found["equal"], case
        assert results[0]["seen"] == results[1]["seen"], "the ranks judge the same number"


def _notes(run: Path, *kinds: str) -> list[dict[str, Any]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] in kinds]


TRAINED = ("train.steps=6", "precision.policy=mxfp8")


@pytest.mark.parametrize(
    ("ranks", "layout", "fault"),
    [
        (2, (), "1,layers.1.mlp.down,dgrad"),
        (2, ("parallel.pp=2", "parallel.schedule=1f1b", "model.num_layers=4"), "0,layers.1.attention.qkv,dgrad"),
    ],
)
def test_a_planted_nan_is_named_and_the_run_goes_on(tmp_path, ranks, layout, fault):
    done = train(tiny(tmp_path), *TRAINED, *layout, f"faulty={fault},3,nan", ranks=ranks, script=FAULTY)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert [(r["skipped"], r["nan"]) for r in steps(run)] == [(False, False)] * 3 + [(True, True)] + [
        (False, False)
    ] * 2
    rank, module, gemm = fault.split(",")
    (note,) = _notes(run, "nonfinite")
    assert (note["step"], note["rank"], note["module"], note["leg"]) == (4, int(rank), module, gemm)
    assert f"First on rank {rank}: {module} {gemm}" in done.stdout
    assert "number of skipped iterations:   1 | number of nan iterations:   1" in done.stdout
    # The weights are those of a run that never had the step: its loss of the next batch is a little higher.
    assert steps(run)[4]["loss"] < steps(run)[0]["loss"]


def _plant(case: Case, module: str, where: str) -> Callable[[], object]:
    """Spoil one number of what `module` makes (fprop, dgrad, wgrad), or of its weight. Returns what undoes it."""
    target = next(p.get_submodule(module) for p in case.local.parts if module in dict(p.named_modules()))

    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = math.nan
        return tensor

    if where == "weight":
        first = target.weight.detach().view(-1)[:1]
        kept = first.clone()
        first.fill_(math.nan)
        return lambda: first.copy_(kept)
    if isinstance(target, LowPrecisionLinear):
        right = target.multiply
        wrong = lambda gemm, *rest: spoilt(right(gemm, *rest)) if gemm == where else right(gemm, *rest)  # noqa: E731
        vars(target).update(multiply=wrong, streams=False)
        return lambda: [vars(target).pop(name) for name in ("multiply", "streams")]
    if where == "wgrad":
        return target.weight.register_hook(spoilt).remove
    if where == "dgrad":
        return target.register_forward_pre_hook(lambda _, x: x[0].register_hook(spoilt) and None).remove
    forward = target.forward
    target.forward = lambda x: spoilt(forward(x))
    return lambda: vars(target).pop("forward")


MXFP8 = ("precision.policy=mxfp8", "model.dtype=bf16", "model.hidden_size=64", "model.ffn_size=128")
PP, TP = ("parallel.pp=2", "parallel.schedule=1f1b"), ("parallel.tp=2",)
# layout, where the NaN is planted on rank 1, and what that rank finds if it is not the planted place
FINDINGS = [
    ((*MXFP8, *TP), "layers.2.mlp.down", "fprop"),
    ((*MXFP8, *TP, "parallel.sp=true"), "layers.2.attention.out", "wgrad"),
    ((*MXFP8, "zero.stage=3", "model.recompute=full"), "layers.1.attention.qkv", "dgrad"),
    ((*MXFP8, "parallel.pp=2", "parallel.schedule=zbv"), "layers.1.mlp.gate_up", "wgrad"),
    ((*MXFP8, *PP), "layers.3.mlp.down", "dgrad"),
    ((), "layers.1.mlp.down", "fprop"),
    (("zero.stage=3",), "layers.1.mlp.down", "dgrad"),
    (("zero.stage=2",), "layers.0.attention.qkv", "wgrad"),
    (TP, "layers.1.mlp.gate_up", "dgrad"),
    (PP, "layers.3.mlp_norm", "weight"),
    (("zero.stage=1", *MXFP8), "layers.1.mlp.down", "weight"),
]


def _finds(rank: int, cases: list[tuple[tuple[str, ...], str, str]]) -> list[Any]:
    """(module, leg, what, received) of the first finding of this rank, NaN planted on rank 1."""
    found = []
    for overrides, module, where in cases:
        case = Case((*SMALL, *overrides))
        undo = _plant(case, module, where) if rank == 1 else None
        with watching(case.local.parts, case.local.precision.shared) as watch:
            case.update(0, lambda _: False)
        if undo is not None:
            undo()
        first = watch.first
        found.append(first and (first.module, first.leg, first.what, first.received, first.order))
        with watching(case.local.parts, case.local.precision.shared) as watch:
            assert not case.update(0).skipped
        assert watch.first is None, "the hooks are gone, and nothing of the fault is left"
    return found


def test_the_rank_module_and_leg_that_made_a_nan_are_found_under_any_layout():
    zero, one = run_ranks(_finds, 2, FINDINGS)
    for (layout, module, where), others, own in zip(FINDINGS, zero, one, strict=True):
        leg = {"weight": "fprop" if "norm" not in module else "forward"}.get(where, where)
        assert own[:2] == (module, leg) and not own[3], (layout, own)
        # Another rank finds nothing, was given it by the next stage, or has it only after the sum over both ranks.
        assert others is None or others[3] or others[4] > own[4], (layout, others, own)


SPIKING = ("train.steps=40", "precision.policy=mxfp8", "checkpoint.interval=10", "spikes.window=16")
FAULT = "faulty=0,layers.0.attention.qkv,dgrad,25,1e6"


def test_a_spiking_step_is_skipped(tmp_path):
    done = train(tiny(tmp_path), *SPIKING, "spikes.action=skip", FAULT, script=FAULTY)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert [r["step"] for r in steps(run) if r["skipped"]] == [26]
    assert not any(r["nan"] for r in steps(run))
    (note,) = _notes(run, "spike")
    assert note["step"] == 26 and not note["applied"] and note["z"]["grad_norm"] > 6, note
    assert steps(run)[25]["grad_norm"] > 3 * steps(run)[24]["grad_norm"]
    assert all(r["update_norm"] > 0 for r in steps(run) if not r["skipped"])


def test_a_run_goes_back_and_past_the_data_that_spiked(tmp_path):
    keys = (*SPIKING, "spikes.action=rollback", "spikes.patience=1", "metrics.tensorboard=true")
    done = train(tiny(tmp_path), *keys, FAULT, script=FAULTY)
    assert done.returncode == 5, "the fault is planted at a step, so no rollback gets past it"
    assert "step 26 spiked (gradient norm" in done.stderr and "3 rollbacks did not get" in done.stderr
    assert "Traceback" not in done.stderr
    run = tmp_path / "run"
    assert [r["step"] for r in steps(run)] == list(range(1, 27))
    notes = _notes(run, "rollback")
    assert [(n["step"], n["from"], n["samples_left_out"]) for n in notes] == [(20, 26, 48 * n) for n in (1, 2, 3)]
    assert steps(run)[20]["samples"] == (21 + 3 * 6) * 8
    assert len(json.loads((run / "manifest.json").read_text())["starts"]) == 1, "a rollback is no start"
    discarded = [json.loads(line) for line in (run / "metrics.discarded.jsonl").read_text().splitlines()]
    assert [r["step"] for r in discarded if r["kind"] == "step"] == [*range(21, 27)] * 3
    # Without the fault the same command goes on from the checkpoint, and ends.
    again = train(tiny(tmp_path), *keys)
    assert again.returncode == 0, again.stderr
    assert [r["step"] for r in steps(run)] == list(range(1, 41))


def test_a_rollback_goes_before_a_checkpoint_among_the_spikes(tmp_path):
    faults = [f"faulty=0,layers.0.attention.qkv,dgrad,{step},1e6" for step in (28, 29, 30)]  # saved after the second
    keys = (*SPIKING, "spikes.action=rollback", "spikes.patience=3", "spikes.max_rollbacks=1", *faults)
    done = train(tiny(tmp_path), *keys, script=FAULTY)
    assert done.returncode == 5 and "step 31 spiked" in done.stderr, done.stderr
    (note,) = _notes(tmp_path / "run", "rollback")
    assert (note["step"], note["from"]) == (20, 31)


def test_a_run_that_is_never_finite_ends(tmp_path):
    keys = ("train.steps=9", "optimizer.lr=1e30", "spikes.max_skipped=3", "spikes.diagnose=false")
    done = train(tiny(tmp_path), *keys)
    assert done.returncode == 5, done.stderr
    assert "3 steps in a row were not applied" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("spikes.action=rollback", ["checkpoint.interval is 0"]),
        ("spikes.window=3", ["spikes.window is 3"]),
        ("spikes.threshold=0", ["spikes.threshold is 0"]),
    ],
)
def test_settings_that_cannot_work_are_refused(override, words):
    with pytest.raises(UsageError) as error:
        recipes.load("bf16_10m", (override,), 1)
    assert all(word in str(error.value) for word in words)
