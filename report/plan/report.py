"""Everything that `train.py --plan` answers about a recipe, as one object; and as JSON.

The keys of the JSON: `parameters` (of the model), `bytes_per_rank` (the peak of the fullest rank), `tokens_per_second`
(of all devices) and the rest of a plan; null where the layout is refused, whose reasons are in `problems`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from errors import UsageError
from recipe import Recipe
from report.plan.constraints import Constraint, constraints
from report.plan.hardware import Machine
from report.plan.memory import RankBytes
from report.plan.plan import Plan, Planner
from report.plan.search import Found, search
from report.plan.units import RECOMPUTES
from run.dry_run import dry_run


@dataclass(frozen=True)
class Report:
    """plan: of the recipe's own layout, None if it is refused (`problems`). by_recomputation: the same layout with each
    kind. found: of the search, None if it was not asked for."""

    recipe: Recipe
    machine: Machine
    world: int
    per_node: int
    problems: tuple[str, ...]
    plan: Plan | None
    by_recomputation: Mapping[str, Plan]
    constraints: tuple[Constraint, ...]
    found: Found | None
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return self.recipe.model.parameter_count()

    @property
    def nodes(self) -> int:
        return -(-self.world // self.per_node)

    @property
    def tokens(self) -> int:
        """The recipe's budget."""
        train = self.recipe.train
        return train.steps * train.global_batch * train.seq_len


def make_report(planner: Planner, recipe: Recipe, world: int, suggest: int) -> Report:
    """Plan a recipe on `world` ranks, and `suggest` other layouts. Raises UsageError where no layout could help."""
    if problems := recipe.section_problems():
        raise UsageError("\n".join([f"recipe {recipe.name}:", *(f"  {problem}" for problem in problems)]))
    problems, plan, others = _own(planner, recipe, world)
    failing: list[Constraint] = []
    if plan is not None:
        tokens = recipe.train.micro_batch * recipe.train.seq_len
        failing = constraints(planner.units(recipe).linears, tokens)
    return Report(
        recipe=recipe,
        machine=planner.machine,
        world=world,
        per_node=planner.per_node,
        problems=tuple(problems),
        plan=plan,
        by_recomputation=others,
        constraints=tuple(failing),
        found=search(planner, recipe, world, suggest) if suggest else None,
        notes=tuple(_notes(planner, recipe, plan)),
    )


def _own(planner: Planner, recipe: Recipe, world: int) -> tuple[list[str], Plan | None, dict[str, Plan]]:
    """(why the recipe's layout is refused, its plan, plans of it with each kind of recomputation)."""
    try:
        dry_run(recipe, world, 0)
    except UsageError as error:
        return str(error).splitlines()[1:], None, {}
    kinds = {name: replace(recipe, model=replace(recipe.model, recompute=name)) for name in RECOMPUTES}
    others = {name: planner.in_bytes(kind, world, RECOMPUTES) for name, kind in kinds.items()}
    return [], planner.timed(others[recipe.model.recompute]), others


def _notes(planner: Planner, recipe: Recipe, plan: Plan | None) -> list[str]:
    found = []
    if recipe.precision.schedule:
        found.append("the first phase of precision.schedule is planned; later ones multiply in other formats")
    if recipe.gradients.two_level:
        found.append("gradients.two_level is not looked at: its exchange in two levels is planned as one in one")
    if plan is None:
        return found
    found += [*how_quantized(plan), *refused_utilizations(plan)]
    if plan.compiled:
        found.append("train.compile: fusion is modelled, not run; bytes and seconds of compiled blocks are estimates")
    if recipe.zero.stage == 3:
        found.append("zero.stage 3: what DeepSpeed gathers and frees is known only roughly")
    if planner.machine.cores and plan.layout.world > planner.machine.cores:
        found.append(f"{plan.layout.world} ranks share {planner.machine.cores} cores")
    return found


def refused_utilizations(plan: Plan) -> list[str]:
    """Why an MFU would be above 100 %, and is not reported."""
    return [f"no MFU against the {name}: {each.refused}" for name, each in plan.utilizations().items() if each.refused]


def how_quantized(plan: Plan) -> list[str]:
    """In which kernels quantized GEMMs were taken to run."""
    if not any(share.a or share.b for share in plan.shares):
        return []
    if plan.native and any(share.element not in ("bf16", "fp32") for share in plan.shares):
        return ["quantized GEMMs are planned as Transformer Engine's; precision.backend=emulate plans the emulation"]
    why = list(plan.emulated) or [f"{plan.machine.name} multiplies none of these formats in a kernel that is used here"]
    return [f"quantized GEMMs are planned as the emulation, decoded and in wider products: {'; '.join(why)}"]


def misfit(plan: Plan) -> str | None:
    """What is missing where a layout does not fit; None if it does."""
    if plan.fits:
        return None
    rank, gib = plan.fullest, 2**30
    return (
        f"does not fit: {plan.layout.describe()} needs {rank.peak / gib:,.2f} GiB on pipeline rank {rank.pp_rank} "
        f"({rank.moment}), and tensors may take {plan.limit / gib:,.2f} GiB of a device"
    )


def verdict(report: Report) -> str | None:
    """What is wrong with the recipe's own layout, and what would not be; None if it fits."""
    where = f"{report.recipe.name} on {report.world} x {report.machine.name}"
    if report.plan is None:
        lines = [f"{where} is refused:", *report.problems]
    elif (why := misfit(report.plan)) is not None:
        lines = [f"{where} {why}"]
    else:
        return None
    if report.found is not None:
        lines.append(_way_out(report.found))
    return "\n".join(lines)


