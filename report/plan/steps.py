"""Seconds of one step: quantizing weights, the schedule of micro-batches with its bubble, reduction, update, gathering.

Every pipeline rank is priced; where ranks wait for each other the slowest one decides. Without a pipeline a GPU reduces
beside the backward, so only what is longer than that shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.bubble import Times, simulate
from parallel.pipeline import stages_of
from report.plan.costs import Pricing, added
from report.plan.engine import ACCUMULATORS, Costs, Engine
from report.plan.hardware import Machine
from report.plan.layout import Layout, parameters_of, units_of
from report.plan.partition import Parameter, partition
from report.plan.traffic import Links, Transfer, gradient_bytes, tensor_traffic, transfer, weights_given
from report.plan.units import Unit, Units

TIED = "gradients of tied embeddings"


@dataclass(frozen=True)
class Updating:
    """Of the optimizer's step for one element: seconds, and temporary bytes (engine.Costs)."""

    seconds: float
    costs: Costs


@dataclass(frozen=True)
class StepTime:
    """Of one step.

    parts:  seconds, one after the other
    kinds:  what the busiest rank's own work in the micro-batches goes to, seconds
    bubble: share of the ranks' time in the schedule in which they wait
    """

    parts: dict[str, float]
    kinds: dict[str, float]
    bubble: float
    transfers: tuple[Transfer, ...]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def step_time(layout: Layout, units: Units, pricing: Pricing, links: Links, updating: Updating) -> StepTime:
    """Of a layout on a machine."""
    config = layout.recipe.parallel
    parts = [units_of(stage, layout, units) for stage in range(len(layout.blocks))]
    times = [stage_times(each, layout, pricing) for each in parts]
    ranks = [_Rank(rank, layout, units, pricing, links, updating) for rank in range(layout.pp)]
    work = layout.micro_batches * sum(t.forward + t.backward_input + t.backward_weight for t in times)
    if layout.pp == 1:
        running, idle = work, 0.0
    else:
        running = simulate(config, layout.micro_batches, times, links.pipeline.seconds("send", units.hidden))
        idle = 1.0 - work / (layout.pp * running)
    machine = pricing.machine
    if machine.cores:  # ranks beyond the cores share them
        running = max(running, work * layout.tp * layout.dp / machine.cores)
    own = [u for stage in stages_of(_busiest(layout, times), config) for u in parts[stage]]
    gradients = max((rank.gradients(_backward(layout, times)) for rank in ranks), key=lambda t: t.exposed)
    gathers = max((rank.gathers() for rank in ranks), key=lambda t: t.exposed)
    transfers = [*tensor_traffic(own, layout, links.tensor), *_between_stages(layout, units, links), gradients, gathers]
    if layout.recipe.zero.stage == 3:
        transfers += _fetches(layout, parameters_of(0, layout, units), links, times[0])
    scale = max(1.0, layout.world / machine.cores) if machine.cores else 1.0
    each = [rank.local() for rank in ranks]
    local = {name: scale * max(here[name] for here in each) for name in ("reduction", "update", "gathering")}
    found = {
        "weights quantized": scale * max(rank.prepare() for rank in ranks),
        "micro-batches": running,
        "weights fetched": sum(t.exposed for t in transfers if t.what.startswith("weights, ")),
        "reduction": local["reduction"] + gradients.exposed + sum(t.exposed for t in transfers if t.what == TIED),
        "update": local["update"],
        "gathering": local["gathering"] + gathers.exposed,
    }
    kept = tuple(t for t in transfers if t.sent)
    return StepTime({n: s for n, s in found.items() if s}, _kinds(own, layout, pricing), idle, kept)


def _kinds(parts: Sequence[Unit], layout: Layout, pricing: Pricing) -> dict[str, float]:
    found: dict[str, float] = {}
    for unit in parts:
        for name, seconds in pricing.by_kind(unit).items():
            found[name] = found.get(name, 0.0) + layout.micro_batches * seconds
    if waiting := _waiting(layout, pricing) * sum(found.values()):
        found["waiting for each other"] = waiting
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def stage_times(parts: Sequence[Unit], layout: Layout, pricing: Pricing) -> Times:
    """Of one micro-batch, the adding up of gradients included."""
    found = added(pricing.times(unit) for unit in parts)
    elements = sum(p.count for unit in parts for p in unit.parameters)
    adding = elements * _accumulation_bytes(layout) * pricing.per_byte("pointwise/4", 12.0 * elements / len(parts))
    if found.backward_weight:
        found = Times(found.forward, found.backward_input, found.backward_weight + adding)
    else:
        found = Times(found.forward, found.backward_input + adding, 0.0)
    longer = 1.0 + _waiting(layout, pricing)
    return Times(longer * found.forward, longer * found.backward_input, longer * found.backward_weight)


def _waiting(layout: Layout, pricing: Pricing) -> float:
    """Seconds that a rank waits for others for each second of its own work, whose GEMMs tensor parallelism joins."""
    return pricing.machine.waiting if layout.tp > 1 else 0.0


def _accumulation_bytes(layout: Layout) -> float:
    """Bytes moved to add one element of a micro-batch's FP32 gradient to its accumulator; the first one is kept."""
    once = {"fp32": 12.0, "bf16": 8.0, "fp8": 40.0}[layout.recipe.gradients.accumulate]
    stage, count = layout.recipe.zero.stage, layout.micro_batches
    first = {"fp32": 0.0, "bf16": 6.0, "fp8": 20.0}[layout.recipe.gradients.accumulate]
    share = 1.0 / layout.dp if stage >= 2 else 1.0
    return share * (once * (count - 1) + first) / count


