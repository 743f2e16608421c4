"""A step of a run once more: from the checkpoint before it, with the same data and random bits; writes nothing.

The run is built anew from RUN/resolved.yaml by the code that trains, in as many processes as are started now: a
checkpoint does not depend on the layout, though another one adds in another order. Steps between the checkpoint and the
wanted one are trained again in memory; the wanted one is measured and never applied, so that it can be measured often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import recipe as recipes
from errors import UsageError
from lowprec.probe.config import ProbeConfig
from parallel import checkpoint
from recipe import Recipe
from report.metrics import read_records
from run.build import assemble
from run.environment import Launch
from run.recovery import Fault, find_fault

ONE_PROCESS = (
    *("parallel.tp=1", "parallel.sp=false", "parallel.sp_payload=exact", "parallel.pp=1", "parallel.schedule=1f1b"),
    *("parallel.stages_per_rank=null", "parallel.stage_layers=null"),
)


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
        trail = _trail(run_dir, step, discarded)
        self.recorded = trail.get(step)
        find = lambda: checkpoint.newest(run_dir, step=step - 1)  # noqa: E731
        self.run, start = assemble(recipe, launch, find, allow_precision_change=True)
        self.start = 0 if start is None else start.step
        while True:
            if (record := trail.get(self.run.step + 1)) is not None:  # a rollback leaves data out
                self.run.samples = record["samples"] - recipe.train.global_batch
            if self.run.step == step - 1:
                break
            self._train()

    def _train(self) -> None:
        run = self.run
        lr = run.lr()
        run.begin_step()
        loss = run.agree(run.forward_backward())
        run.advance(loss, run.engine.step(lr, run.guard.judge(loss)))

    def measure(self) -> Outcome:
        """The wanted step as the run's linears and gradients are set now; changes nothing. Collective."""
        loss, update = self.run.rehearse()
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
            f"report.bisect ...), or override it ({' '.join(ONE_PROCESS)})"
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


def _trail(run_dir: Path, step: int, discarded: bool) -> dict[int, dict[str, Any]]:
    """The records of the wanted step and of those that led to it, by step; empty if it has none.

    discarded: the wanted step is one of those taken back; they count, too, if there is no other.
    """
    files = [run_dir / "metrics.jsonl", run_dir / "metrics.discarded.jsonl"]
    kept, dropped = ([r for r in read_records(f) if r.get("kind") == "step"] if f.is_file() else [] for f in files)
    wanted = [record for record in dropped if record["step"] == step]
    if not discarded:
        wanted += [record for record in kept if record["step"] == step]
    elif not wanted:
        raise UsageError(f"{files[1]} has no step {step}; drop --discarded")
    if not wanted:
        return {}
    # Back from the wanted step: among the records of a step the one with the latest data that is not later than what
    # followed. A rollback repeats steps with later data.
    every: dict[int, list[dict[str, Any]]] = {}
    for record in dropped + kept:
        every.setdefault(record["step"], []).append(record)
    trail = {step: wanted[-1]}
    while earlier := [r for r in every.get(step - 1, ()) if r["samples"] < trail[step]["samples"]]:
        step -= 1
        trail[step] = max(earlier, key=lambda record: record["samples"])
    return trail
