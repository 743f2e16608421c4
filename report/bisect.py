"""What made a step go wrong: python -m report.bisect RUN STEP [options] [section.key=value ...]

Repeats the step from the checkpoint before it, as it was and with every GEMM in BF16; if the two differ (a number that
is not finite, a loss or gradient norm too far apart), it takes parts of the precision back, one after the other, until
the difference is gone:

    each GEMM leg; stochastic rounding; Hadamard rotations; amax histories; what gradients, weights and inputs travel in
    then a smallest set of linears, by halving (Zeller and Hildebrandt, "Simplifying and isolating failure-inducing
    input", IEEE TSE 2002), and in each of them the operand

Nothing is written to RUN. Under torchrun, or in one process with parallel.tp=1 parallel.pp=1, which adds in another
order. Exit codes: 0 found, 1 the step goes wrong whatever is taken back, 2 it does not go wrong, or a wrong option.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from errors import UserError
from lowprec.formats import QuantSpec
from lowprec.policy import GEMMS, Gemm, Slots, words_of
from parallel.tensor import exact_inputs
from run.replay import Outcome, Replay
from train import read_launch

FOUND, NOT_FOUND, NOTHING = 0, 1, 2
MOST_TRIALS = 60  # of the search among linears
Change = Callable[[str, str, QuantSpec], QuantSpec | None]  # (linear, slot, as it is) -> what instead; None: BF16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a step may be from the same step in BF16: relative, of the loss and of the gradient norm."""

    loss: float = 0.01
    norm: float = 0.1


@dataclass(frozen=True)
class Trial:
    """One repetition. wrong: in words; None: as it should be."""

    what: str
    outcome: Outcome
    wrong: str | None


def judge(outcome: Outcome, reference: Outcome, limits: Limits) -> str | None:
    """What is wrong with an outcome; a reference that is not finite itself says no more than that."""
    if not outcome.finite:
        return "not finite"
    if not reference.finite:
        return None
    loss = outcome.loss / reference.loss - 1 if reference.loss else 0.0
    norm = outcome.grad_norm / reference.grad_norm - 1 if reference.grad_norm else 0.0
    found = [f"loss {loss:+.1%}"] if abs(loss) > limits.loss else []
    found += [f"gradient norm {norm:+.0%}"] if abs(norm) > limits.norm else []
    return ", ".join(found) or None


