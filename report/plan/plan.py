"""A plan: what a layout holds, computes, sends and takes on a machine. `Planner` makes it; search.py tries many."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from recipe import Recipe
from report.flops import Peak
from report.plan.costs import Pricing, Share, flops_by_precision
from report.plan.fusion import compiled
from report.plan.hardware import Machine
from report.plan.layout import Layout, lay_out
from report.plan.memory import RankBytes, Setting, rank_bytes
from report.plan.steps import StepTime, Updating, step_time
from report.plan.traffic import Links
from report.plan.units import RECOMPUTES, Recompute, Unit, Units, View, trace_units, view_of
from report.plan.updates import updating
from run.local import DTYPES, should_compile

DAY_S = 86400.0
NOT_TIMED = StepTime({"not timed": float("nan")}, {}, 0.0, ())


@dataclass(frozen=True)
class Utilization:
    """Model FLOP/s of one device over a peak; `refused` says why it is not reported."""

    peak: Peak
    value: float | None
    refused: str | None

    @classmethod
    def of(cls, flops_per_s: float, peak: Peak) -> Utilization:
        if flops_per_s <= peak.flops:
            return cls(peak, flops_per_s / peak.flops, None)
        return cls(peak, None, f"{flops_per_s / 1e12:.4g} TFLOP/s a device are above {peak}: no share of it")


@dataclass(frozen=True)
class Plan:
    """Of one layout.

    ranks:    bytes of every pipeline rank
    shares:   FLOPs of a step by GEMM leg, operands and what they are multiplied as
    native:   whether quantized GEMMs are taken to run in native kernels where the machine has them
    emulated: else why not
    compiled: whether blocks are taken to be compiled
    """

    layout: Layout
    machine: Machine
    ranks: tuple[RankBytes, ...]
    step: StepTime
    shares: tuple[Share, ...]
    native: bool
    emulated: tuple[str, ...]
    compiled: bool

    @property
    def fullest(self) -> RankBytes:
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def limit(self) -> float:
        """Bytes of a device that tensors may take; ranks that share one divide it."""
        sharing = self.layout.per_node if self.machine.cores else 1
        return self.machine.memory * self.machine.usable / sharing

    @property
    def fits(self) -> bool:
        return self.fullest.peak <= self.limit

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.layout.tokens_per_step / self.step.seconds

    @property
    def flops_per_second(self) -> float:
        """Model FLOP/s of one device: recomputation does not count."""
        recipe = self.layout.recipe
        return self.tokens_per_second * recipe.model.flops_per_token(recipe.train.seq_len) / self.layout.world

    @property
    def days(self) -> float:
        """Until the last step of the recipe, without stops, saves and validations."""
        return self.layout.recipe.train.steps * self.step.seconds / DAY_S

    def utilizations(self) -> dict[str, Utilization]:
        """MFU against the BF16 peak, against the peak of this mix of precisions, and against the fastest of them."""
        machine, total = self.machine, sum(share.flops for share in self.shares)
        ideal = sum(share.flops / machine.peaks[share.element] for share in self.shares)
        fastest = max((share.element for share in self.shares), key=lambda element: machine.peaks[element])
        bf16, recipe = machine.peak("bf16"), machine.peak(fastest)
        mixed = Peak(total / ideal, f"mix of {_mix(self.shares)}, {recipe.source.split(', ', 1)[1]}", recipe.guessed)
        found = {"BF16 peak": bf16, "mixed peak": mixed, "recipe peak": recipe}
        return {name: Utilization.of(self.flops_per_second, peak) for name, peak in found.items()}


def _mix(shares: tuple[Share, ...]) -> str:
    total, elements = sum(share.flops for share in shares), dict.fromkeys(share.element for share in shares)
    parts = {e: sum(share.flops for share in shares if share.element == e) / total for e in elements}
    return ", ".join(f"{100 * part:.0f} % {element.upper()}" for element, part in parts.items())


class Planner:
    """Plans layouts of one recipe on one machine; traces are kept, so that another layout costs little.

    recipe:     of which layouts are planned; they differ in parallel, zero and model.recompute alone
    per_node:   devices of a node
    gemm_dtype: what the emulation multiplies exact operands in; None: the model's
    """

    def __init__(self, recipe: Recipe, machine: Machine, per_node: int, gemm_dtype: torch.dtype | None = None) -> None:
        self.recipe, self.machine, self.per_node = recipe, machine, per_node
        self.gemm_dtype = DTYPES[recipe.model.dtype] if gemm_dtype is None else gemm_dtype
        self._traced: dict[tuple[View, Recompute], Units] = {}
        self._fused: dict[int, Unit] = {}
        self._pricings: dict[tuple[int, int, bool], Pricing] = {}
        self._updating: Updating | None = None

    def units(self, recipe: Recipe, recomputes: tuple[Recompute, ...] = RECOMPUTES) -> Units:
        """The traces of a recipe's own layout. Raises UsageError where its policy does not fit the model."""
        view, wanted = view_of(recipe, self.gemm_dtype), recipe.model.recompute
        if (view, wanted) not in self._traced:
            every: dict[Recompute, None] = dict.fromkeys((wanted, *recomputes))
            missing: list[Recompute] = [each for each in every if (view, each) not in self._traced]
            for recompute, units in trace_units(recipe, view, missing).items():
                self._traced[view, recompute] = units
        return self._traced[view, wanted]

    def plan(self, recipe: Recipe, world: int) -> Plan:
        """Of a recipe that is valid on `world` ranks."""
        return self.timed(self.in_bytes(recipe, world))

    def in_bytes(self, recipe: Recipe, world: int, recomputes: tuple[Recompute, ...] = ()) -> Plan:
        """The plan without FLOPs and time. recomputes: kinds of recomputation that are to be traced with it."""
        machine, layout = self.machine, lay_out(recipe, world, self.per_node)
        units = self._as_run(recipe, recomputes)
        native = not units.emulated and not machine.cores
        setting = Setting(machine, native, self.gemm_dtype.itemsize, not machine.cores, self._update().costs)
        ranks = tuple(rank_bytes(layout, units, setting, rank) for rank in range(layout.pp))
        return Plan(layout, machine, ranks, NOT_TIMED, (), native, units.emulated, self.compiles(recipe))

    def timed(self, plan: Plan) -> Plan:
        """The same with its FLOPs and time."""
        layout, recipe = plan.layout, plan.layout.recipe
        units, links = self._as_run(recipe), Links.of(layout, self.machine)
        pricing = self._pricing(links, layout, plan.native)
        step = step_time(layout, units, pricing, links, self._update())
        per_token, width = recipe.model.flops_per_token(recipe.train.seq_len), DTYPES[recipe.model.dtype].itemsize
        shares = flops_by_precision(units.linears, layout.tokens_per_step, per_token, pricing, width=width)
        return replace(plan, step=step, shares=tuple(shares))

    def _as_run(self, recipe: Recipe, recomputes: tuple[Recompute, ...] = ()) -> Units:
        units = self.units(recipe, recomputes)
        return self.compiled(units) if self.compiles(recipe) else units

    def _update(self) -> Updating:
        if self._updating is None:
            self._updating = updating(self.machine, self.recipe.optimizer)
        return self._updating

    def compiles(self, recipe: Recipe) -> bool:
        """Whether a run there would compile its blocks."""
        return should_compile(recipe, torch.device("cpu" if self.machine.cores else "cuda"))

    def _pricing(self, links: Links, layout: Layout, native: bool) -> Pricing:
        key = (layout.tp, links.tensor.here, native)
        if key not in self._pricings:
            self._pricings[key] = Pricing(self.machine, native, links.tensor)
        return self._pricings[key]

    def compiled(self, units: Units) -> Units:
        """The same with blocks and loss compiled; the embedding is not."""
        for unit in (*units.blocks, units.last):
            if id(unit) not in self._fused:
                self._fused[id(unit)] = compiled(unit)
        blocks = tuple(self._fused[id(unit)] for unit in units.blocks)
        return replace(units, blocks=blocks, last=self._fused[id(units.last)])
