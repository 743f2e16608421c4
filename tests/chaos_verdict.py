"""What came of a fault, and whether it is what should come of it: tests/chaos.py's verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

from run import exits
from run.signals import HUNG, REQUEUE

Ending = tuple[int | None, str]  # code and reason
Curve = list[tuple[int, float]]  # step and loss
CANNOT_WRITE = 4
GOES_ON = {None, exits.CRASHED, REQUEUE, HUNG}  # codes after which train.sbatch requeues; None: there is no exit.json


@dataclass
class Outcome:
    """One fault. target: what it struck; newest: step of the newest undamaged checkpoint then, damaged: of the damaged
    one; resumed: where the run went on; ends: of its starts, said: of its processes; wrong: what should not be so."""

    number: int
    fault: str
    target: str
    at: int
    newest: int
    damaged: int | None
    resumed: int
    ends: list[Ending]
    said: list[Ending]
    seconds: float
    wrong: list[str] = field(default_factory=list)

    def ended(self) -> str:
        """How the start that was struck ended, in a few words."""
        if not self.ends:
            return "restarted by torchrun"
        return "; ".join(f"{code or 'no code'} {reason[:60]}" for code, reason in self.ends)

    def describe(self) -> str:
        verdict = f"WRONG: {'; '.join(self.wrong)}" if self.wrong else "ok"
        where = f"struck {self.target} at step {self.at}, newest save {self.newest}, went on from {self.resumed}"
        return f"{self.number}: {self.fault} {where} after {self.seconds:.0f} s ({self.ended()}): {verdict}"


def judge(outcome: Outcome, stacks: int, log: str, curve: Curve, straight: Curve) -> list[str]:
    """What is wrong with an outcome.

    stacks: bytes that watchdogs have written since; log: what the processes have; curve, straight: losses so far of the
    run, all of the run that nothing happened to
    """
    found, codes = [], {code for code, _ in outcome.said}
    if outcome.resumed < outcome.newest:
        found.append(f"lost a completed save: went on from {outcome.resumed}, not from {outcome.newest}")
    if outcome.resumed == outcome.damaged:
        found.append(f"went on from the damaged checkpoint of step {outcome.damaged}")
    allowed = GOES_ON | ({CANNOT_WRITE} if outcome.fault == "disk" else set())
    found += [f"the job would have ended: {code} {reason}" for code, reason in outcome.ends if code not in allowed]
    expected = {
        "stop": (HUNG in codes and stacks > 0, "no watchdog ended it with the stacks of its threads"),
        "agent": (REQUEUE in codes and outcome.resumed >= outcome.at, "the ranks did not save and stop"),
        "disk": ("No space left" in log, "the log does not say that the disk is full"),
        "flip": ("DAMAGED CHECKPOINT" in log or outcome.resumed > (outcome.damaged or 0), "no word of the damage"),
    }
    holds, message = expected.get(outcome.fault, (True, ""))
    found += [] if holds else [message]
    right = dict(straight)
    if differ := [step for step, loss in curve if loss != right[step]]:
        found.append(
            f"{len(differ)} losses differ from those of the run that nothing happened to, first at {differ[0]}"
        )
    return found


def as_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table()
    left = ("fault", "struck", "ended", "verdict")
    for name in ("", *left[:2], "at step", "newest save", "went on from", "steps lost", "ended", "s", "verdict"):
        table.add_column(name, justify="left" if name in left else "right")
    for each in outcomes:
        lost = str(max(0, each.at - each.resumed))
        numbers = (str(each.at), str(each.newest), str(each.resumed), lost)
        verdict = "; ".join(each.wrong) or "ok"
        table.add_row(
            str(each.number), each.fault, each.target, *numbers, each.ended()[:60], f"{each.seconds:.0f}", verdict
        )
    return table
