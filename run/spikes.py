"""Spikes: a loss, gradient norm or update norm far above those of the steps before.

    z = (x - median) / (1.4826 median |x - median|)      over the last `window` finite values; x is the loss in nats,
                                                         or the logarithm of a norm
    spike where z > threshold, and x - median > RISE     a quiet window makes any z large

Only rises count. Every finite value enters its window, a spike too: the median bears it, and a level that stays high
is the new normal after half a window instead of a run that skips for ever. Which of the three leads differs: the update
norm often does, then the gradient norm, then the loss.

All ranks judge the same reduced numbers with the same arithmetic, so they agree without another collective.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from errors import UserError
from lowprec.engine import StepResult
from sections import SpikesConfig

RISE = {"loss": 0.05, "grad_norm": math.log(3), "update_norm": math.log(1.5)}  # nats; ratios
LOGARITHMIC = ("grad_norm", "update_norm")


class Window:
    """The last values of one quantity."""

    def __init__(self, length: int, name: str) -> None:
        self.values: deque[float] = deque(maxlen=length)
        self._length, self._name = length, name

    def score(self, value: float) -> float | None:
        """z of a value that is high enough above the median; None if it is not, or if there are too few values."""
        if len(self.values) < self._length // 2 or not math.isfinite(value):
            return None
        x = self._scaled(value)
        median = statistics.median(self.values)
        spread = 1.4826 * statistics.median(abs(v - median) for v in self.values)
        if x - median <= RISE[self._name]:
            return None
        return (x - median) / max(spread, 1e-9)

    def add(self, value: float) -> None:
        if math.isfinite(value) and (value > 0 or self._name not in LOGARITHMIC):
            self.values.append(self._scaled(value))

    def _scaled(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self._name in LOGARITHMIC else value


class SpikeGuard:
    """Judges every step; the same on all ranks.

    spikes:    quantity -> its z, of the last step
    unapplied: steps one after the other that were not applied, for whatever reason
    nonfinite: steps one after the other whose loss or gradient was not finite
    spiking:   steps one after the other with a spike
    furthest, rollbacks: the latest step that was rolled back, and how often the run has not got past it
    """

    def __init__(self, config: SpikesConfig) -> None:
        self.config = config
        self.spikes: dict[str, float] = {}
        self.unapplied = self.nonfinite = self.spiking = self.rollbacks = self.furthest = 0
        self._windows = {name: Window(config.window, name) for name in RISE}

    def judge(self, loss: float) -> Callable[[float], bool]:
        """What the optimizer asks, with the norm of its finite gradient, whether to apply a step of this mean loss."""
        self.spikes = {}

        def accept(grad_norm: float) -> bool:
            self._look({"loss": loss, "grad_norm": grad_norm})
            return math.isfinite(loss) and not (self.spikes and self.config.on_spike in ("skip", "rollback"))

        return accept

    def finish(self, loss: float, update: StepResult) -> None:
        """Take the step into the windows, after it was applied or not."""
        if update.update_norm is not None:
            self._look({"update_norm": update.update_norm})
        values = {"loss": loss, "grad_norm": update.grad_norm, "update_norm": update.update_norm}
        for name, value in values.items():
            if value is not None:
                self._windows[name].add(value)
        self.unapplied = self.unapplied + 1 if update.skipped else 0
        self.spiking = self.spiking + 1 if self.spikes else 0
        self.nonfinite = 0 if math.isfinite(loss) and math.isfinite(update.grad_norm) else self.nonfinite + 1

    def roll_back(self, step: int) -> None:
        """Count a rollback from `step`. Raises UserError where there were too many that did not get past it."""
        self.rollbacks = self.rollbacks + 1 if step <= self.furthest else 1
        self.furthest = max(step, self.furthest)
        if self.rollbacks > self.config.max_rollbacks:
            raise UserError(
                f"step {step} spiked ({self.describe()}) and {self.config.max_rollbacks} rollbacks did not get the run "
                f"past step {self.furthest}; go back further (--resume PATH), lower optimizer.lr, or set "
                "spikes.on_spike=skip"
            )

    def _look(self, values: Mapping[str, float]) -> None:
        if self.config.on_spike == "off":
            return
        scores = {name: self._windows[name].score(value) for name, value in values.items()}
        self.spikes |= {name: z for name, z in scores.items() if z is not None and z > self.config.threshold}

    def state(self) -> dict[str, Any]:
        """JSON-able, for a checkpoint: a resumed run must judge as if it had never stopped."""
        windows = {name: list(window.values) for name, window in self._windows.items()}
        counts = {"unapplied": self.unapplied, "nonfinite": self.nonfinite, "spiking": self.spiking}
        return {"windows": windows, "furthest": self.furthest, "rollbacks": self.rollbacks, **counts}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; empty: begin anew (a checkpoint of an earlier version)."""
        for name, window in self._windows.items():
            window.values.clear()
            window.values.extend(state.get("windows", {}).get(name, ()))
        self.unapplied, self.nonfinite = state.get("unapplied", 0), state.get("nonfinite", 0)
        self.spiking = state.get("spiking", 0)
        if (furthest := state.get("furthest", 0)) > self.furthest:  # not what a rollback has just counted
            self.furthest, self.rollbacks = furthest, state["rollbacks"]

    @property
    def wants_rollback(self) -> bool:
        """Whether so many steps have spiked that it is not the data of one of them."""
        return self.config.on_spike == "rollback" and self.spiking >= self.config.patience

    def describe(self) -> str:
        """The spikes of the last step in words."""
        words = {"loss": "loss", "grad_norm": "gradient norm", "update_norm": "update norm"}
        return ", ".join(f"{words[name]} {z:.1f}" for name, z in self.spikes.items())
