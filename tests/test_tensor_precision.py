"""Under tensor parallelism every rank quantizes its part as the whole matrix would be: bit-equal slices, any scheme."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowprec.fragments import Shard, matrix_shape
from lowprec.linear import LowPrecisionLinear, Shared
from lowprec.philox import StepContext
from lowprec.policy import Slots
from lowprec.slots import SLOT_AXES, Place, place_problems
from parallel import communication
from parallel.tensor import shard_of
from recipe import load_policy
from tests.layout_case import Case, Outcome, train_cases
from tests.spawn import RankError, run_ranks

POLICIES = ("mxfp8", "nvfp4", "fp8_current", "fp8_block", "mxfp4")
TOKENS = 96
# module -> logical shape of its weight
WEIGHTS = {
    "layers.0.attention.qkv": (4, 4, 32, 256),
    "layers.0.attention.out": (256, 512),
    "layers.0.mlp.gate_up": (2, 1024, 256),
    "layers.0.mlp.down": (256, 1024),
}
FEW_HEADS = {"layers.0.attention.qkv": (2, 6, 64, 256)}  # fewer key/value heads than ranks


def slots_of(policy: str, module: str) -> Slots:
    return load_policy(policy).resolve([module], 1)[module]


def stochastic(slots: Slots) -> Slots:
    """The same formats with every operand rounded stochastically."""
    gemms = {}
    for gemm in ("fprop", "dgrad", "wgrad"):
        old = getattr(slots, gemm)
        sides = {side: replace(getattr(old, side), rounding="stochastic") for side in ("a", "b") if getattr(old, side)}
        gemms[gemm] = replace(old, **sides)
    return replace(slots, **gemms)


def layer_of(module: str, shape: tuple[int, int], slots: Slots, place: Place | None) -> LowPrecisionLinear:
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    return LowPrecisionLinear(linear, module, slots, Shared(position=StepContext(seed=7, step=3)), place)


def place_of(shard: Shard) -> Place:
    by_rows = shard.columns[1] == matrix_shape(shard.whole)[1]
    split = frozenset({"w", "dy"} if by_rows else {"w", "x"})
    return Place(tuple((run.start, run.rows) for run in shard.runs), shard.columns, split, dist.group.WORLD)


def cut(matrix: Tensor, kind: str, shard: Shard) -> Tensor:
    """This rank's part of the whole x [T, K], dy [T, N] or w [N, K]."""
    first, count = shard.columns
    rows = torch.cat([torch.arange(run.start, run.start + run.rows) for run in shard.runs])
    if kind == "w":
        return matrix[rows, first : first + count]
    return matrix[:, rows] if kind == "dy" else matrix[:, first : first + count]


def compare_slices(rank: int, cases: list[tuple[str, str, tuple[int, ...], bool]]) -> list[str]:
    """The cases and slots whose operands differ from the slice of the whole ones."""
    wrong = []
    for policy, module, logical, random in cases:
        slots = stochastic(slots_of(policy, module)) if random else slots_of(policy, module)
        shard = shard_of(f"{module}.weight", logical, rank, dist.get_world_size())
        whole = layer_of(module, matrix_shape(logical), slots, None)
        part = layer_of(module, (sum(run.rows for run in shard.runs), shard.columns[1]), slots, place_of(shard))
        assert not place_problems(slots, place_of(shard))
        generator = torch.Generator().manual_seed(1)
        n, k = matrix_shape(logical)
        sizes = {"x": (TOKENS, k), "w": (n, k), "dy": (TOKENS, n)}
        matrices = {key: torch.randn(size, generator=generator).exp2().bfloat16() for key, size in sizes.items()}
        position = replace(whole.shared.position, row=640)
        for slot, (kind, _) in SLOT_AXES.items():
            want = whole.operand(slot, matrices[kind], position)
            mine = cut(matrices[kind], kind, shard).contiguous()
            got = part.operand(slot, mine, position)
            equal = torch.equal(got.values, cut(want.values, kind, shard))
            if want.scale is not None and want.scale.ndim == 0:
                equal &= torch.equal(got.scale, want.scale)
            if slot == "wgrad.b" and part.specs[slot] is not None:  # what is saved, packed
                equal &= torch.equal(part.pack(slot, mine, position).operand(got.values.dtype).values, got.values)
            if not equal:
                wrong.append(f"{policy} {module} {slot} random={random}")
    return wrong