def _backward(layout: Layout, times: Sequence[Times]) -> float:
    """Seconds of backward beside which a GPU reduces gradients: the last one's, or at stages 2 and 3 every one's."""
    if layout.pp > 1:
        return 0.0
    each = times[0].backward_input + times[0].backward_weight
    return each * (layout.micro_batches if layout.recipe.zero.stage >= 2 else 1)


def _busiest(layout: Layout, times: Sequence[Times]) -> int:
    """The pipeline rank with most to do."""

    def load(rank: int) -> float:
        own = [times[stage] for stage in stages_of(rank, layout.recipe.parallel)]
        return sum(t.forward + t.backward_input + t.backward_weight for t in own)

    return max(range(layout.pp), key=load)


def _between_stages(layout: Layout, units: Units, links: Links) -> list[Transfer]:
    """Hidden states and their gradients of a rank in the middle, whose exposed time is part of the bubble; and the
    gradients of tied embeddings, of which the first and the last rank have a copy."""
    recipe, link = layout.recipe, links.pipeline
    if layout.pp == 1:
        return []
    each = len(stages_of(0, recipe.parallel)) * layout.micro_batches
    hidden, dtype = float(units.hidden), recipe.model.dtype
    names = ("hidden states", "gradients of hidden states")
    found = [transfer(name, "pipeline", "send", dtype, link, [hidden], each, hidden=float("inf")) for name in names]
    if recipe.model.tied_embeddings and len(layout.blocks) - 1 not in stages_of(0, recipe.parallel):
        (embedding,) = units.first.parameters
        found.append(transfer(TIED, "pipeline", "all_reduce", "fp32", link, [4.0 * embedding.count]))
    return found


def _fetches(layout: Layout, parameters: Sequence[Parameter], links: Links, times: Times) -> list[Transfer]:
    """Stage 3: weights for each forward and each backward, beside which the next ones are fetched."""
    recipe, link = layout.recipe, links.data
    width = 2 if recipe.model.dtype == "bf16" else 4
    given = [float(sum(-(-p.count // layout.dp) for p in parameters) * width)]
    seconds = {"forward": times.forward, "backward": times.backward_input + times.backward_weight}
    return [
        transfer(
            f"weights, {name}",
            "data",
            "all_gather",
            recipe.model.dtype,
            link,
            given,
            layout.micro_batches,
            hidden=each * layout.micro_batches,
        )
        for name, each in seconds.items()
    ]


class _Rank:
    """What one pipeline rank does once a step."""

    def __init__(
        self, pp_rank: int, layout: Layout, units: Units, pricing: Pricing, links: Links, updating: Updating
    ) -> None:
        self.layout, self.pricing, self.links, self.updating = layout, pricing, links, updating
        stage = layout.recipe.zero.stage
        self.parameters = parameters_of(pp_rank, layout, units)
        flat = partition(self.parameters, layout.dp if stage in (1, 2) else 1)
        self.engine = Engine(
            layout, flat, self.parameters, not pricing.machine.cores and layout.pp == 1, updating.costs
        )
        own = stages_of(pp_rank, layout.recipe.parallel)
        self.parts = [unit for s in own for unit in units_of(s, layout, units)]

    @property
    def machine(self) -> Machine:
        return self.pricing.machine

    def prepare(self) -> float:
        return sum(self.pricing.phase(unit.prepare) for unit in self.parts)

    def local(self) -> dict[str, float]:
        """Seconds of what the rank does by itself."""
        flat, recipe = self.engine.flat, self.layout.recipe
        elements = sum(p.count for p in self.parameters)
        owned = elements / (self.layout.dp if recipe.zero.stage else 1)
        width = ACCUMULATORS[recipe.gradients.accumulate]
        reductions = self.layout.micro_batches if recipe.zero.stage >= 2 else 1
        # Into the bucket, in order of destination, out of the messages into a sum.
        moved = reductions * elements * (width + 4 + 8 + 8)
        working = 2 if recipe.model.dtype == "bf16" else 4
        copied = 4 * working * flat.elements if flat.dp > 1 else 0
        each = 4.0 * elements / max(len(self.parameters), 1)
        return {
            "reduction": moved * self.pricing.per_byte("copy/4", 2 * each),
            "update": owned * (self.updating.seconds + 4 * self.pricing.per_byte("norm", each)),
            "gathering": copied * self.pricing.per_byte(f"copy/{working}", float(copied)),
        }

    def gradients(self, backward: float) -> Transfer:
        recipe, dp = self.layout.recipe, self.layout.dp
        hidden = 0.0 if self.machine.cores else backward
        stage, payload = recipe.zero.stage, recipe.gradients.payload
        if stage == 0 or stage == 3:
            elements = sum(p.count for p in self.parameters)
            times = self.layout.micro_batches if stage == 3 else 1
            kind = "reduce_scatter" if stage == 3 else "all_reduce"
            return transfer("gradients", "data", kind, "fp32", self.links.data, [4.0 * elements], times, hidden)
        given = gradient_bytes(self.engine) if dp > 1 else []
        times = self.layout.micro_batches if stage == 2 else 1
        return transfer("gradients", "data", "all_to_all", payload, self.links.data, given, times, hidden)

    def gathers(self) -> Transfer:
        recipe = self.layout.recipe
        payload = recipe.model.dtype if recipe.zero.gather == "exact" else recipe.zero.gather
        given = weights_given(self.engine) if recipe.zero.stage in (1, 2) and self.layout.dp > 1 else []
        return transfer("updated weights", "data", "all_gather", payload, self.links.data, given)
