"""Learning-rate schedules as pure functions of the step: a resume needs the step and nothing else.

    constant  1                                        after the warm-up
    linear    1 -> final, straight
    cosine    final + (1 - final) (1 + cos(pi p)) / 2
    wsd       1, then 1 -> final straight over the last `decay` steps (arXiv 2404.06395)

Steps count from 0; the warm-up rises as (step + 1) / warmup, as in Megatron-LM, so that no step has rate 0, and the
last step has exactly `final`.
"""

from __future__ import annotations

import math

from sections import ScheduleConfig, in_steps


def lr_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Factor of the peak learning rate for `step` (0-based) of a run of `steps`."""
    warmup = in_steps(config.warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "constant":
        return 1.0
    begin = max(warmup, steps - in_steps(config.decay, steps)) if config.kind == "wsd" else warmup
    if step < begin:
        return 1.0
    progress = (step - begin + 1) / (steps - begin)
    falling = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return config.final + (1 - config.final) * falling
