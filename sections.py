"""Sections of a recipe that configure the run as a whole: where it writes, how long, at which rate, what it validates.

The other sections' dataclasses live beside the code that they configure; recipe.py puts all of them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run writes, and when it makes way.

    dir:           the run's directory (`{name}` is the recipe's name): metrics, log, checkpoints
    stop_before_s: under Slurm: seconds before the job's end at which the run saves and stops, to be continued by the
                   next job; more than a step and a save take
    """

    dir: str = "runs/{name}"
    stop_before_s: int = 120

    def problems(self) -> list[str]:
        found = [] if self.dir else ["dir is empty; name a directory"]
        if self.stop_before_s < 1:
            found.append(f"stop_before_s is {self.stop_before_s}; it must be at least 1 second")
        return found


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is noticed while a run goes on (run/watchdog.py, run/stragglers.py).

    hang_factor:      a rank that has waited for its step for this many median steps writes down the stacks of all its
                      threads and ends with code 124; 0: never
    hang_least_s:     but not before so many seconds, which a save, a validation or a compilation may take
    straggler_every:  steps between comparisons of the ranks' step times; 0: never
    straggler_factor: a rank that takes so many times the median is named
    """

    hang_factor: float = 20.0
    hang_least_s: float = 600.0
    straggler_every: int = 100
    straggler_factor: float = 1.3

    def problems(self) -> list[str]:
        found = []
        if self.hang_factor and self.hang_factor < 2:
            found.append(f"hang_factor is {self.hang_factor}; it must be at least 2 medians, or 0 for never")
        if self.hang_least_s <= 0:
            found.append(f"hang_least_s is {self.hang_least_s}; it must be above 0 seconds")
        if self.straggler_every < 0:
            found.append(f"straggler_every is {self.straggler_every}; use a number of steps, or 0 for never")
        if self.straggler_factor <= 1:
            found.append(f"straggler_factor is {self.straggler_factor}; it must be above 1")
        return found


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and seed of the run.

    steps:        optimizer steps of the whole run
    stop_at:      stop after this step as if preempted: save, then exit with 75
    global_batch: sequences a step, over all ranks and micro-batches
    micro_batch:  sequences a forward on one rank
    seq_len:      tokens a sequence
    seed:         of the initial weights and of the data order
    z_loss:       weight of the mean squared log-partition function (PaLM, arXiv 2204.02311, uses 1e-4; 0: off)
    compile:      torch.compile the blocks and the loss; auto: where a C++ compiler is found and ZeRO leaves the
                  weights whole (stages 0-2)
    """

    steps: int
    stop_at: int | None = None
    global_batch: int
    micro_batch: int
    seq_len: int
    seed: int = 0
    z_loss: float = 0.0
    compile: bool | Literal["auto"] = "auto"

    def problems(self) -> list[str]:
        sizes = ("steps", "global_batch", "micro_batch", "seq_len")
        found = [f"{key} is {getattr(self, key)}; it must be at least 1" for key in sizes if getattr(self, key) < 1]
        if self.stop_at is not None and not 1 <= self.stop_at <= self.steps:
            found.append(f"stop_at is {self.stop_at}; it must be between 1 and train.steps ({self.steps})")
        if self.z_loss < 0:
            found.append(f"z_loss is {self.z_loss}; it must not be negative")
        if not found and self.global_batch % self.micro_batch:
            found.append(f"global_batch {self.global_batch} is not divisible by train.micro_batch {self.micro_batch}")
        return found


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the run, as a factor of optimizer.lr.

    kind:   constant, linear or cosine (from the end of the warm-up to the last step), or wsd: warm-up, stable,
            linear decay over the last part
    warmup: length of the linear warm-up: steps, or a fraction of train.steps if below 1
    decay:  wsd only: length of the decay, likewise
    final:  factor at the last step
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "wsd"
    warmup: float = 0.02
    decay: float = 0.2
    final: float = 0.1

    def problems(self) -> list[str]:
        found = [
            f"{key} is {getattr(self, key)}; it must not be negative"
            for key in ("warmup", "decay")
            if getattr(self, key) < 0
        ]
        if not 0 <= self.final <= 1:
            found.append(f"final is {self.final}; it must be in [0, 1]")
        return found


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation during the run.

    interval: steps between validations; the last step is validated too (0: never)
    samples:  validation sequences each time (the first ones, in order; null: all)
    bigram:   at the end, print the cross-entropy of an interpolated bigram model on the same tokens
    """

    interval: int = 0
    samples: int | None = None
    bigram: bool = False

    def problems(self) -> list[str]:
        found = []
        if self.interval < 0:
            found.append(f"interval is {self.interval}; use a number of steps, or 0 for never")
        if self.samples is not None and self.samples < 1:
            found.append(f"samples is {self.samples}; it must be at least 1, or null for all")
        if self.bigram and (not self.interval or self.samples):
            found.append("bigram is true; it needs eval.interval above 0 and eval.samples null, all validation tokens")
        return found

    def due(self, step: int, last_step: int) -> bool:
        """Whether to validate after `step` of a run that ends with `last_step`."""
        return self.interval > 0 and (step % self.interval == 0 or step == last_step)


@dataclass(frozen=True, kw_only=True)
class SpikesConfig:
    """Steps that went wrong. One whose loss or gradient is not finite is skipped on all ranks, whatever this says.

    on_spike:      what happens where loss, gradient norm or update norm is far above its recent values (run/spikes.py):
                   off: nothing is looked at
                   warn: it is said and recorded
                   skip: the step is not applied (an update norm, known afterwards, is only said)
                   rollback: the step is not applied; after `patience` such steps the run goes back to its newest valid
                   checkpoint and on with the data after them
    threshold:     robust standard deviations above the median
    window:        steps before, whose median and spread count; a step is judged once half of them are there
    patience:      spikes one after the other until a rollback: a single one is of the data, and was not applied
    update_norm:   measure the norm of each update, a leading sign of spikes
    max_skipped:   the run ends with an error after so many steps one after the other that were not applied
    max_rollbacks: and where so many rollbacks did not get it past the step that spiked
    diagnose:      repeat the first of such non-finite steps to name the module and GEMM that it came from
    """

    on_spike: Literal["off", "warn", "skip", "rollback"] = "warn"
    threshold: float = 6.0
    window: int = 128
    patience: int = 3
    update_norm: bool = True
    max_skipped: int = 100
    max_rollbacks: int = 3
    diagnose: bool = True

    def problems(self) -> list[str]:
        found = []
        if not self.threshold > 0:
            found.append(f"threshold is {self.threshold}; it must be above 0 (6 is usual)")
        if self.window < 16:
            found.append(f"window is {self.window}; a median and a spread need at least 16 steps")
        return found + [
            f"{key} is {getattr(self, key)}; it must be at least 1"
            for key in ("patience", "max_skipped", "max_rollbacks")
            if getattr(self, key) < 1
        ]


def in_steps(length: float, steps: int) -> int:
    """A length of a schedule in steps: itself, or a fraction of the run if below 1."""
    return round(length * steps) if length < 1 else round(length)
