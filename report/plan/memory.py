"""Bytes of one rank: every copy that it holds through a step, and the most at each moment of it.

    held      working weights, their quantized copies, master, states, amax histories, residuals, receive buffers
    moments   forward, backward, weight gradients, reduction, update, gathering: what each has on top of that
    peak      what is held and the largest of the moments, on the pipeline rank that needs most

Activations come from the traces, the rest from engine.py. What is alive inside one kernel is not counted, nor what an
allocator cannot use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowprec.formats import QuantSpec
from parallel.bubble import work_orders
from parallel.pipeline import stages_of
from report.plan.copies import weight_copies
from report.plan.engine import Costs, Engine, Engine3
from report.plan.hardware import Machine
from report.plan.layout import Layout, parameters_of, units_of
from report.plan.partition import Parameter, Partition, partition, states
from report.plan.units import Linear, Unit, Units

# DeepSpeed's defaults at stage 3: gathered weights that may stay, and those that are fetched ahead.
MAX_LIVE, PREFETCH = 1_000_000_000, 50_000_000


@dataclass(frozen=True)
class Setting:
    """What bytes depend on beside the layout.

    native:     quantized linears run in native kernels where the machine has them
    gemm_width: bytes of an operand that BF16 holds exactly, as the emulation multiplies it
    on_gpu:     reductions run beside the backward
    costs:      temporaries of the optimizer's step
    """

    machine: Machine
    native: bool
    gemm_width: int
    on_gpu: bool
    costs: Costs


@dataclass(frozen=True)
class Micro:
    """Bytes of one stage for one micro-batch.

    kept:             after its forward
    kept_for_weights: after the backward of the input, where weight gradients come later
    forward, weights: the most in each of the two
    backward:         the most in the backward of any part
    backwards:        the same of each part, last part first; the other parts' activations counted
    left:             gradients that the parts before have left by then
    """

    kept: int
    kept_for_weights: int
    forward: int
    weights: int
    backward: int
    backwards: tuple[int, ...]
    left: tuple[int, ...]


@dataclass(frozen=True)
class RankBytes:
    """One pipeline rank.

    held:        bytes by kind, all step long;  moments: what each moment has on top of them
    gradients:   when all micro-batches have added up
    activations: the most that forwards keep, the logits included where they are kept
    logits:      of one micro-batch, if it has them
    buckets:     in which gradients wait for their reduction
    """

    pp_rank: int
    parameters: int
    held: Mapping[str, int]
    moments: Mapping[str, int]
    gradients: int
    activations: int
    logits: int
    buckets: int

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + self.moments[self.moment]

    @property
    def moment(self) -> str:
        """When the peak is."""
        return max(self.moments, key=lambda name: self.moments[name])

    def kinds(self) -> dict[str, int]:
        """The peak as a sum: what is held, and of its moment the gradients, the activations and what is temporary."""
        most, found = self.moments[self.moment], dict(self.held)
        found["gradients"] = min(self.gradients, most)
        found["activations"] = 0
        if self.moment in ("forward", "backward", "weight gradients"):
            found["activations"] = min(self.activations, most - found["gradients"])
        found[f"temporary, {self.moment}"] = most - found["gradients"] - found["activations"]
        return {kind: count for kind, count in found.items() if count}


def micro(parts: Sequence[Unit], shared: int, gradients: Sequence[int]) -> Micro:
    """Add up the parts of a stage in the order in which they run. gradients: bytes that each part's backward leaves."""
    alive, forward = shared, shared
    for unit in parts:
        forward = max(forward, alive + unit.forward.peak)
        alive += unit.forward.kept
    kept, later, so_far = alive, 0, 0
    backwards, left = [], []
    for unit, gradient in zip(reversed(parts), reversed(gradients), strict=True):
        alive -= unit.forward.kept
        backwards.append(alive + later + unit.backward.peak)
        left.append(so_far)
        later, so_far = later + unit.backward.kept, so_far + gradient
    weights, rest = 0, later
    for unit in reversed(parts):
        weights = max(weights, rest - unit.backward.kept + unit.weights.peak)
        rest -= unit.backward.kept
    return Micro(kept, later, forward, weights, max(backwards), tuple(backwards), tuple(left))


def rank_bytes(layout: Layout, units: Units, setting: Setting, pp_rank: int) -> RankBytes:
    """Everything on the first data-parallel rank of a pipeline rank."""
    recipe, last = layout.recipe, len(layout.blocks) - 1
    own, parameters = stages_of(pp_rank, recipe.parallel), parameters_of(pp_rank, layout, units)
    flat = partition(parameters, layout.dp if recipe.zero.stage in (1, 2) else 1)
    if recipe.zero.stage == 3:
        engine = Engine3(layout, parameters)
    else:
        engine = Engine(layout, flat, parameters, setting.on_gpu and layout.pp == 1, setting.costs)
    shared = units.shared if layout.pp == 1 else units.shared_in_pipeline
    micros = {stage: micro(parts := units_of(stage, layout, units), shared, _left(parts, engine)) for stage in own}
    kept, moments = _activations(layout, pp_rank, micros, engine)
    held = _held(layout, parameters, flat) | _copies(layout, units, setting, parameters)
    held["amax histories"] = sum(_histories(linear.specs) for linear in _here(units, parameters))
    if layout.pp > 1:
        ends = (0 in own) + (last in own)
        held["receive buffers"] = (2 * len(own) - ends) * layout.micro_batches * units.hidden
    return RankBytes(
        pp_rank=pp_rank,
        parameters=sum(parameter.count for parameter in parameters),
        held={kind: count for kind, count in held.items() if count},
        moments=moments | engine.moments(),
        gradients=engine.accumulated,
        activations=kept,
        logits=units.logits if last in own else 0,
        buckets=engine.bucket,
    )


