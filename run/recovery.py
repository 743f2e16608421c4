"""After a step that went wrong: say what, name who made it, perhaps go back to a checkpoint. Collective over all ranks.

A step that is not finite is repeated once with a watch on every module (lowprec/watch.py): weights, data and random
bits are those of the step (only scales of an amax history have moved on), so what made the number makes it again, and
nothing is paid for in good times. One that is finite the second time was no fault of the numbers: memory, a link, or
another order of additions.

Of the ranks that found something, those are left out that were given it by another pipeline stage; of the others the
earliest counts, then the lowest rank. Gradients that are finite everywhere and yet not after their reduction were made
by the reduction.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from errors import UserError
from lowprec.watch import Finding, watching
from parallel import checkpoint
from run.build import restore
from run.local import uncompiled
from run.state import Run


def recover(run: Run) -> bool:
    """Look after the step just done; true if the run stands at an earlier step now.

    Raises UserError, the same on all ranks, when the run does not get on.
    """
    guard, config = run.guard, run.recipe.spikes
    if guard.spikes:
        _say_spike(run)
    if guard.nonfinite:
        _say_fault(run, find_fault(run) if config.diagnose and guard.nonfinite == 1 else None)
        run.watchdog.beat(run.step)
    if guard.unapplied >= config.max_skipped:
        raise UserError(
            f"{guard.unapplied} steps in a row were not applied, up to step {run.step} (spikes.max_skipped); "
            "metrics.jsonl says why of each; `python -m report.bisect RUN STEP` looks for the cause"
        )
    return guard.wants_rollback and _roll_back(run)


def _say_spike(run: Run) -> None:
    guard = run.guard
    applied = "not applied" if guard.unapplied else "applied"
    text = f"spike in {guard.describe()} robust standard deviations above the steps before; {applied}"
    run.records.event("spike", run.step, text, {"z": guard.spikes, "applied": not guard.unapplied})


def _say_fault(run: Run, fault: Fault | None) -> None:
    words = f"loss or gradient not finite; not applied ({run.guard.nonfinite} in a row)"
    if fault is None:
        run.records.event("nonfinite", run.step, words, {})
    else:
        run.records.event("nonfinite", run.step, f"{words}. {fault.describe()}", fault.record())


@dataclass(frozen=True)
class Fault:
    """Where a number that is not finite came from.

    finding: of the first rank that made one; None: of no module
    rank:    that rank
    others:  further ranks that found one of their own
    finite:  whether the repetition was finite
    """

    finding: Finding | None
    rank: int
    others: tuple[int, ...]
    finite: bool

    def describe(self) -> str:
        if self.finding is None:
            return (
                "Repeated, the step is finite: not the numbers, but the machine or an order of additions"
                if self.finite
                else "All gradients are finite until they are accumulated and reduced"
            )
        found = self.finding
        where = f"First on rank {self.rank}: {found.module} {found.leg}, {found.what}"
        where += "" if found.row is None else f", in the micro-batch at row {found.row} of the global batch"
        return where + (f"; ranks {list(self.others)} found their own" if self.others else "")

    def record(self) -> dict[str, Any]:
        found = {} if self.finding is None else asdict(self.finding)
        found = {key: found.get(key) for key in ("module", "leg", "what", "row")}
        return {"rank": self.rank, **found, "other_ranks": list(self.others), "repeated_finite": self.finite}


def find_fault(run: Run) -> Fault:
    """Repeat the last step, which changed no weight, under a watch. Collective; leaves the run as it was."""
    step, samples, own = run.step, run.samples, {k: tensor.clone() for k, tensor in run.engine.own_states().items()}
    run.step, run.samples = step - 1, samples - run.recipe.train.global_batch
    try:
        with uncompiled(run.local.parts), watching(run.local.parts, run.precision.shared) as watch:
            run.begin_step()
            loss = run.agree(run.forward_backward())
    finally:
        run.step, run.samples = step, samples
    update = run.engine.step(0.0, lambda _: False)
    run.precision.forget_step()
    run.engine.restore_own_states(own)
    everyone: list[Finding | None] = [None] * run.mesh.world_size
    dist.all_gather_object(everyone, watch.first)
    return _judge(everyone, finite=math.isfinite(loss) and math.isfinite(update.grad_norm))


def _judge(findings: list[Finding | None], *, finite: bool) -> Fault:
    """The fault from the first finding of every rank."""
    made = sorted((found, rank) for rank, found in enumerate(findings) if found is not None and not found.received)
    if not made:
        return Fault(None, 0, (), finite)
    (first, rank), others = made[0], made[1:]
    return Fault(first, rank, tuple(sorted(other for found, other in others if found.module == found.module)), finite)


def _roll_back(run: Run) -> bool:
    """To the newest valid checkpoint before the spikes, and on with the data after them; false if there is none."""
    run.saver.finish()
    start = checkpoint.newest(Path(run.recipe.run.dir), step=run.step - run.guard.spiking)
    if start is None:
        run.records.message("no checkpoint to roll back to yet; the run goes on without this step")
        return False
    run.guard.roll_back(run.step)
    spiked, samples, z = run.step, run.samples, dict(run.guard.spikes)
    restore(run, start, allow_precision_change=True)  # which was allowed if the run's own checkpoint is of another
    run.guard.spiking = 0
    dropped, run.samples = samples - run.samples, samples
    run.records.rewind(run.step, run.samples)
    run.watchdog.beat(run.step)
    text = f"rolled back from step {spiked}; the {dropped} samples since are left out"
    run.records.event("rollback", run.step, text, {"from": spiked, "samples_left_out": dropped, "z": z})
    return True
