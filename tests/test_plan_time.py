"""FLOPs, traffic and seconds of a plan, against numbers calculated by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowprec.formats import resolve_spec
from parallel.bubble import simulate
from recipe import load, resolve
from report.flops import Peak, table_row
from report.plan.constraints import Constraint, constraints
from report.plan.costs import Pricing
from report.plan.fusion import compiled
from report.plan.hardware import GPUS, Machine
from report.plan.layout import units_of
from report.plan.partition import Parameter
from report.plan.plan import Planner, Utilization
from report.plan.report import refused_utilizations
from report.plan.steps import stage_times
from report.plan.trace import Op, Phase, Product
from report.plan.traffic import Link, Links
from report.plan.units import Linear, Unit, trace_units, view_of
from report.plan.updates import fused_bytes, traced_update

BF16 = torch.bfloat16
PLAIN = Machine(
    name="plain", device="none", peaks={"bf16": 1e12, "fp32": 1e11, "fp8": 2e12, "fp4": 4e12},
    native=frozenset({"nvfp4", "mxfp8"}), memory=1e9, bandwidth=1e10, intra=1e9, inter=1e8, latency=0.0, launch=0.0,
    attained_gemm=0.5, attained_memory=1.0,
)  # fmt: skip


def _gemm(a: str | None = None, b: str | None = None, width: int = 2) -> Op:
    product = Product("fprop", a, b) if a or b else None
    return Op("gemm", width, ((0, 8),), ((1, 8),), flops=2e9, shape=(1, 1000, 1000, 1000), product=product)


def test_a_gemm_takes_its_flops_at_what_its_operands_are_multiplied_as():
    """2 GFLOP at half of 1, 2, 4 and 0.1 TFLOP/s; an unknown or missing operand is multiplied in BF16."""
    pricing = Pricing(PLAIN, True, Link(1, 1, PLAIN))
    for op, milliseconds in (
        (_gemm(), 4.0),
        (_gemm("nvfp4", "nvfp4"), 1.0),
        (_gemm("mxfp8", "mxfp8"), 2.0),
        (_gemm("mxfp8", "nvfp4"), 2.0),
        (_gemm("fp8_tensor", "fp8_tensor"), 4.0),
        (_gemm("nvfp4"), 4.0),
        (_gemm(width=4), 40.0),
    ):
        assert pricing.seconds(op) == pytest.approx(1e-3 * milliseconds), op
    emulated = Pricing(PLAIN, False, Link(1, 1, PLAIN))
    assert emulated.seconds(_gemm("nvfp4", "nvfp4")) == pytest.approx(4e-3)


def test_what_multiplies_nothing_takes_its_bytes():
    pricing = Pricing(PLAIN, True, Link(1, 1, PLAIN))
    add = Op("pointwise", 2, ((0, 4_000_000), (1, 4_000_000)), ((2, 2_000_000),))
    assert pricing.seconds(add) == pytest.approx(1e-3)
    quantize = Op("quantize", 2, ((0, 8_000_000),), ((1, 8_000_000),), spec=resolve_spec("nvfp4"), packed=2_000_000)
    assert pricing.seconds(quantize) == pytest.approx(1e-3)  # packed: 10 MB
    assert Pricing(PLAIN, False, pricing.tensor).seconds(quantize) == pytest.approx(1.6e-3)  # decoded: 16 MB


def test_bytes_of_collectives_within_and_between_nodes():
    """16 ranks, four on each of four nodes; every rank gives 1600 bytes."""
    link = Link(16, 4, PLAIN)
    assert link.sent("all_reduce", 1600) == (3000, 600)
    assert link.sent("reduce_scatter", 1600) == (1500, 300)
    assert link.sent("all_gather", 1600) == (24000, 4800)
    assert link.sent("all_to_all", 1600) == (1500, 1200)
    assert link.seconds("all_to_all", 1600e6) == pytest.approx(300e6 / 1e9 + 1200e6 / 1e8)
    assert Link(1, 1, PLAIN).sent("all_reduce", 1600) == (0, 0)
    assert Link(2, 1, PLAIN).sent("send", 1600) == (1600, 1600) and Link(2, 2, PLAIN).sent("send", 1600) == (1600, 0)


def _units(name: str, *overrides: str, world: int = 1, recompute: str = "none"):
    recipe = load(name, (*overrides, f"model.recompute={recompute}"), world)
    return recipe, trace_units(recipe, view_of(recipe, BF16), [recompute])[recompute]


def _flops(*phases: Phase) -> float:
    return sum(op.flops for phase in phases for op in phase.ops if op.kind == "gemm")


def test_traced_gemms_are_six_flops_a_weight_and_token_and_recomputation_two_more():
    recipe, units = _units("nvfp4_10m")
    tokens = recipe.train.micro_batch * recipe.train.seq_len
    blocks = sum(linear.whole for linear in units.linears if linear.name != "lm_head")
    head = recipe.model.vocab_size * recipe.model.hidden_size
    assert sum(_flops(unit.forward, unit.backward) for unit in units.blocks) == 6 * tokens * blocks
    assert _flops(units.last.forward, units.last.backward) == 6 * tokens * head
    _, again = _units("nvfp4_10m", recompute="full")
    # torch stops recomputing at the last tensor that is needed: before mlp.down of the block that stays in BF16.
    unneeded = recipe.model.ffn_size * recipe.model.hidden_size
    assert sum(_flops(unit.forward, unit.backward) for unit in again.blocks) == tokens * (8 * blocks - 2 * unneeded)
    assert sum(unit.forward.kept for unit in again.blocks) < sum(unit.forward.kept for unit in units.blocks) / 10
    legs = {(op.product.leg, op.product.a) for unit in units.blocks for phase in (unit.forward, unit.backward)
            for op in phase.ops if op.product is not None}  # fmt: skip
    assert legs == {(leg, "nvfp4") for leg in ("fprop", "dgrad", "wgrad")}


def test_a_split_backward_computes_each_weight_gradient_once_and_later():
    recipe, units = _units("bf16_10m", "parallel.pp=2", "parallel.schedule=zbv", "train.micro_batch=2", world=2)
    whole, plain = _units("bf16_10m", "train.micro_batch=2")
    for split, unit in zip(units.blocks, plain.blocks, strict=True):
        assert _flops(split.weights) == _flops(unit.forward) and not unit.weights.ops
        assert _flops(split.backward, split.weights) == _flops(unit.backward)
        assert split.backward.kept > 0 and split.weights.kept == 0


def test_sequence_parallelism_gathers_and_scatters_what_enters_and_leaves():
    """Each of attention and FFN gathers [B, S / 2, h] once and scatters [B, S, h] once, forward."""
    recipe, units = _units("bf16_10m", "parallel.tp=2", "parallel.sp=true", "train.micro_batch=4", world=2)
    whole = 4 * recipe.train.seq_len * recipe.model.hidden_size * 2
    kinds = [(op.kind, op.reads[0][1]) for op in units.blocks[0].forward.ops if op.kind.startswith(("all", "reduce_s"))]
    assert kinds == [("all_gather", whole // 2), ("reduce_scatter", whole)] * 2
    planner = Planner(recipe, GPUS["h100"], 8)
    traffic = {(t.what, t.kind): t for t in planner.plan(recipe, 2).step.transfers}
    blocks, accumulation = recipe.model.num_layers, recipe.train.global_batch // 4
    gathers = traffic["activations, forward", "all_gather"]
    assert gathers.count == (2 * blocks + 1) * accumulation and gathers.sent == gathers.count * whole // 2
    assert (gathers.payload, gathers.nodes, gathers.between) == ("bf16", 1, 0)


def test_gradients_travel_in_their_payload():
    recipe = load("bf16_10m", ("zero.stage=1", "train.micro_batch=1", "gradients.payload=fp8_e4m3_b128"), 16)
    plan = Planner(recipe, GPUS["h100"], 8).plan(recipe, 16)
    traffic = {t.what: t for t in plan.step.transfers}
    gradients, weights = traffic["gradients"], traffic["updated weights"]
    numbers = recipe.model.parameter_count()
    assert (gradients.kind, gradients.payload, gradients.nodes) == ("all_to_all", "fp8_e4m3_b128", 2)
    assert gradients.sent == pytest.approx(numbers * 15 / 16 * (1 + 4 / 128), rel=0.01)
    assert gradients.between == pytest.approx(gradients.sent * 8 / 15, rel=1e-6)
    assert weights.sent == pytest.approx(2 * numbers * 15 / 16, rel=0.01) and weights.payload == "bf16"


def test_a_pipeline_takes_what_its_simulation_takes():
    recipe = load("bf16_10m", ("parallel.pp=4", "train.micro_batch=1", "parallel.schedule=1f1b"), 4)
    planner = Planner(recipe, GPUS["h100"], 4)
    plan = planner.plan(recipe, 4)
    units, links = planner.compiled(planner.units(recipe, ())), Links.of(plan.layout, GPUS["h100"])
    pricing = Pricing(GPUS["h100"], True, links.tensor)
    times = [stage_times(units_of(stage, plan.layout, units), plan.layout, pricing) for stage in range(4)]
    wait = links.pipeline.seconds("send", units.hidden)
    assert plan.step.parts["micro-batches"] == pytest.approx(simulate(recipe.parallel, 16, times, wait))
    assert 0 < plan.step.bubble < 0.5
    assert {t.what for t in plan.step.transfers} == {"hidden states", "gradients of hidden states"}


@pytest.mark.parametrize(("tp", "longer"), [(1, 1.0), (2, 1.25)])
def test_ranks_that_tensor_parallelism_joins_wait_for_each_other(tp, longer):
    recipe = load("bf16_10m", (f"parallel.tp={tp}",), 2)
    here, waits = (
        Planner(recipe, replace(GPUS["h100"], waiting=share), 2).plan(recipe, 2).step for share in (0.0, 0.25)
    )
    assert waits.parts["micro-batches"] == pytest.approx(longer * here.parts["micro-batches"])
    waiting = waits.kinds.get("waiting for each other", 0.0)
    assert waiting == pytest.approx((longer - 1.0) * sum(here.kinds.values()))


def test_mfu_above_its_peak_is_refused():
    peak = Peak(1e15, "somebody", guessed=True)
    assert Utilization.of(4e14, peak).value == pytest.approx(0.4)
    refused = Utilization.of(1.2e15, peak)
    assert refused.value is None and (refused.refused or "").startswith("1200 TFLOP/s a device are above 1000 TFLOP/s*")


def test_an_fp4_run_faster_than_the_bf16_peak_has_no_mfu_against_it():
    """Without limits of memory its GEMMs attain all of FP4's peak: more than the BF16 peak can explain."""
    wide = ("model.hidden_size=8192", "model.ffn_size=32768", "model.num_layers=2", "model.num_heads=64")
    overrides = (*wide, "model.num_kv_heads=8", "train.seq_len=2048", "train.micro_batch=4", "precision.bf16_last=0")
    recipe = load("nvfp4_10m", overrides)
    plan = Planner(recipe, replace(GPUS["b200"], attained_gemm=1.0, bandwidth=1e16), 8).plan(recipe, 1)
    found = plan.utilizations()
    assert found["BF16 peak"].value is None
    (said,) = refused_utilizations(plan)
    assert said.startswith("no MFU against the BF16 peak: ") and "above 2250 TFLOP/s" in said
    mixed, fastest = found["mixed peak"], found["recipe peak"]
    assert mixed.value is not None and fastest.value is not None and 0 < fastest.value < mixed.value <= 1
    assert fastest.peak.flops == GPUS["b200"].peaks["fp4"] and fastest.peak.flops > mixed.peak.flops