def _cases(ranks: int) -> list[tuple[str, str, tuple[int, ...], bool]]:
    weights = [*WEIGHTS.items(), *(FEW_HEADS.items() if ranks == 4 else ())]
    return [(policy, *weight, random) for policy in POLICIES for weight in weights for random in (False, True)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_operands_are_slices_of_the_whole_ones(ranks):
    for wrong in run_ranks(compare_slices, ranks, _cases(ranks), timeout=300):
        assert not wrong


@pytest.mark.parametrize(
    ("policy", "logical", "word"),
    [("mxfp8", (256, 96), "blocks of 32 features"), ("nvfp4", (256, 48), "blocks of 16 features")],
)
def test_blocks_that_would_be_cut_are_refused(policy, logical, word):
    module = "layers.0.mlp.down"
    shard = shard_of(f"{module}.weight", logical, 1, 2)
    place = Place(((0, logical[0]),), shard.columns, frozenset({"w", "x"}), None)
    problems = place_problems(slots_of(policy, module), place)
    assert any(word in problem for problem in problems)


SMALL = (
    "model.dtype=bf16",
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.ffn_size=128",
    "model.num_kv_heads=4",
    "model.head_dim=32",
    "precision.policy=mxfp8",
)
SEQUENCE = ("parallel.tp=2", "parallel.sp=true")


def _counted(rank: int, cases: list[tuple[str, ...]]) -> list[tuple[Outcome, int]]:
    """The outcome of every case, and how many gathers went quantized."""
    gathers = []
    original = communication.all_gather

    def counting(*args, **kwargs):
        gathers.append(args[3].name)
        return original(*args, **kwargs)

    communication.all_gather = counting
    found = []
    for case in cases:
        gathers.clear()
        found.append((Case(case).run(0, 2), len(gathers)))
    return found


def test_activations_that_travel_quantized_give_the_same_forward():
    """The same bits: quantizing twice in one format changes nothing.

    Nor does it in the GEMM of the weight gradient, mostly: a number of E4M3's four significant bits is one under any
    other power of two, but for subnormal ones.
    """
    cases = [(*SMALL, *SEQUENCE), (*SMALL, *SEQUENCE, "parallel.sp_payload=mxfp8_e4m3")]
    for (exact, none), (quantized, gathers) in run_ranks(_counted, 2, cases):
        assert none == 0 and gathers == 2 * 8 * 2 * 2  # steps, micro-batches, blocks, linears that gather
        assert exact.losses[0] == quantized.losses[0]
        assert quantized.norms == pytest.approx(exact.norms, rel=1e-3)


def test_a_payload_that_no_linear_quantizes_to_is_refused():
    wrong = (*SMALL, *SEQUENCE, "parallel.sp_payload=mxfp8_e5m2")
    with pytest.raises(RankError, match="the forward of no linear quantizes its input so under policy mxfp8"):
        run_ranks(train_cases, 2, [wrong], 1)


@pytest.mark.parametrize(
    "policy", [*(pytest.param(p, marks=pytest.mark.slow) for p in ("mxfp8", "nvfp4")), "fp8_delayed"]
)
def test_pipelines_and_tensor_parallelism_follow_one_process(policy):
    """Pipelines to the bit; tensor parallelism up to the order of additions in BF16."""
    model = (*SMALL, f"precision.policy={policy}", "precision.bf16_last=1", "model.num_layers=4")
    (alone,) = run_ranks(train_cases, 1, [model], 4)
    schedules = ("1f1b", "interleaved_zero_bubble", "zbv")
    cases = [(*model, "parallel.pp=2", f"parallel.schedule={schedule}") for schedule in schedules]
    for *piped, tensor in run_ranks(train_cases, 2, [*cases, (*model, *SEQUENCE)], 4):
        assert [each.losses for each in piped] == [alone[0].losses] * 3
        for each in piped:  # whose sums over parameters have another order
            assert each.norms == pytest.approx(alone[0].norms, rel=1e-6)
            assert each.parameter_norm == pytest.approx(alone[0].parameter_norm, rel=1e-6)
        assert tensor.losses == pytest.approx(alone[0].losses, rel=2e-2)
