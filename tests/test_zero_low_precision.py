"""Low-precision gradients, states and weights inside ZeRO: bytes, traffic, equality over ranks, overflow."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from lowprec.engine import Engine
from lowprec.gradients import GradientsConfig, GradientStore
from lowprec.optim import OptimizerConfig
from lowprec.patching import Patch, PatchError
from lowprec.zero import ZeroConfig, ZeroPlan, build_engine
from tests.launch import steps, tiny, train
from tests.spawn import run_ranks

pytestmark = pytest.mark.xdist_group("zero_low_precision")  # what its fixtures compute is computed once

LEAN: dict[str, Any] = {
    "exp_avg": "dynamic4_b128",
    "exp_avg_sq": "linear4_b128",
    "master": "none",
    "update": "stochastic",
}
FP8LM: dict[str, Any] = {"exp_avg": "fp8_e4m3", "exp_avg_sq": "fp16_scaled", "master": "fp16_scaled"}


class Wide(nn.Module):
    """Two matrices large enough for every codec, and a vector."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.first = nn.Linear(96, 256, bias=True, dtype=dtype)
        self.second = nn.Linear(256, 64, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).float().square().mean()


def engine_of(
    optimizer: dict[str, Any], gradients: GradientsConfig, *, stage: int = 1, accumulation: int = 1, **zero: Any
) -> Engine:
    plan = ZeroPlan(
        zero=ZeroConfig(stage=stage, **zero),
        optimizer=OptimizerConfig(lr=0.01, clip=1.0, **optimizer),
        gradients=gradients,
        micro_batch=2,
        accumulation=accumulation,
        seed=3,
    )
    engine = build_engine([Wide(torch.bfloat16)], plan)

    def values(fragment):
        whole = torch.randn(fragment.shape, generator=torch.Generator().manual_seed(len(fragment.name))).flatten()
        return whole[fragment.offset : fragment.offset + fragment.extent.count] * 0.1

    engine.fill_weights(values)
    return engine


def run_steps(engine: Engine, world: int, rank: int, count: int, accumulation: int, poison: int = -1) -> list:
    found = []
    for step in range(count):
        x = torch.randn(world * accumulation * 2, 96, generator=torch.Generator().manual_seed(step)).bfloat16()
        if step == poison and rank == world - 1:
            x[-1, 0] = float("inf")
        for micro in x.chunk(world)[rank].split(2):
            engine.backward(engine(micro))
        found.append(engine.step(lr=0.01))
    return found


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    names, parameters = zip(*engine.module.named_parameters(), strict=True)
    with deepspeed.zero.GatheredParameters(list(parameters), enabled=hasattr(parameters[0], "ds_id")):  # of stage 3
        return {name: p.detach().clone() for name, p in zip(names, parameters, strict=True)}


def _memory_rank(rank: int) -> dict[str, dict[str, float]]:
    cases = {
        "baseline": ({}, GradientsConfig()),
        "lean": (LEAN, GradientsConfig(payload="fp8_e4m3_b128", accumulate="bf16")),
        "fp8lm": (FP8LM, GradientsConfig(payload="fp8_lm", accumulate="fp8")),
    }
    found = {}
    for name, (optimizer, gradients) in cases.items():
        for accumulation in (1, 4):
            engine = engine_of(optimizer, gradients, accumulation=accumulation)
            run_steps(engine, 1, 0, 2, accumulation)
            found[f"{name}{accumulation}"] = {k: v / engine.parameters for k, v in engine.memory().items()}
    return found


def test_bytes_a_parameter_on_one_rank():
    """The vector of 256 stays FP32, 0.6 % of the model; everything else is what the formats say."""
    (found,) = run_ranks(_memory_rank, 1, timeout=300)
    for accumulation in (1, 4):
        assert sum(found[f"baseline{accumulation}"].values()) == pytest.approx(18, abs=0.01)
        lean = found[f"lean{accumulation}"]
        assert lean["master"] == 0 and sum(lean.values()) < 5.2, lean
        fp8lm = found[f"fp8lm{accumulation}"]
        assert sum(fp8lm.values()) - fp8lm["weights"] < 6.1, fp8lm


