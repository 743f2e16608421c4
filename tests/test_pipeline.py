"""Meshes, stages and the simulator of schedules: pure functions, no processes."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from parallel.bubble import Times, bubble, simulate
from parallel.mesh import Mesh, ParallelConfig, build_mesh
from parallel.pipeline import SCHEDULES, balance, rank_of, stage_range, stages_of

EQUAL = Times(1.0, 1.0, 1.0)


def config(pp: int, schedule: str) -> ParallelConfig:
    return ParallelConfig(pp=pp, schedule=schedule)


def test_ranks_are_numbered_as_megatrons():
    meshes = [build_mesh(ParallelConfig(tp=2, pp=2), rank, 8) for rank in range(8)]
    assert [(mesh.pp_rank, mesh.dp_rank, mesh.tp_rank) for mesh in meshes] == [
        (pp, dp, tp) for pp in range(2) for dp in range(2) for tp in range(2)
    ]
    assert meshes[0] == Mesh(0, 8, 2, 2, 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_every_stage_has_one_rank(schedule, pp):
    made = config(pp, schedule)
    owners = [stage for rank in range(pp) for stage in stages_of(rank, made)]
    assert sorted(owners) == list(range(made.stages))
    assert all(stage in stages_of(rank_of(stage, made), made) for stage in owners)
    if schedule in ("zbv", "dualpipev"):
        assert stages_of(0, made) == (0, made.stages - 1)


@pytest.mark.parametrize(
    ("blocks", "stages", "ends", "want"),
    [
        (8, 4, (0.0, 0.0), (2, 2, 2, 2)),
        (8, 4, (0.0, 2.0), (3, 2, 2, 1)),  # the logits cost the last stage two blocks
        (9, 4, (1.0, 0.0), (2, 3, 2, 2)),
        (5, 5, (0.0, 9.0), (1, 1, 1, 1, 1)),
    ],
)
def test_balance(blocks, stages, ends, want):
    counts = balance([1] * blocks, stages, ends)
    assert counts == want
    assert [i for stage in range(stages) for i in stage_range(stage, counts)] == list(range(blocks))


def test_uneven_blocks_are_split_as_well_as_any_split_could():
    """Against all splits; uniform blocks against the rule that gives each next block to the fastest stage."""
    random = Random(0)
    for _ in range(200):
        blocks, stages = random.randint(4, 9), random.randint(1, 4)
        costs = [random.choice((1, 3, 4)) for _ in range(blocks)]
        ends = (random.randint(0, 2), random.randint(0, 9))

        def loads(counts: tuple[int, ...], costs=costs, ends=ends) -> list[int]:
            found = [sum(costs[i] for i in stage_range(stage, counts)) for stage in range(len(counts))]
            found[0] += ends[0]
            found[-1] += ends[1]
            return sorted(found, reverse=True)

        borders = itertools.combinations(range(1, blocks), stages - 1)
        every = [tuple(b - a for a, b in itertools.pairwise((0, *cuts, blocks))) for cuts in borders]
        assert loads(balance(costs, stages, ends)) == min(map(loads, every))

        counts, extra = [1] * stages, [0] * stages
        extra[0] += ends[0]
        extra[-1] += ends[1]
        for _ in range(blocks - stages):
            counts[min(range(stages), key=lambda s: (counts[s] + extra[s], s))] += 1  # noqa: B023
        assert balance([1] * blocks, stages, ends) == tuple(counts)


@pytest.mark.parametrize(("pp", "batches"), [(2, 4), (4, 8), (4, 16)])
def test_bubbles_of_equal_stages_are_the_formulas(pp, batches):
    """(p - 1) / (m + p - 1), and with v stages a rank (p - 1) / (v m + p - 1)."""
    for schedule, virtual in (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2)):
        made = config(pp, schedule)
        want = (pp - 1) / (virtual * batches + pp - 1)
        assert bubble(made, batches, [EQUAL] * made.stages) == pytest.approx(want, abs=1e-9), schedule


def test_split_backwards_fill_the_bubble():
    plain = bubble(config(4, "interleaved_1f1b"), 8, [EQUAL] * 8)
    zero_bubble = bubble(config(4, "interleaved_zero_bubble"), 8, [EQUAL] * 8)
    v_shaped = bubble(config(4, "zbv"), 8, [EQUAL] * 8)
    assert v_shaped <= zero_bubble < plain
    assert bubble(config(2, "zbv"), 64, [EQUAL] * 4) < 0.02


def test_a_slow_stage_and_slow_links_cost_what_they_must():
    made = config(2, "1f1b")
    assert simulate(made, 1, [EQUAL, Times(2.0, 2.0, 2.0)]) == 9.0  # one micro-batch: everything in sequence
    assert simulate(made, 1, [EQUAL, EQUAL], transfer=0.5) == 7.0
    assert simulate(made, 8, [EQUAL, Times(2.0, 2.0, 2.0)]) == 8 * 6.0 + 3.0  # the slow one never waits but at the ends
