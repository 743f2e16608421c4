"""Every layout trains as one process does: losses and gradient norms of FP32 models within 1e-5.

The full matrix, ten steps, is slow; a subset of it runs in CI, three shorter steps. All layouts of one number of ranks
share a process group.
"""

from __future__ import annotations

import functools

import pytest

from errors import UsageError
from tests.layout_case import Case, Outcome, train_cases
from tests.spawn import run_ranks

TIED = "model.tied_embeddings=true"


def tp(n: int, *more: str, sp: bool = False) -> tuple[str, ...]:
    return (f"parallel.tp={n}", *(("parallel.sp=true",) if sp else ()), *more)


def pp(n: int, schedule: str, *more: str) -> tuple[str, ...]:
    return (f"parallel.pp={n}", f"parallel.schedule={schedule}", *more)


def zero(stage: int) -> str:
    return f"zero.stage={stage}"


SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")

# Every kind of block in both stages of two; two groups of four heads
HYBRID = (
    "model.pattern=M-M*M*-M",
    "model.mamba.state=8",
    "model.mamba.groups=2",
    "model.mamba.head_dim=8",
    "model.mamba.chunk=6",
)
MORE = ("model.bias=true", "model.norm=layernorm", "model.qk_norm=true")

# ranks -> layouts
QUICK: dict[int, list[tuple[str, ...]]] = {
    2: [
        tp(2, zero(0)),
        tp(2, TIED, *MORE, zero(1), sp=True),
        *(pp(2, schedule, zero(i % 2), *((TIED,) if i % 3 == 0 else ())) for i, schedule in enumerate(SCHEDULES)),
        pp(2, "1f1b", TIED, "model.recompute=full", "parallel.stage_layers=[5, 3]"),
        tp(2, *HYBRID, zero(1), sp=True),
        pp(2, "zbv", *HYBRID, TIED),
    ],
    4: [
        tp(4, zero(1), "model.bias=true", sp=True),  # two key/value heads for four ranks
        tp(2, *pp(2, "zbv", "model.num_kv_heads=1", "model.bias=true")),
        tp(2, zero(3), TIED, sp=True),
    ],
}
# Every degree, stage, schedule and option with every other one at least once, not all products
FULL: dict[int, list[tuple[str, ...]]] = {
    2: [
        *(
            tp(2, zero(stage), *((TIED,) if (stage + sp) % 2 else ()), sp=sp)
            for stage in range(4)
            for sp in (False, True)
        ),
        tp(2, *MORE),
        *(
            pp(2, name, zero((i + j) % 2), *tied)
            for i, name in enumerate(SCHEDULES)
            for j, tied in enumerate(((), (TIED,)))
        ),
        *(pp(2, schedule, "model.recompute=full") for schedule in ("interleaved_1f1b", "zbv")),
        pp(2, "1f1b", "parallel.stage_layers=[5, 3]"),
        *(tp(2, *HYBRID, zero(stage), *MORE, sp=sp) for stage in range(4) for sp in (False, True)),
        *(tp(2, *HYBRID, f"model.recompute={what}", sp=True) for what in ("selective", "full")),
        *(pp(2, name, *HYBRID, f"model.recompute={what}") for name in SCHEDULES for what in ("none", "full")),
    ],
    4: [
        *(tp(4, zero(stage), sp=sp) for stage in (0, 1, 2) for sp in (False, True)),
        *(tp(4, TIED, *MORE, sp=sp) for sp in (False, True)),
        *(pp(4, schedule, *((TIED,) if i % 2 else ())) for i, schedule in enumerate(SCHEDULES)),
        *(tp(2, *pp(2, name, *((TIED,) if i % 3 else ())), sp=bool(i % 2)) for i, name in enumerate(SCHEDULES)),
        *(tp(2, zero(stage), sp=bool(stage % 2)) for stage in range(4)),
        tp(4, *HYBRID, "model.mamba.groups=4", sp=True),
        tp(2, *pp(2, "1f1b", *HYBRID, TIED, "model.bias=true")),
        *(tp(2, *HYBRID, zero(stage), TIED, sp=bool(stage % 2)) for stage in range(4)),
        *(tp(2, *pp(2, name, *HYBRID, *((TIED,) if i % 2 else ())), sp=i > 2) for i, name in enumerate(SCHEDULES)),
        *(pp(2, schedule, zero(i % 2), *((TIED,) if i % 2 else ())) for i, schedule in enumerate(SCHEDULES)),
    ],
    8: [
        *(tp(2, *pp(2, name, zero(i % 2), *((TIED,) if i % 2 else ())), sp=i > 2) for i, name in enumerate(SCHEDULES)),
        tp(4, *pp(2, "1f1b")),
    ],
}


def _model(case: tuple[str, ...]) -> tuple[str, ...]:
    """What of a case is also the single process'."""
    return tuple(word for word in case if word.startswith(("model.", "train.")))


@functools.cache
def _alone(cases: tuple[tuple[str, ...], ...], steps: int) -> dict[tuple[str, ...], Outcome]:
    """What one process computes for each model."""
    (found,) = run_ranks(train_cases, 1, list(cases), steps, timeout=600)
    return dict(zip(cases, found, strict=True))