def test_shares_add_up_to_the_models_flops():
    recipe = load("nvfp4_10m")
    for gpu, element in (("b200", "fp4"), ("h100", "bf16")):
        plan = Planner(recipe, GPUS[gpu], 8).plan(recipe, 1)
        total = recipe.model.flops_per_token(recipe.train.seq_len) * plan.layout.tokens_per_step
        assert sum(share.flops for share in plan.shares) == pytest.approx(total)
        assert {share.element for share in plan.shares if share.a == "nvfp4"} == {element}


def _phase(ops: list[Op], kept: dict[int, int]) -> Phase:
    return Phase(tuple(ops), 10**9, sum(kept.values()), frozenset(kept))


def test_fusion_moves_only_what_leaves_a_kernel():
    """x (0) -> silu (1) -> times y (2) -> (3) -> GEMM -> (4): silu's result stays inside, and is computed again."""
    forward = [
        Op("transcendental", 2, ((0, 100),), ((1, 100),)),
        Op("pointwise", 2, ((1, 100), (2, 100)), ((3, 100),)),
        Op("gemm", 2, ((3, 100),), ((4, 300),), flops=1.0, shape=(1, 1, 1, 1)),
    ]
    backward = [Op("pointwise", 2, ((1, 100), (4, 300)), ((5, 100),))]
    unit = Unit((), _phase([], {}), _phase(forward, {1: 100, 3: 100, 4: 300}), _phase(backward, {}), _phase([], {}))
    fused = compiled(unit)
    kernel = next(op for op in fused.forward.ops if op.kind == "fused")
    assert dict(kernel.reads) == {0: 100, 2: 100} and dict(kernel.writes) == {3: 100}
    assert fused.forward.kept == 400 - 100  # 1 and 3 from x and y, which somebody else keeps
    assert fused.forward.peak == 400


