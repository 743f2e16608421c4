"""A step of a run once more: from the checkpoint before it, with the same data and random bits; writes nothing.

The run is built anew from RUN/resolved.yaml by the code that trains, in as many processes as are started now: a
checkpoint does not depend on the layout, though another one adds in another order. Steps between the checkpoint and the
wanted one are trained again in memory; the wanted one is measured and never applied, so that it can be measured often.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import recipe as recipes
from errors import UsageError
from lowprec.probe.config import ProbeConfig
from parallel import checkpoint
from recipe import Recipe
from run.build import assemble
from run.environment import Launch
from run.recovery import Fault, find_fault


@dataclass(frozen=True)
class Outcome:
    """Mean loss of a step and L2 norm of its gradient before clipping (infinite where a gradient is not finite)."""

    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Replay:
    """Stands right before the wanted step. Collective over all processes.

    run:      as it would have been then
    start:    the step of the checkpoint that it came from; 0: initial weights
    recorded: the record of the wanted step in the run's metrics; None if it has none
    """

    def __init__(
        self, run_dir: Path, step: int, launch: Launch, overrides: tuple[str, ...] = (), *, discarded: bool = False
    ) -> None:
        """overrides: of the recipe, for a layout that fits the processes. discarded: look for the step among those that
        the run took back. Raises UsageError, CheckpointError.
        """
        recipe = _recipe(run_dir, overrides, launch.world_size)
        if not 1 <= step <= recipe.train.steps:
            raise UsageError(f"step {step} is not one of {run_dir}, which has steps 1 to {recipe.train.steps}")
        self.recorded = _recorded(run_dir, step, discarded)
        find = lambda: checkpoint.newest(run_dir, step=step - 1)  # noqa: E731
        self.run, start = assemble(recipe, launch, find, allow_precision_change=True)
        self.start = 0 if start is None else start.step
        if self.recorded is not None:  # a rollback leaves data out
            self.run.samples = self.recorded["samples"] - (step - self.run.step) * recipe.train.global_batch
        while self.run.step < step - 1:
            self._train()
        self._own = {name: tensor.clone() for name, tensor in self.run.engine.own_states().items()}

    def _train(self) -> None:
        run = self.run
        lr = run.lr()
        run.begin_step()
        loss = run.agree(run.forward_backward())
        run.advance(loss, run.engine.step(lr, run.guard.judge(loss)))

    def measure(self) -> Outcome:
        """The wanted step as the run's linears and gradients are set now; changes nothing. Collective."""
        run = self.run
        run.begin_step()
        loss = run.agree(run.forward_backward())
        update = run.engine.step(0.0, lambda _: False)
        run.precision.forget_step()
        run.engine.restore_own_states(self._own)
        return Outcome(loss, update.grad_norm)

    def fault(self) -> Fault:
        """Where the first number of the wanted step that is not finite comes from. Collective."""
        run, batch = self.run, self.run.recipe.train.global_batch
        run.step, run.samples = run.step + 1, run.samples + batch
        try:
            return find_fault(run)
        finally:
            run.step, run.samples = run.step - 1, run.samples - batch


def _recipe(run_dir: Path, overrides: tuple[str, ...], world_size: int) -> Recipe:
    """That of the run, without what would write or is not of one step; GEMMs are emulated."""
    resolved = run_dir / "resolved.yaml"
    if not resolved.is_file():
        raise UsageError(f"{run_dir} is not the directory of a run: there is no {resolved}")
    try:
        recipe = recipes.load(str(resolved), overrides, world_size)
    except UsageError as error:
        raise UsageError(
            f"{error}\nA replay takes the run's layout: start as many processes (torchrun --nproc-per-node N -m "
            "report.bisect ...), or override it (parallel.tp=1 parallel.pp=1)"
        ) from None
    policy = run_dir / "policy.yaml"  # where the run keeps one of the user's own; its path may be another by now
    precision = replace(recipe.precision, backend="emulate")
    if policy.is_file():
        precision = replace(precision, policy=str(policy.resolve()))
    return replace(
        recipe,
        run=replace(recipe.run, dir=str(run_dir)),
        precision=precision,
        checkpoint=replace(recipe.checkpoint, behind=False),
        probe=ProbeConfig(),
    )


def _recorded(run_dir: Path, step: int, discarded: bool) -> Mapping[str, Any] | None:
    """The last record of the step; of those taken back if asked for, or if there is no other."""
    files = ["metrics.discarded.jsonl"] if discarded else ["metrics.jsonl", "metrics.discarded.jsonl"]
    for file in files:
        found = None
        for line in (run_dir / file).read_text().splitlines() if (run_dir / file).is_file() else ():
            try:
                record = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            if record.get("kind") == "step" and record["step"] == step:
                found = record
        if found is not None:
            return found
    if discarded:
        raise UsageError(f"{run_dir / files[0]} has no step {step}; drop --discarded")
    return None
