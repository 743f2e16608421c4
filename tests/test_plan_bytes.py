"""What a plan says that ranks hold, against hand-calculated numbers, quantized tensors, real engines and real runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from bench.plan import Rehearsal, Storages
from lowprec import reference
from lowprec.formats import SPECS, resolve_spec
from lowprec.payload import parse_payload
from lowprec.philox import RandomKey
from lowprec.zero import partition_size
from parallel.mesh import build_mesh
from recipe import Recipe, load
from report.flops import faster_gemm
from report.plan.copies import kind_of, native_bytes, weight_copies
from report.plan.hardware import GPUS, Machine
from report.plan.layout import lay_out, parameters_of
from report.plan.partition import Parameter, partition, reductions, states
from report.plan.plan import Planner
from run.dry_run import fake_group
from run.local import place_parts, zero_plan
from tests.spawn import run_ranks

NAMES = {"a": "nvfp4", "b": "nvfp4_2d"}
CPU, BF16 = torch.device("cpu"), torch.bfloat16
NVFP4 = {f"{gemm}.{side}": resolve_spec(name) for gemm in ("fprop", "dgrad") for side, name in NAMES.items()}
SMALL = (
    *("model.vocab_size=512", "model.hidden_size=64", "model.ffn_size=128", "model.num_layers=2", "model.num_heads=2"),
    *("model.num_kv_heads=2", "train.seq_len=64", "train.global_batch=8", "train.micro_batch=2", "train.compile=false"),
)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "tp2": ("nvfp4_10m", ("parallel.tp=2", "parallel.sp=true")),
    "dp2": ("mxfp8_10m", ("zero.stage=1", "model.recompute=full")),
    "pp2": ("bf16_10m", ("parallel.pp=2",)),
    "lean": ("nvfp4_lean_10m", ("zero.stage=2", "precision.bf16_last=1")),
}


def _cpu() -> Machine:
    """A machine whose ranks run on cores; nothing is timed on it."""
    return Machine(
        name="cpu", device="cpu", peaks={"bf16": 1.0}, memory=1e12, bandwidth=1.0, intra=1.0, cores=2,
        rates={"update": [(1.0, 1.0)]},
    )  # fmt: skip


def _recipe(case: str) -> Recipe:
    name, overrides = CASES[case]
    return load(name, (*SMALL, *overrides), 2)


def _gemm_dtype() -> torch.dtype:
    return faster_gemm(BF16, CPU)


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_bytes_of_a_copy_are_those_of_a_quantized_matrix(name, axis):
    spec, x = resolve_spec(name), torch.randn(96, 160)
    held = native_bytes(spec, axis, *x.shape)
    packed = reference.quantize(x, spec, axis=axis, seed=RandomKey(seed=0))
    assert held.codes == packed.codes.numel() * (3 if spec.format.bits == 6 else 4) // 4
    assert held.scales == packed.scales.nbytes
    assert held.amax == (0 if packed.amax is None else packed.amax.nbytes)


def test_copies_of_a_weight_by_hand():
    """NVFP4 [5120, 20480]: half a byte and a sixteenth of a square block's scale a number, twice as kernels hold it."""
    rows, cols = 5120, 20480
    native = weight_copies(NVFP4, rows, cols, GPUS["b200"], native=True, gemm_width=2)
    assert list(native) == ["row", "column"]
    for copy in native.values():
        assert (copy.codes, copy.scales, copy.amax) == (rows * cols // 2, rows * cols // 256, 4)
    emulated = weight_copies(NVFP4, rows, cols, GPUS["h100"], native=True, gemm_width=2)
    assert list(emulated) == ["row"] and emulated["row"].codes == 2 * rows * cols  # square blocks: one copy serves both
    tensor = dict.fromkeys(NVFP4, resolve_spec("fp8_e4m3")) | {"dgrad.a": resolve_spec("fp8_e5m2")}
    assert list(weight_copies(tensor, rows, cols, GPUS["h100"], native=True, gemm_width=2)) == ["row", "column"]
    assert list(weight_copies(tensor, rows, cols, GPUS["b200"], native=True, gemm_width=2)) == ["row"]


def test_kinds_of_operands():
    kinds = {name: kind_of(spec) for name, spec in SPECS.items()}
    assert kinds["mxfp8_e5m2"] == "mxfp8" and kinds["nvfp4_2d"] == "nvfp4" and kinds["mxfp4"] == "mxfp4"
    assert (
        kinds["fp8_e4m3"] == "fp8_tensor" and kinds["fp8_block_128x128"] == "fp8_block" and kinds["mxint8"] == "mxint8"
    )


def test_a_bf16_parameter_takes_18_bytes():
    """Weight 2, gradient, master and two moments 4 each: without sharding, and divided by four ranks at ZeRO 1."""
    recipe = load("bf16_10m", ("zero.stage=0",))
    planner = Planner(recipe, GPUS["h100"], 8)
    rank = planner.plan(recipe, 1).fullest
    fixed = {name: rank.held[name] / rank.parameters for name in ("weights", "master", "exp_avg", "exp_avg_sq")}
    assert rank.parameters == recipe.model.parameter_count()
    assert {name: round(share, 2) for name, share in fixed.items()} == {
        "weights": 2.0, "master": 4.0, "exp_avg": 4.0, "exp_avg_sq": 4.0,
    }  # fmt: skip
    assert rank.gradients == 4 * rank.parameters
    assert sum(fixed.values()) + 4 == pytest.approx(18.0, abs=0.02)
    sharded = planner.plan(load("bf16_10m", ("zero.stage=1", "train.micro_batch=2"), 4), 4).fullest
    assert sharded.held["master"] == pytest.approx(rank.held["master"] / 4, rel=1e-3)
    assert sharded.held["weights"] == pytest.approx(rank.held["weights"], rel=1e-3)
    assert sum(rank.kinds().values()) == rank.peak


@pytest.mark.parametrize(
    ("name", "world", "overrides"),
    [
        ("bf16_125m", 6, ("train.global_batch=48", "model.bias=true", "train.micro_batch=8")),
        pytest.param("nvfp4_12b_tiny", 8, (), marks=pytest.mark.slow),
        ("fp8lm_7b_tiny", 4, ("zero.stage=0", "zero.gather=exact", "gradients.payload=fp32")),
    ],
)
def test_partitions_are_those_that_an_engine_would_get(name, world, overrides):
    recipe = load(name, overrides, world)
    units = Planner(recipe, GPUS["h100"], 8).units(recipe, ())
    layout = lay_out(recipe, world, 8)
    for pp_rank in range(layout.pp):
        rank = pp_rank * layout.tp * layout.dp
        with fake_group(rank, world):
            mesh = build_mesh(recipe.parallel)
            placed = place_parts(recipe, mesh, torch.device("meta"), BF16)
            wanted = partition_size(placed.parts, zero_plan(recipe, mesh, placed), mesh.dp)
            names = [name for part in placed.parts for name, _ in part.named_parameters()]
        parameters = parameters_of(pp_rank, layout, units)
        assert [p.name for p in parameters] == list(dict.fromkeys(names))
        assert partition(parameters, layout.dp if recipe.zero.stage else 1).owned == wanted


def test_buckets_of_a_reduction_by_hand():
    """Two ranks own 512 elements each; buckets of 600: the first matrix crosses the border, the vector waits."""
    parameters = [Parameter("a", (2, 300), 2), Parameter("b", (2, 128), 2), Parameter("c", (100,), 1)]
    flat = partition(parameters, 2)
    assert [(group.places, group.size) for group in flat.groups] == [((0, 768), 1024), ((0,), 512)]
    assert [(p.name, count) for p, count in flat.fragments()] == [("a", 512), ("c", 100)]
    payload = parse_payload("fp32")
    first, second = reductions(flat, parameters, 600, payload)
    assert [(r.elements, r.owned, r.sent, r.received, r.left) for r in first] == [(600, 512, 4 * 88, 2 * 4 * 512, 356)]
    assert [(r.elements, r.owned, r.sent, r.received) for r in second] == [(256, 0, 4 * 256, 0), (100, 100, 0, 800)]


def _held_and_peak(rank: int, names: Sequence[str]) -> dict[str, tuple[dict[str, int], int]]:
    """Bytes of a real engine's tensors, and the most that a step of a real run holds."""
    found = {}
    for name in names:
        tracker = Storages()
        with tracker:
            run = Rehearsal(_recipe(name), _gemm_dtype())
            run.step(0)
            tracker.peak = tracker.live
            run.step(1)
        found[name] = run.local.engine.memory(), tracker.peak
    return found


@pytest.mark.parametrize("names", [("dp2",), pytest.param(("tp2", "pp2", "lean"), marks=pytest.mark.slow)])
def test_planned_bytes_are_those_of_real_runs(names):
    """Tensor, data and pipeline parallelism, recomputation, four policies: the peak of a step within 10 %."""
    measured = run_ranks(_held_and_peak, 2, names)
    for name in names:
        recipe = _recipe(name)
        planner = Planner(recipe, _cpu(), 2, _gemm_dtype())
        plan = planner.in_bytes(recipe, 2)
        peak = max(each[name][1] for each in measured)
        assert plan.fullest.peak == pytest.approx(peak, rel=0.1), (name, plan.fullest, peak)
        units, layout = planner.units(recipe, ()), plan.layout
        for pp_rank, rank in enumerate(plan.ranks):
            held = measured[pp_rank * layout.tp * layout.dp][name][0]
            for kind in ("master", "exp_avg", "exp_avg_sq", "scales"):
                assert rank.held.get(kind, 0) == pytest.approx(held.get(kind, 0), rel=0.02, abs=2048), (name, kind)
            parameters = parameters_of(pp_rank, layout, units)
            flat = partition(parameters, layout.dp if recipe.zero.stage else 1)
            kinds = states(list(flat.fragments()), flat.owned, recipe.optimizer)
            assert math.isclose(sum(kinds.values()), sum(held.get(kind, 0) for kind in kinds), rel_tol=0.02)