def test_sizes_that_kernels_want():
    """In features 48 of an MX operand, out features 96 that only tiles dislike, 50 tokens."""
    specs = dict.fromkeys(
        ("fprop.a", "fprop.b", "dgrad.a", "dgrad.b", "wgrad.a", "wgrad.b"), resolve_spec("mxfp8_e4m3")
    )
    linear = Linear("layers.0.mlp.up", 96, 48, 96 * 48, True, specs)
    plain = Linear("lm_head", 7, 9, 63, False, {})
    assert constraints([linear, plain], 50) == [
        Constraint("layers.{0}.mlp.up: in features", 48, 32, True),
        Constraint("layers.{0}.mlp.up: tokens of a micro-batch", 50, 32, True),
        Constraint("layers.{0}.mlp.up: out features", 96, 128, False),
    ]


def test_peaks_are_those_that_runs_are_measured_against():
    for machine in GPUS.values():
        row = table_row(machine.device)
        assert row is not None and machine.peaks["bf16"] == row[0]
        assert machine.native <= {"fp8_tensor", "fp8_block", "mxfp8", "nvfp4"}
        assert {machine.multiplies(kind, kind) for kind in machine.native} <= machine.peaks.keys()


def test_bytes_that_the_fused_update_moves():
    """FP32 states and master: gradient 4 and 12 in, 12 out, 4 read and 2 written for the working weight. FP8-LM: E4M3
    and FP16 states and an FP16 master are 5 bytes, read twice beside the gradient."""
    moved = {name: fused_bytes(resolve(name).optimizer) for name in ("bf16_10m", "fp8lm_10m", "nvfp4_lean_10m")}
    assert moved["bf16_10m"] == 34
    assert moved["fp8lm_10m"] == pytest.approx(2 * (4 + 5) + 5 + 4, abs=1e-3)
    assert moved["nvfp4_lean_10m"] == pytest.approx(4 + 2 * (2 + 1 + 2 / 32), abs=0.1)
    factored = resolve("bf16_10m", ("optimizer.exp_avg_sq=factor",)).optimizer
    assert fused_bytes(factored) is None and traced_update(factored).peak > 0


def test_units_know_their_parameters():
    _, units = _units("bf16_10m")
    names = {p.name for unit in (units.first, units.last, units.blocks[0]) for p in unit.parameters}
    assert {"embedding.weight", "norm.weight", "lm_head.weight", "layers.0.attention.qkv.weight"} <= names
    assert units.first.parameters == (Parameter("embedding.weight", (8192, 256), 2),)
