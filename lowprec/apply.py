"""Put a policy to work on a model: swap its linears by name, keep weights and names, and follow the run's steps.

precision = Precision([model], policy, config, ...)    before the optimizer takes the parameters
precision.begin_step(step)                             weights changed: new copies; a new phase may begin
precision.at(row)                                      before each micro-batch: where its tokens are
precision.end_step(group)                              delayed scaling takes its new scales
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import UsageError
from lowprec.linear import LowPrecisionLinear, Shared
from lowprec.philox import StepContext
from lowprec.policy import GEMMS, Phase, Policy, PrecisionConfig, Slots, describe, kept, table_to_dict, together
from lowprec.slots import Place, place_problems, specs_of


class Swap(Protocol):
    """As `own_layers`: other layers may take the linears' places; what it returns says of each what it multiplies."""

    def __call__(
        self,
        model: nn.Module,
        names: Sequence[str],
        tables: Sequence[Mapping[str, Slots]],
        shared: Shared,
        places: Mapping[str, Place],
        /,
    ) -> dict[str, LowPrecisionLinear]: ...


def own_layers(
    model: nn.Module,
    names: Sequence[str],
    tables: Sequence[Mapping[str, Slots]],
    shared: Shared,
    places: Mapping[str, Place],
) -> dict[str, LowPrecisionLinear]:
    """Put our linears in the place of the linears `names` of `model`. tables: slots of each phase; the first now."""
    layers = {}
    for name in names:
        linear: Any = model.get_submodule(name)
        layers[name] = LowPrecisionLinear(linear, name, tables[0][name], shared, places.get(name))
        put(model, name, layers[name])
    return layers


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let `module` be what `name` is in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What precision needs to know of the run.

    seed:            of the random bits and signs
    steps, tokens_per_step: of the run; they turn the schedule's phases into steps
    keep_weights:    False where weights are gathered for each use (ZeRO 3)
    gemm_dtype:      in which exact operands are multiplied
    swap_all:        swap linears that are never quantized, too (to compare like with like)
    linears:         names of all linears of the whole model; None: those of the parts at hand
    places:          linear name -> which part of it this rank has (tensor parallelism)
    swap:            puts other layers in the place of linears
    """

    seed: int
    steps: int
    tokens_per_step: int
    keep_weights: bool = True
    gemm_dtype: torch.dtype = torch.bfloat16
    swap_all: bool = False
    linears: Sequence[str] | None = None
    places: Mapping[str, Place] = field(default_factory=dict)
    swap: Swap = own_layers


class Precision:
    """The resolved precision of a model, at the step that the run stands at.

    parts: the model, or the parts of it that this rank has, with the whole model's names
    """

    def __init__(self, parts: Sequence[nn.Module], policy: Policy, config: PrecisionConfig, facts: RunFacts) -> None:
        linears = {
            name: part for part in parts for name, module in part.named_modules() if isinstance(module, nn.Linear)
        }
        # Rules are resolved against the whole model, whatever part of it is here.
        names = list(linears if facts.linears is None else facts.linears)
        self.tables = phases(names, policy, config, facts)
        self.shared = Shared(
            position=StepContext(seed=facts.seed),
            gemm_dtype=facts.gemm_dtype,
            wgrad_dtype=torch.float32 if config.wgrad_output == "fp32" else torch.bfloat16,
            pack_saved=config.pack_saved,
            keep_weights=facts.keep_weights,
        )
        self._table = self.tables[0][1]
        # A linear that is quantized in any phase is swapped; the others stay what they are.
        swap_all = facts.swap_all or self.shared.wgrad_dtype == torch.float32
        wanted = {name for _, table in self.tables for name, slots in table.items() if slots.quantized or swap_all}
        tables = [table for _, table in self.tables]
        self.layers: dict[str, LowPrecisionLinear] = {}
        for part in parts:
            mine = [name for name in names if name in wanted and name in linears and linears[name] is part]
            self.layers |= facts.swap(part, mine, tables, self.shared, facts.places)
        self._here = list(linears)
        self.places = facts.places
        refuse_misfits(tables, self.layers, facts.places)

    def begin_step(self, step: int) -> str | None:
        """Take the phase of `step` and quantize the weights for it; says so if other slots begin here."""
        self.shared.position = replace(self.shared.position, step=step, row=0)
        table = next(table for begin, table in reversed(self.tables) if begin <= step)
        news = None
        if table is not self._table:
            self._table, news = table, f"precision from step {step} on:\n{describe(table)}"
            for name, layer in self.layers.items():
                layer.use(table[name])
        for layer in self.layers.values():
            layer.prepare()
        return news

    def at(self, row: int) -> None:
        """The next micro-batch starts at this global row: (sample in the global batch) * seq_len."""
        self.shared.position = replace(self.shared.position, row=row)

    def recompute_context(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """What wraps a forward, and later its repetition in the backward: both see the same position."""
        position = self.shared.position

        @contextmanager
        def again() -> Iterator[None]:
            now, self.shared.position = self.shared.position, position
            try:
                yield
            finally:
                self.shared.position = now

        return nullcontext(), again()

    def end_step(self, group: dist.ProcessGroup | None = None) -> None:
        """After backward: the amaxes of all ranks decide the next scales of delayed scaling. Collective."""
        states = self._delayed()
        if not states:
            return
        amaxes = torch.stack([state.history[0] for state in states.values()])
        # One of a step that was not finite says nothing, and would keep the scale for as long as it is remembered.
        amaxes = torch.where(amaxes.isfinite(), amaxes, 0.0)
        dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=group)
        for state, amax in zip(states.values(), amaxes, strict=True):
            state.history[0] = amax
            state.advance()

    @property
    def now(self) -> Mapping[str, Slots]:
        """The slots of every linear of the whole model in the phase that the run is in."""
        return self._table

    def forget_step(self) -> None:
        """Drop the amaxes of forwards and backwards since the last `end_step`: they were no part of training."""
        for state in self._delayed().values():
            state.history[0] = 0.0

    def state(self) -> dict[str, Tensor]:
        """Live tensors that a checkpoint needs, the same on all data-parallel ranks: name -> tensor."""
        return {
            f"{name}.{key}": tensor
            for name, state in self._delayed().items()
            for key, tensor in state.state_dict().items()
        }

    def receipt(self) -> dict[str, int]:
        """GEMMs run so far, "fprop e4m3 (fused) x e4m3 (fused) in bfloat16" -> how many."""
        self._settle()
        return {f"{gemm} {a} x {b} in {product}": n for (gemm, a, b, product), n in sorted(self.shared.counts.items())}

    def forget_receipt(self) -> None:
        """Count GEMMs from nothing on."""
        self._settle()
        self.shared.counts.clear()

    def _settle(self) -> None:
        for layer in self.layers.values():
            layer.settle()

    def unquantized(self) -> list[str]:
        """Linears that stay the model's own in every phase, and so are in no receipt."""
        return [name for name in self._here if name not in self.layers]

    def check_ran(self) -> None:
        """After a training step: every swapped linear ran its three GEMMs here. RuntimeError names one that did not."""
        self._settle()
        if idle := {name: sorted(set(GEMMS) - layer.ran) for name, layer in self.layers.items() if len(layer.ran) < 3}:
            raise RuntimeError(f"linears of the precision table whose GEMMs ran elsewhere or not at all: {idle}")

    def table(self) -> dict[str, object]:
        """JSON-able: the resolved slots of every linear, for each phase by its first step, and the wgrad output."""
        phases = {str(begin): table_to_dict(table) for begin, table in self.tables}
        return {"phases": phases, "wgrad_output": str(self.shared.wgrad_dtype).removeprefix("torch.")}

    def describe(self) -> str:
        """The table of the first phase, and when others begin."""
        later = [f"from step {begin} on:\n{describe(table)}" for begin, table in self.tables[1:]]
        return "\n".join([describe(self.tables[0][1]), *later])

    def _delayed(self) -> dict:
        return {
            f"{name}.{kind}": state
            for name, layer in sorted(self.layers.items())
            for kind, state in sorted(layer.delayed.items())
        }