def _traffic_rank(rank: int, world: int) -> dict[str, int]:
    sent = {}
    for payload in ("fp32", "bf16", "fp8_lm", "fp8_e4m3_b128", "mxfp8_e4m3"):
        engine = engine_of({}, GradientsConfig(payload=payload))
        both = run_steps(engine, world, rank, 1, 1)[0].sent_bytes
        weights = 2 * engine.parameters * (world - 1) // world
        sent[payload] = both - weights
    return sent


def test_bytes_on_the_wire():
    for sent in run_ranks(_traffic_rank, 2, 2, timeout=300):
        for payload in ("fp8_lm", "fp8_e4m3_b128", "mxfp8_e4m3"):
            assert sent[payload] <= 0.27 * sent["fp32"] and sent[payload] <= 0.53 * sent["bf16"], sent


CASES: dict[str, tuple[dict[str, Any], GradientsConfig, dict[str, Any]]] = {
    "lean": (LEAN, GradientsConfig(accumulate="bf16"), {}),
    "fp8lm_o3": (FP8LM, GradientsConfig(accumulate="fp8"), {"gather": "fp8_e4m3"}),
    "rank1": ({"exp_avg": "dynamic4_b128", "exp_avg_sq": "linear4_rank1"}, GradientsConfig(), {}),
    "factor": ({"exp_avg": "dynamic8_b256", "exp_avg_sq": "factor"}, GradientsConfig(), {}),
    "kahan": ({"master": "none", "update": "kahan"}, GradientsConfig(), {"stage": 2}),
    "payload2": ({}, GradientsConfig(payload="fp8_lm"), {"stage": 2}),
    "blocks2": ({}, GradientsConfig(payload="mxfp8_e4m3"), {"stage": 2}),
    "states3": ({"exp_avg": "dynamic4_b128", "exp_avg_sq": "linear4_rank1"}, GradientsConfig(), {"stage": 3}),
    "scaled3": (FP8LM, GradientsConfig(), {"stage": 3}),
    "lean3": (LEAN, GradientsConfig(), {"stage": 3}),
    "kahan3": ({"master": "none", "update": "kahan"}, GradientsConfig(), {"stage": 3}),
    "collage3": ({"master": "none", "update": "collage_plus"}, GradientsConfig(), {"stage": 3}),
    "bf16_3": ({"master": "bf16"}, GradientsConfig(), {"stage": 3}),
}


def _cases_rank(rank: int, world: int, batch: int) -> dict[str, tuple]:
    found = {}
    for name, (optimizer, gradients, zero) in CASES.items():
        accumulation = batch // world // 2
        engine = engine_of(optimizer, gradients, accumulation=accumulation, reduce_bucket=20_000, **zero)
        results = run_steps(engine, world, rank, 4, accumulation, poison=2)
        found[name] = [r.grad_norm for r in results], [r.skipped for r in results], weights_of(engine), engine.updates
    return found


@cache
def by_rank(world: int) -> list[dict[str, tuple]]:
    return run_ranks(_cases_rank, world, world, 8, timeout=600)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_computes_the_same(case, world):
    """Codes, scales and random bits are those of the logical tensors; only gradients' order of additions differs."""
    norms, skipped, weights, updates = by_rank(1)[0][case]
    assert skipped == [False, False, True, False] and updates == 3
    for rank in by_rank(world):
        assert rank[case][1] == skipped
        # An accumulator in FP8 or BF16, and a payload, round other partial sums on other numbers of ranks.
        loose = (CASES[case][1].accumulate, CASES[case][1].payload) != ("fp32", "fp32")
        assert rank[case][0][0] == pytest.approx(norms[0], rel=2e-2 if loose else 1e-6)
        for name, value in weights.items():
            assert torch.equal(by_rank(world)[0][case][2][name], rank[case][2][name]), "ranks disagree"
            difference = (rank[case][2][name].float() - value.float()).abs()
            assert difference.mean() < (2e-3 if loose else 2e-5), (case, world, name, difference.mean())


def test_stage_3_writes_the_weights_of_stage_2():
    """One rank: the same gradients, the same rule."""
    (cases,) = by_rank(1)
    for name, value in cases["kahan"][2].items():
        torch.testing.assert_close(cases["kahan3"][2][name], value, rtol=2**-7, atol=0)


