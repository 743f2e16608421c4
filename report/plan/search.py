"""Layouts that fit, best first: every tensor, pipeline and data-parallel degree, ZeRO stage and kind of recomputation.

The recipe's batch, micro-batch, schedule and formats stay. A layout is tried only if the recipe is valid with it, as a
run would check it; of recomputation the least that fits is taken, since more only costs time, and ZeRO 3 only where
nothing below it fits. What is suggested has passed a dry run's checks (run/dry_run.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from errors import UsageError
from recipe import Recipe
from report.plan.plan import Plan, Planner
from report.plan.units import RECOMPUTES, Recompute
from run.dry_run import dry_run

Stage = Literal[0, 1, 2, 3]
MOST_PIPELINE_RANKS = 32


@dataclass(frozen=True)
class Found:
    """plans: best first; tried: layouts that are valid; fitting: those of them that fit; refused: why whole degrees of
    tensor parallelism are out."""

    plans: tuple[Plan, ...]
    tried: int
    fitting: int
    refused: dict[int, str]


def search(planner: Planner, recipe: Recipe, world: int, count: int = 5) -> Found:
    """The `count` fastest layouts of a recipe on so many ranks that fit."""
    refused: dict[int, str] = {}
    plans: list[Plan] = []
    tried = 0
    for tp in _degrees(planner.machine.domain or planner.per_node, world):
        try:
            found, seen = _with_tensor_parallel(planner, recipe, world, tp)
        except UsageError as error:
            refused[tp] = str(error)
            continue
        plans, tried = [*plans, *found], tried + seen
    plans.sort(key=_rank)
    kept: list[Plan] = []
    checked: dict[tuple[int, int, bool], bool] = {}
    for plan in plans:
        if len(kept) == count:
            break
        layout = plan.layout
        key = (layout.tp, layout.recipe.zero.stage, layout.pp > 1)
        if key not in checked:
            checked[key] = _passes(layout.recipe, world)
        if checked[key]:
            kept.append(plan)
    return Found(tuple(kept), tried, len(plans), refused)


def _rank(plan: Plan) -> tuple[float, int, int, int]:
    """Faster first; of equally fast ones the simpler."""
    layout = plan.layout
    return plan.step.seconds, layout.tp * layout.pp, layout.recipe.zero.stage, plan.fullest.peak


def _degrees(limit: int, world: int) -> Iterator[int]:
    """Powers of two that divide the ranks."""
    degree = 1
    while degree <= min(limit, world):
        if world % degree == 0:
            yield degree
        degree *= 2


def _with_tensor_parallel(planner: Planner, recipe: Recipe, world: int, tp: int) -> tuple[list[Plan], int]:
    """(plans that fit, layouts that were tried)."""
    found: list[Plan] = []
    tried = 0
    for pp in range(1, min(world // tp, recipe.model.num_layers, MOST_PIPELINE_RANKS) + 1):
        if world % (tp * pp):
            continue
        below3 = False
        stages: tuple[Stage, ...] = (0, 1, 2, 3) if world > tp * pp else (0,)
        for stage in stages:
            if stage == 3 and below3:
                continue
            plan, seen = _least_recomputation(planner, world, _degrees_of(recipe, tp, pp, stage))
            tried += seen
            if plan is not None:
                found.append(plan)
                below3 = True
    return found, tried


def _least_recomputation(planner: Planner, world: int, changed: Recipe) -> tuple[Plan | None, int]:
    if changed.problems(world):
        return None, 0
    recompute: Recompute
    for seen, recompute in enumerate(RECOMPUTES, 1):
        layout = replace(changed, model=replace(changed.model, recompute=recompute))
        more = () if recompute == "none" else RECOMPUTES  # traced together, if at all
        if (plan := planner.in_bytes(layout, world, more)).fits:
            return planner.timed(plan), seen
    return None, len(RECOMPUTES)


def _degrees_of(recipe: Recipe, tp: int, pp: int, stage: Stage) -> Recipe:
    """The recipe with other degrees. Sequence parallelism comes with tensor parallelism, unless the recipe has the
    latter without; what belongs to a pipeline goes with it."""
    own = recipe.parallel
    sp = tp > 1 and (own.sp or own.tp == 1)
    same = pp == own.pp
    parallel = replace(
        own,
        ranks=None,
        tp=tp,
        pp=pp,
        sp=sp,
        sp_payload=own.sp_payload if sp else "exact",
        schedule=own.schedule if pp > 1 else "1f1b",
        stages_per_rank=own.stages_per_rank if pp > 1 and own.pp > 1 else None,
        stage_layers=own.stage_layers if same else None,
    )
    return replace(recipe, parallel=parallel, zero=replace(recipe.zero, stage=stage))


def _passes(recipe: Recipe, world: int) -> bool:
    """Whether a dry run builds it."""
    try:
        dry_run(recipe, world, 0)
    except UsageError:
        return False
    return True