def check(ranks: int, cases: list[tuple[str, ...]], steps: int, timeout: float) -> None:
    alone = _alone(tuple(sorted({_model(case) for case in cases})), steps)
    per_rank = run_ranks(train_cases, ranks, cases, steps, timeout=timeout)
    for rank, outcomes in enumerate(per_rank):
        for case, outcome in zip(cases, outcomes, strict=True):
            want = alone[_model(case)]
            assert outcome.losses == pytest.approx(want.losses, rel=1e-5), (rank, case)
            assert outcome.norms == pytest.approx(want.norms, rel=1e-5), (rank, case)
            assert outcome.parameter_norm == pytest.approx(want.parameter_norm, rel=1e-5), (rank, case)


@pytest.mark.parametrize("ranks", QUICK)
def test_layouts_equal_one_process(ranks):
    check(ranks, [(*case, "train.global_batch=8") for case in QUICK[ranks]], 3, 300)


LOW = ("model.dtype=bf16", "gradients.payload=fp8_lm", "gradients.accumulate=fp8", "optimizer.master=none")


@pytest.mark.slow
def test_copies_stay_equal_in_low_precision():
    """Norms of tensor-parallel ranks and tied embeddings of pipelines, under one mu and the same random bits."""
    low = (*LOW, "optimizer.update=stochastic", "train.micro_batch=1", "train.global_batch=8", TIED)
    cases = [tp(2, *low, sp=True), pp(2, "1f1b", *low), pp(2, "interleaved_1f1b", *low)]
    for outcomes in run_ranks(train_cases, 2, cases, 4):
        assert all(outcome.losses[-1] < 10 for outcome in outcomes)


def test_an_engine_sees_nothing_of_an_earlier_one_of_another_layout():
    plain = (zero(1), "train.global_batch=8")
    for first, _, second in run_ranks(train_cases, 2, [plain, tp(2, "train.global_batch=8"), plain], 2):
        assert first == second


def _fails(rank: int, overrides: tuple[str, ...]) -> str:
    with pytest.raises(UsageError) as error:
        Case(overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (tp(4, *LOW), ["layers.{0-7}.attention.qkv.weight", "exceeds the key/value heads", "gradients.payload fp8_lm"]),
        (tp(4, zero(3)), ["exceeds the key/value heads", "zero.stage 3"]),
        (tp(4, "model.dtype=bf16", "optimizer.exp_avg=bf16", "model.hidden_size=64"), ["so few that", "mlp.gate_up"]),
        (tp(4, "optimizer.exp_avg_sq=linear4_rank1", "model.hidden_size=256"), ["whole rows and columns"]),
        (tp(4, "optimizer.exp_avg=dynamic4_b128", "model.hidden_size=512"), ["within blocks of 256", "attention.out"]),
        (tp(4, "model.dtype=bf16", "precision.policy=mxfp8"), ["blocks of 32 features", "attention.out"]),
    ],
)
def test_what_tensor_parallelism_would_change_is_refused_on_every_rank(overrides, words):
    for message in run_ranks(_fails, 4, overrides):
        assert all(word in message for word in words), message


def _held(rank: int, cases: list[tuple[str, ...]]) -> list[dict[str, int]]:
    """Bytes of this rank's tensors after one step of each case."""
    found = []
    for overrides in cases:
        case = Case(overrides)
        case.step(0)
        found.append(case.local.engine.memory())
    return found


def test_memory_falls_as_the_layout_says():
    """The largest share of weights, and of masters and states, that a rank holds; norms and embeddings are whole."""
    model = ("model.dtype=bf16", "model.hidden_size=64", "model.ffn_size=256", "model.head_dim=32")
    model += ("train.global_batch=8",)
    ((alone,),) = run_ranks(_held, 1, [model])
    layouts = [(zero(1),), (zero(3),), tp(2, zero(0)), pp(2, "1f1b", zero(0)), pp(2, "zbv", zero(0))]
    sharded: dict[tuple[str, ...], float] = {}
    states: dict[tuple[str, ...], float] = {}
    for rank in run_ranks(_held, 2, [(*model, *case) for case in layouts]):
        for case, held in zip(layouts, rank, strict=True):
            sharded[case] = max(sharded.get(case, 0.0), held["weights"] / alone["weights"])
            mine = held["master"] + held["exp_avg"] + held["exp_avg_sq"]
            states[case] = max(states.get(case, 0.0), mine / (alone["master"] + alone["exp_avg"] + alone["exp_avg_sq"]))
    dp, stage3, tensor, *pipelines = layouts
    assert sharded[dp] == 1.0 and states[dp] == pytest.approx(0.5, abs=0.03)
    assert sharded[stage3] == pytest.approx(0.5, abs=0.03) and states[stage3] == pytest.approx(0.5, abs=0.03)
    for case in (tensor, *pipelines):
        assert sharded[case] == pytest.approx(0.5, abs=0.05), case
        assert states[case] == pytest.approx(0.5, abs=0.05), case


@pytest.mark.slow
@pytest.mark.parametrize("ranks", FULL)
def test_all_layouts_equal_one_process(ranks):
    check(ranks, FULL[ranks], 10, 2400)
