"""Preemption: a signal only sets a flag; the loop agrees on it over all ranks at the next step edge.

SIGTERM, SIGUSR1 and SIGUSR2 (what Slurm and torchrun send) ask for: finish the step, save, exit so that the job is
requeued. A second signal exits at once with 128 + its number.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: saved, start the same command again
INTERRUPTED = 128 + signal.SIGINT


class StopRequest:
    """`name` of the first signal that arrived, None so far. Install in the main thread of each rank."""

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