def phases(
    linears: Iterable[str], policy: Policy, config: PrecisionConfig, facts: RunFacts
) -> list[tuple[int, dict[str, Slots]]]:
    """The resolved table of all linears of a model for each phase of a run, by the phase's first step."""
    names = list(linears)
    blocks = 1 + max((int(name.split(".")[1]) for name in names if name.startswith("layers.")), default=-1)
    if config.bf16_first + config.bf16_last > blocks:
        asked = f"precision.bf16_first {config.bf16_first} and bf16_last {config.bf16_last}"
        raise UsageError(f"{asked} exceed the model's {blocks} blocks; keep fewer in BF16")
    policy = policy.with_bf16_blocks(config.bf16_first, config.bf16_last)
    tables = [(0, policy.resolve(names, blocks))]
    for phase in config.schedule:
        tables.append(_phase(policy, tables[-1], phase, facts))
    if dead := [keep for keep in config.keep if not any(keep.reaches(table) for _, table in tables)]:
        words = "; ".join(f"{keep.match} ({', '.join(keep.gemms)})" for keep in dead)
        raise UsageError(f"precision.keep reaches no quantized GEMM (mend or delete it): {words}")
    return [(begin, kept(table, config.keep)) for begin, table in tables]


def _phase(
    policy: Policy, before: tuple[int, dict[str, Slots]], phase: Phase, facts: RunFacts
) -> tuple[int, dict[str, Slots]]:
    """The first step and the table of a phase, from those of the one before."""
    begin, (last, table) = phase.first_step(facts.steps, facts.tokens_per_step), before
    if begin <= last or begin >= facts.steps:
        raise UsageError(
            f"a phase of precision.schedule begins at step {begin}; it must lie after the phase before it ({last}) "
            f"and before train.steps ({facts.steps})"
        )
    return begin, policy.at(table, phase)


def refuse_misfits(
    tables: Sequence[Mapping[str, Slots]], linears: Mapping[str, Any], places: Mapping[str, Place]
) -> None:
    """Raise UsageError, naming all, for linears that one of the tables cannot quantize.

    linears: those of this rank, with in_features and out_features
    places:  of all linears of the model: all ranks say the same
    """
    problems: list[tuple[str, str]] = []
    for table in tables:
        for name, linear in linears.items():
            problems += [(name, problem) for problem in _rotation_problems(table[name], linear)]
        for name, place in places.items():
            problems += [(name, problem) for problem in place_problems(table[name], place)]
    if problems:
        raise UsageError("\n".join(["the precision policy does not fit the model:", *together(problems)]))


def _rotation_problems(slots: Slots, linear: Any) -> list[str]:
    """A Hadamard rotation needs whole groups along the features that it turns."""
    sizes, specs = {"fprop": linear.in_features, "dgrad": linear.out_features}, specs_of(slots)
    return [
        f"{gemm} rotates groups of {spec.hadamard} features, which do not divide {size}"
        for gemm, size in sizes.items()
        for spec in (specs[f"{gemm}.a"],)
        if spec is not None and spec.hadamard and size % spec.hadamard
    ]
