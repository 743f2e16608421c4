"""Every layout trains as one process does: losses and gradient norms of FP32 models within 1e-5.

The full matrix, ten steps, is slow; a pairwise subset of it runs in CI, four steps. All layouts of one number of ranks
share a process group.
"""

from __future__ import annotations

import functools

import pytest

from tests.layout_case import Outcome, train_cases
from tests.spawn import run_ranks

TIED = "model.tied_embeddings=true"


def tp(n: int, *more: str, sp: bool = False) -> tuple[str, ...]:
    return (f"parallel.tp={n}", *(("parallel.sp=true",) if sp else ()), *more)


def pp(n: int, schedule: str, *more: str) -> tuple[str, ...]:
    return (f"parallel.pp={n}", f"parallel.schedule={schedule}", *more)


def zero(stage: int) -> str:
    return f"zero.stage={stage}"


SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")

# ranks -> layouts
QUICK: dict[int, list[tuple[str, ...]]] = {
    2: [
        tp(2, zero(0)),
        tp(2, TIED, zero(1), sp=True),
        *(pp(2, schedule, zero(i % 2), *((TIED,) if i % 3 == 0 else ())) for i, schedule in enumerate(SCHEDULES)),
        pp(2, "zbv", TIED),
        pp(2, "1f1b", TIED, "model.recompute=full"),
        pp(2, "1f1b", "parallel.stage_layers=[5, 3]"),
    ],
    4: [
        tp(4, zero(1), sp=True),  # two key/value heads for four ranks
        tp(2, zero(2), "model.bias=true", "model.norm=layernorm"),
        tp(2, zero(3), TIED, "model.qk_norm=true", sp=True),
        tp(2, *pp(2, "1f1b", TIED), sp=True),
        tp(2, *pp(2, "interleaved_zero_bubble")),
        pp(2, "interleaved_1f1b", zero(1)),
    ],
}
FULL: dict[int, list[tuple[str, ...]]] = {
    2: [
        *(tp(2, zero(stage), *tied, sp=sp) for stage in range(4) for tied in ((), (TIED,)) for sp in (False, True)),
        *(pp(2, schedule, zero(stage), *tied) for schedule in SCHEDULES for stage in (0, 1) for tied in ((), (TIED,))),
        *(pp(2, schedule, "model.recompute=full") for schedule in SCHEDULES),
    ],
    4: [
        *(tp(4, zero(stage), sp=sp) for stage in range(3) for sp in (False, True)),
        *(tp(4, TIED, "model.bias=true", "model.norm=layernorm", "model.qk_norm=true", sp=sp) for sp in (False, True)),
        *(pp(4, schedule, *tied) for schedule in SCHEDULES for tied in ((), (TIED,))),
        *(
            tp(2, *pp(2, schedule, *tied), sp=sp)
            for schedule in SCHEDULES
            for tied in ((), (TIED,))
            for sp in (False, True)
        ),
        *(tp(2, zero(stage), sp=sp) for stage in range(4) for sp in (False, True)),
        *(pp(2, schedule, zero(stage), TIED) for schedule in SCHEDULES for stage in (0, 1)),
    ],
    8: [
        *(tp(2, *pp(2, schedule, zero(stage), TIED), sp=True) for schedule in SCHEDULES for stage in (0, 1)),
        tp(4, *pp(2, "1f1b")),
        tp(2, *pp(4, "interleaved_1f1b", "model.num_layers=8"), sp=True),
    ],
}


def _model(case: tuple[str, ...]) -> tuple[str, ...]:
    """What of a case is the model's, and so also the single process'."""
    return tuple(word for word in case if word.startswith("model."))


@functools.cache
def _alone(cases: tuple[tuple[str, ...], ...], steps: int) -> dict[tuple[str, ...], Outcome]:
    """What one process computes for each model."""
    (found,) = run_ranks(train_cases, 1, list(cases), steps, timeout=600)
    return dict(zip(cases, found, strict=True))


def check(ranks: int, cases: list[tuple[str, ...]], steps: int, timeout: float) -> None:
    # more micro-batches than stages, divisible by pipeline ranks
    batch = "train.global_batch=16"
    alone = _alone(tuple(sorted({(*_model(case), batch) for case in cases})), steps)
    per_rank = run_ranks(train_cases, ranks, [(*case, batch) for case in cases], steps, timeout=timeout)
    for rank, outcomes in enumerate(per_rank):
        for case, outcome in zip(cases, outcomes, strict=True):
            want = alone[(*_model(case), batch)]
            assert outcome.losses == pytest.approx(want.losses, rel=1e-5), (rank, case)
            assert outcome.norms == pytest.approx(want.norms, rel=1e-5), (rank, case)
            assert outcome.parameter_norm == pytest.approx(want.parameter_norm, rel=1e-5), (rank, case)


@pytest.mark.parametrize("ranks", QUICK)
def test_layouts_equal_one_process(ranks):
    check(ranks, QUICK[ranks], 4, 300)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", FULL)
def test_all_layouts_equal_one_process(ranks):
    check(ranks, FULL[ranks], 10, 2400)