def _left(parts: Sequence[Unit], engine: Engine | Engine3) -> list[int]:
    """Bytes of gradients that each part's backward leaves; at stage 2 and 3 they are all there from the first on."""
    return [engine.gradient_bytes(unit.parameters) if engine.layout.recipe.zero.stage < 2 else 0 for unit in parts]


def _activations(
    layout: Layout, pp_rank: int, micros: Mapping[int, Micro], engine: Engine | Engine3
) -> tuple[int, dict[str, int]]:
    """(the most that forwards keep, bytes of the moments while micro-batches run)."""
    gradients = engine.accumulated
    if layout.pp == 1:
        (stage,) = micros.values()
        return stage.kept, _alone(layout, stage, engine)
    config, live, kept = layout.recipe.parallel, 0, 0
    most = {"forward": 0, "backward": 0, "weight gradients": 0}
    for kind, stage, _ in work_orders(config.schedule, config.pp, config.stages, layout.micro_batches)[pp_rank]:
        here = micros[stage]
        name, given, peak, leaves = {
            "F": ("forward", 0, here.forward, here.kept),
            "B": ("backward", here.kept, here.backward, 0),
            "I": ("backward", here.kept, here.backward, here.kept_for_weights),
            "W": ("weight gradients", here.kept_for_weights, here.weights, 0),
        }[kind]
        most[name] = max(most[name], live - given + peak + gradients)
        live += leaves - given
        kept = max(kept, live)
    return kept, {name: count for name, count in most.items() if count}


def _alone(layout: Layout, stage: Micro, engine: Engine | Engine3) -> dict[str, int]:
    """Forward and backward without a pipeline, in the last micro-batch of a step.

    Up to stage 1 the bucket of the first backward stays until the step's end; from stage 2 on each backward makes one
    when its first gradient is there, which is after the loss.
    """
    first, *others = stage.backwards
    more, inside = engine.bucket, engine.in_backward()
    if layout.recipe.zero.stage < 2 and layout.micro_batches == 1:
        rest = [here + left + more + inside for here, left in zip(others, stage.left[1:], strict=True)]
        return {"forward": stage.forward, "backward": max([first, *rest])}
    before = (more if layout.recipe.zero.stage < 2 else 0) + engine.accumulated
    rest = [here + engine.accumulated + more + inside for here in others]
    return {"forward": stage.forward + before, "backward": max([first + before, *rest])}


def _held(layout: Layout, parameters: Sequence[Parameter], flat: Partition) -> dict[str, int]:
    """Weights, master, states, residuals of error feedback."""
    recipe, dp = layout.recipe, layout.dp
    width = 2 if recipe.model.dtype == "bf16" else 4
    if recipe.zero.stage == 3:
        shares = [(p, -(-p.count // dp)) for p in parameters]
        owned, total = sum(count for _, count in shares), sum(p.count for p in parameters)
        found = {"weights": width * owned, "gathered weights": width * min(total, MAX_LIVE + PREFETCH)}
        return found | states(shares, owned, recipe.optimizer)
    found = {"weights": width * flat.elements} | states(list(flat.fragments()), flat.owned, recipe.optimizer)
    if recipe.gradients.error_feedback:
        found["residuals"] = 2 * sum(p.count for p in parameters)
    return found


def _here(units: Units, parameters: Sequence[Parameter]) -> list[Linear]:
    names = {parameter.name.removesuffix(".weight") for parameter in parameters}
    return [linear for linear in units.linears if linear.swapped and linear.name in names]


def _copies(layout: Layout, units: Units, setting: Setting, parameters: Sequence[Parameter]) -> dict[str, int]:
    """Quantized copies of a rank's weights that live through a step: codes, scales and amax of each direction."""
    found: dict[str, int] = {}
    if layout.recipe.zero.stage == 3:
        return found  # made anew at each use
    for linear in _here(units, parameters):
        copies = weight_copies(
            linear.specs,
            linear.rows,
            linear.cols,
            setting.machine,
            native=setting.native,
            gemm_width=setting.gemm_width,
        )
        for direction, copy in copies.items():
            for what in ("codes", "scales", "amax"):
                kind = f"{direction} copies, {what}"
                found[kind] = found.get(kind, 0) + getattr(copy, what)
    return found


def _histories(specs: Mapping[str, QuantSpec | None]) -> int:
    """One history and one scale for each of x, w and dy that has delayed scaling."""
    matrices = {"fprop.a": "x", "wgrad.b": "x", "fprop.b": "w", "dgrad.b": "w", "dgrad.a": "dy", "wgrad.a": "dy"}
    lengths = {matrices[slot]: spec.amax_history for slot, spec in specs.items() if spec and spec.amax_history}
    return sum(4 * length + 4 for length in lengths.values())