def _way_out(found: Found) -> str:
    if found.plans:
        return f"of {found.tried} layouts {found.fitting} fit; the fastest: {found.plans[0].layout.overrides()}"
    if found.tried:
        return (
            f"none of {found.tried} layouts fits; take more or larger devices, or a smaller train.micro_batch or "
            "train.seq_len, or fewer bits (optimizer, gradients)"
        )
    return (
        "no other layout of these ranks is valid, either; change what is said above, or --nodes, or train.global_batch"
    )


def bytes_by_recomputation(report: Report) -> dict[str, tuple[int, int, bool]]:
    """Recomputation -> (the most that forwards keep on a rank, peak of the fullest rank, whether it fits)."""
    return {
        name: (max(rank.activations for rank in plan.ranks), plan.fullest.peak, plan.fits)
        for name, plan in report.by_recomputation.items()
    }


def by_moment(rank: RankBytes) -> dict[str, int]:
    """Moment of a step -> bytes of the rank at its worst."""
    held = sum(rank.held.values())
    return {name: held + count for name, count in rank.moments.items()}


def peak_rows(machine: Machine) -> list[tuple[str, str, str]]:
    """What was assumed of a machine: name, value, source; a guess has a *."""
    gb = 1e9
    figures = {
        f"peak {element.upper()}": ("peaks", f"{flops / 1e12:,.4g} TFLOP/s") for element, flops in machine.peaks.items()
    }
    figures |= {
        "memory": ("memory", f"{machine.memory / gb:,.4g} GB"),
        "of it for tensors": ("usable", f"{100 * machine.usable:.0f} %"),
        "memory bandwidth": ("bandwidth", f"{machine.bandwidth / gb:,.4g} GB/s"),
        "attained of peaks": ("attained_gemm", f"{100 * machine.attained_gemm:.0f} %"),
        "attained of bandwidth": ("attained_memory", f"{100 * machine.attained_memory:.0f} %"),
        "link within a node": ("intra", f"{machine.intra / gb:,.4g} GB/s a device and direction"),
        "link between nodes": ("inter", f"{machine.inter / gb:,.4g} GB/s a device and direction"),
        "latency of a collective": ("latency", f"{1e6 * machine.latency:,.3g} us"),
        "launch of an operation": ("launch", f"{1e6 * machine.launch:,.3g} us"),
    }
    return [
        (name, text + ("*" if field not in machine.sources else ""), machine.source(field))
        for name, (field, text) in figures.items()
    ]


def to_dict(report: Report) -> dict[str, Any]:
    """JSON-able: bytes, seconds, FLOPs as plain numbers."""
    found, plan = report.found, report.plan
    return {
        "recipe": report.recipe.name,
        "gpu": report.machine.name,
        "nodes": report.nodes,
        "gpus_per_node": report.per_node,
        "world_size": report.world,
        "parameters": report.parameters,
        "tokens": report.tokens,
        "problems": list(report.problems),
        **(_plan_dict(plan) if plan is not None else _NOTHING),
        "activations": {
            name: {"kept_bytes": kept, "peak_bytes": peak, "fits": fits}
            for name, (kept, peak, fits) in bytes_by_recomputation(report).items()
        },
        "constraints": [asdict(each) for each in report.constraints],
        "suggestions": None if found is None else [_plan_dict(each) for each in found.plans],
        "layouts_tried": None if found is None else found.tried,
        "layouts_that_fit": None if found is None else found.fitting,
        "refused_tensor_parallel": None if found is None else found.refused,
        "assumed": [
            {"what": what, "value": value.rstrip("*"), "source": source, "guessed": value.endswith("*")}
            for what, value, source in peak_rows(report.machine)
        ],
        "notes": list(report.notes),
    }


def _plan_dict(plan: Plan) -> dict[str, Any]:
    layout, rank, recipe = plan.layout, plan.fullest, plan.layout.recipe
    return {
        "layout": {
            "tp": layout.tp,
            "pp": layout.pp,
            "dp": layout.dp,
            "sp": recipe.parallel.sp,
            "schedule": recipe.parallel.schedule if layout.pp > 1 else None,
            "zero": recipe.zero.stage,
            "recompute": recipe.model.recompute,
            "micro_batch": recipe.train.micro_batch,
            "micro_batches": layout.micro_batches,
            "overrides": layout.overrides(),
        },
        "fits": plan.fits,
        "bytes_per_rank": rank.peak,
        "bytes_limit": int(plan.limit),
        "bytes_by_kind": rank.kinds(),
        "bytes_by_moment": by_moment(rank),
        "bytes_logits": max(each.logits for each in plan.ranks),
        "bytes_buckets": rank.buckets,
        "peak_moment": rank.moment,
        "ranks": [
            {"pp_rank": each.pp_rank, "parameters": each.parameters, "peak_bytes": each.peak, "moment": each.moment}
            for each in plan.ranks
        ],
        "tokens_per_second": plan.tokens_per_second,
        "step_seconds": plan.step.seconds,
        "step_parts": plan.step.parts,
        "micro_batch_kinds": plan.step.kinds,
        "bubble": plan.step.bubble,
        "days": plan.days,
        "flops": [asdict(share) for share in plan.shares],
        "mfu": {
            name: {
                "value": each.value,
                "peak_flops": each.peak.flops,
                "source": str(each.peak),
                "refused": each.refused,
            }
            for name, each in plan.utilizations().items()
        },
        "traffic": [asdict(each) for each in plan.step.transfers],
    }


# The keys of `_plan_dict`, where there is no plan.
_NOTHING: Mapping[str, None] = dict.fromkeys(
    (
        "layout fits bytes_per_rank bytes_limit bytes_by_kind bytes_by_moment bytes_logits bytes_buckets peak_moment "
        "ranks tokens_per_second step_seconds step_parts micro_batch_kinds bubble days flops mfu traffic"
    ).split()
)