def smallest(atoms: Sequence[str], cures: Callable[[frozenset[str]], bool], most: int = MOST_TRIALS) -> list[str]:
    """A set of `atoms` that still cures and none of whose parts of that size does, by halving; all of them cure.

    After `most` calls of `cures`, the smallest set so far.
    """
    kept, parts, calls = list(atoms), 2, 0
    while len(kept) > 1 and calls < most:
        size = -(-len(kept) // parts)
        chunks = [kept[i : i + size] for i in range(0, len(kept), size)]
        rests = [[atom for atom in kept if atom not in chunk] for chunk in chunks] if parts > 2 else []
        for candidate in (*chunks, *rests):
            calls += 1
            if cures(frozenset(candidate)):
                parts = 2 if candidate in chunks else max(parts - 1, 2)
                kept = candidate
                break
        else:
            if parts >= len(kept):
                break
            parts = min(2 * parts, len(kept))
    return kept


class Bisection:
    """Trials of one step, all by the same judgement. Collective over all processes."""

    def __init__(self, replay: Replay, limits: Limits, say: Callable[[Trial], object]) -> None:
        self.replay, self.limits, self._say = replay, limits, say
        self.trials: list[Trial] = []
        self.precision = replay.run.precision
        self.table: Mapping[str, Slots] = {n: s for n, s in self.precision.now.items() if s.quantized}
        with ExitStack() as exact:
            for _, context in self._payloads():
                exact.enter_context(context)
            self.reference = self._measure(lambda *_: None)
        self._note("every GEMM in BF16", self.reference)
        self.original = self._note("as it was", self._measure(lambda _, __, spec: spec))

    def attempt(self, what: str, change: Change, context: AbstractContextManager | None = None) -> bool:
        """Whether the step is right with this change."""
        with context or nullcontext():
            return self._note(what, self._measure(change)).wrong is None

    def _note(self, what: str, outcome: Outcome) -> Trial:
        trial = Trial(what, outcome, judge(outcome, self.reference, self.limits))
        self.trials.append(trial)
        self._say(trial)
        return trial

    def _measure(self, change: Change) -> Outcome:
        with self._changed(change):
            return self.replay.measure()

    @contextmanager
    def _changed(self, change: Change) -> Iterator[None]:
        for name, layer in self.precision.layers.items():
            layer.use(_changed(name, self.precision.now[name], change))
        try:
            yield
        finally:
            for name, layer in self.precision.layers.items():
                layer.use(self.precision.now[name])

    def search(self) -> list[str]:
        """Everything that cures, in words, the most precise last; empty if nothing does."""
        cures = [what for what, change, context in self._toggles() if self.attempt(what, change, context)]
        if self.reference.finite and self.table:
            legs = next(([gemm] for gemm in GEMMS if f"{gemm} in BF16" in cures), list(GEMMS))
            layers = smallest(list(self.table), lambda chosen: self._cured_by(chosen, legs))
            words = f"{', '.join(layers)} {'' if len(legs) == 3 else legs[0] + ' '}in BF16"
            cures.append(words)
            for layer in layers[:3]:
                cures += self._operands(layer, layers, legs)
        return cures

    def _cured_by(self, chosen: frozenset[str], legs: Sequence[str]) -> bool:
        shown = f"{len(chosen)} linears" if len(chosen) > 2 else ", ".join(sorted(chosen))
        change: Change = lambda name, slot, spec: None if name in chosen and _gemm(slot) in legs else spec  # noqa: E731
        return self.attempt(f"{shown}: {', '.join(legs)} in BF16", change)

    def _operands(self, layer: str, layers: Sequence[str], legs: Sequence[str]) -> Iterator[str]:
        """Single operands of one of the guilty linears, the others' GEMMs in BF16."""
        for gemm in legs:
            for side in ("a", "b"):
                slot = f"{gemm}.{side}"
                spec = getattr(getattr(self.table[layer], gemm), side)
                if spec is None:
                    continue

                def change(name: str, here: str, was: QuantSpec, slot: str = slot) -> QuantSpec | None:
                    guilty = name in layers and _gemm(here) in legs
                    return None if guilty and (name != layer or here == slot) else was

                words = f"{layer} {slot} ({words_of(spec)}) in BF16"
                if self.attempt(words, change):
                    yield words

    def _toggles(self) -> Iterator[tuple[str, Change, AbstractContextManager | None]]:
        """What can be taken back of the whole model, if the run has it."""
        specs = [
            spec for slots in self.table.values() for g in GEMMS for spec in vars(getattr(slots, g)).values() if spec
        ]
        for gemm in GEMMS:
            if any(getattr(slots, gemm) != Gemm() for slots in self.table.values()):
                yield f"{gemm} in BF16", lambda _, slot, spec, g=gemm: None if _gemm(slot) == g else spec, None
        for what, has, option in (
            ("nearest instead of stochastic rounding", lambda s: s.rounding == "stochastic", {"rounding": "nearest"}),
            ("no Hadamard rotation", lambda s: s.hadamard, {"hadamard": 0}),
            ("scales of now instead of an amax history", lambda s: s.amax_history, {"amax_history": 0}),
        ):
            if any(has(spec) for spec in specs):
                yield what, lambda _, __, spec, h=has, o=option: replace(spec, **o) if h(spec) else spec, None
        for what, context in self._payloads():
            yield what, lambda _, __, spec: spec, context

    def _payloads(self) -> Iterator[tuple[str, AbstractContextManager]]:
        """What travels rounded in this run, each with a context in which it does not."""
        recipe, engine = self.replay.run.recipe, self.replay.run.engine
        if recipe.zero.stage < 3 and (recipe.gradients.payload, recipe.gradients.accumulate) != ("fp32", "fp32"):
            yield "gradients add up and travel in FP32", engine.exact_gradients()
        if recipe.zero.gather != "exact":
            yield "weights are gathered exactly", engine.exact_weights()
        if recipe.parallel.sp_payload != "exact":
            yield "gathered inputs travel exactly", exact_inputs(self.replay.run.local.parts)


def _gemm(slot: str) -> str:
    return slot.partition(".")[0]


def _changed(name: str, slots: Slots, change: Change) -> Slots:
    def spec(gemm: str, side: str) -> QuantSpec | None:
        was = getattr(getattr(slots, gemm), side)
        return None if was is None else change(name, f"{gemm}.{side}", was)

    return replace(slots, **{gemm: Gemm(spec(gemm, "a"), spec(gemm, "b")) for gemm in GEMMS})


def table(trials: Sequence[Trial]) -> Table:
    """The trials for a terminal."""
    made = Table("taken back", "loss", "gradient norm", "wrong", title_justify="left", box=None)
    for trial in trials:
        made.add_row(trial.what, f"{trial.outcome.loss:.6g}", f"{trial.outcome.grad_norm:.6g}", trial.wrong or "")
    return made


def bisect(options: argparse.Namespace, overrides: tuple[str, ...], console: Console) -> int:
    """Search, and say what was found; the exit code. Collective: only rank 0's console shows anything."""
    replay = Replay(options.run, options.step, read_launch(), overrides, discarded=options.discarded)
    with replay.run:
        return _bisect(replay, options, console)


def _bisect(replay: Replay, options: argparse.Namespace, console: Console) -> int:
    origin = f"step {replay.start}" if replay.start else "the initial weights"
    console.print(f"step {options.step} of {options.run}, repeated from {origin}", markup=False, soft_wrap=True)
    if replay.recorded is not None:
        then = (replay.recorded["loss"], replay.recorded["grad_norm"])
        console.print(f"then: loss {then[0]}, gradient norm {then[1]}", markup=False)
    limits = Limits(loss=options.loss_limit / 100, norm=options.norm_limit / 100)
    search = Bisection(
        replay, limits, lambda trial: console.print(f"  {trial.what}: {trial.wrong or 'right'}", markup=False)
    )
    code, words, cures, fault = _conclude(search)
    console.print(table(search.trials))
    for line in words:
        console.print(line, markup=False, soft_wrap=True)
    if options.json and replay.run.mesh.rank == 0:
        trials = [{"what": t.what, "wrong": t.wrong, **asdict(t.outcome)} for t in search.trials]
        content: dict[str, Any] = {"step": options.step, "code": code, "cures": cures, "fault": fault, "trials": trials}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    return code


def _conclude(search: Bisection) -> tuple[int, list[str], list[str], str | None]:
    """(exit code, lines to say, what cures, where a number that is not finite came from)."""
    wrong, fault = search.original.wrong, None
    if wrong is None:
        return NOTHING, ["The step does not go wrong here: it is within the limits of the same step in BF16."], [], None
    words = [f"The step goes wrong: {wrong}."]
    if wrong == "not finite":
        fault = search.replay.fault().describe()
        words.append(fault)
    cures = search.search()
    if not cures:
        return NOT_FOUND, [*words, "Nothing that was taken back mends it."], [], fault
    return FOUND, [*words, "It is mended by each of:", *(f"  {cure}" for cure in cures)], cures, fault


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m report.bisect",
        description="What made a step of a run go wrong.",
        epilog="section.key=value overrides the run's recipe, for a layout that fits the processes.",
    )
    made.add_argument("run", type=Path, metavar="RUN")
    made.add_argument("step", type=int, metavar="STEP", help="counted from 1, as in the log")
    made.add_argument("--loss-limit", type=float, default=1.0, metavar="PERCENT", help="of the loss in BF16 (1)")
    made.add_argument("--norm-limit", type=float, default=10.0, metavar="PERCENT", help="of the gradient norm (10)")
    made.add_argument("--discarded", action="store_true", help="STEP as it was before the run took it back")
    made.add_argument("--json", metavar="FILE", help="also write trials and findings")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; argparse itself exits with 2 on a wrong option."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    overrides = tuple(word for word in words if re.match(r"[a-z_]\w*(\.\w+)+=", word))
    options = parser().parse_args([word for word in words if word not in overrides])
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    console = Console(highlight=False, quiet=read_launch().rank > 0)
    try:
        return bisect(options, overrides, console)
    except UserError as error:
        print(f"report.bisect: {error}", file=sys.stderr)
        return NOTHING


if __name__ == "__main__":
    sys.exit(main())