def test_stores_accumulate_as_they_say():
    one = torch.tensor([1.0, 2.0**-9, -3.0])
    stores = {name: GradientStore(name) for name in ("fp32", "bf16", "fp8")}
    for store in stores.values():
        for _ in range(2):
            store.add(one.clone())
    assert stores["fp32"].read().tolist() == [2.0, 2.0**-8, -6.0]
    assert stores["bf16"].read().tolist() == [2.0, 2.0**-8, -6.0] and stores["bf16"].nbytes == 6
    assert stores["fp8"].read().tolist() == [2.0, 2.0**-8, -6.0] and stores["fp8"].nbytes == 3 + 4
    stores["bf16"].add(torch.tensor([2.0**-9, 0.0, 0.0]))
    assert stores["bf16"].read()[0] == 2.0  # half a unit of 2 is a tie: to even, the addend is lost
    stores["fp8"].add(torch.tensor([float("inf"), 0.0, 0.0]))
    assert not stores["fp8"].read().isfinite().all()


def test_an_unsupported_version_and_a_double_claim_are_clear_errors(monkeypatch):
    import lowprec.patching as patching

    patch = Patch(
        dist="deepspeed", requires=">=0.19.8,<0.20", module="json", name="dumps", build=lambda f: f, why="test"
    )
    before = json.dumps
    with pytest.raises(PatchError, match="two patches claim the same name"), patching.applied(patch, patch):
        pass
    monkeypatch.setattr(patching, "version", lambda name: "0.21.0")
    with pytest.raises(PatchError, match="patched for deepspeed >=0.19.8,<0.20, found 0.21.0"), patching.applied(patch):
        pass
    assert json.dumps is before


ROUNDED = (
    "optimizer.exp_avg=dynamic4_b128",
    "optimizer.exp_avg_sq=linear4_b128",
    "optimizer.master=none",
    "optimizer.update=stochastic",
    "gradients.payload=fp8_lm",
    "gradients.error_feedback=true",
)


AT_STAGE_3 = ROUNDED[:4]  # gradients are FP32 there


@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_coded_states_resume_bit_equally(tmp_path, stage, ranks):
    """Packed codes, scales, random bits, residuals of error feedback and mu."""
    rounded = ROUNDED if stage < 3 else AT_STAGE_3
    keys = (*rounded, f"zero.stage={stage}", "train.steps=6", "checkpoint.interval=3", "model.hidden_size=128")
    straight = train(tiny(tmp_path, "straight"), *keys, ranks=ranks)
    assert straight.returncode == 0, straight.stderr
    recipe = tiny(tmp_path, "stopped")
    assert train(recipe, *keys, "train.stop_at=3", ranks=ranks).returncode in (0, 75)
    resumed = train(recipe, *keys, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    first, second = steps(tmp_path / "straight"), steps(tmp_path / "stopped")
    assert [r["loss"] for r in first] == [r["loss"] for r in second]
    assert [r["param_norm"] for r in first] == [r["param_norm"] for r in second]
    assert 0 < first[-1]["edq"] < 1.5 and 0 <= first[-1]["lost_updates"] < 1
    memory = next(json.loads(line) for line in _lines(tmp_path / "straight") if '"memory"' in line)
    assert memory["bytes"]["master"] == 0 and memory["bytes"]["exp_avg"] < memory["parameters"]


def _lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.update=kahan"], ["update kahan", "master"]),
        (["optimizer.exp_avg=int3"], ["exp_avg", "int3"]),
        (["gradients.payload=fp8", "zero.stage=2"], ["gradients.payload", "fp8"]),
        (["gradients.payload=fp8_e4m3", "zero.stage=3"], ["gradients.payload", "zero.stage 3"]),
        (["gradients.error_feedback=true"], ["error_feedback", "not quantized"]),
        (["optimizer.master=none", "model.dtype=fp32"], ["optimizer.master none", "bf16"]),
        (["optimizer.master=none", "zero.gather=fp8_e4m3"], ["zero.gather", "only copy"]),
    ],
)
def test_combinations_that_mean_nothing_are_refused(tmp_path, overrides, words):
    failed = train(tiny(tmp_path), *overrides)
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    for word in words:
        assert word in failed.stderr
