"""Preemption: a signal only leaves a request; the loop agrees on it over all ranks at the next step edge.

SIGTERM, SIGUSR1 and SIGUSR2 (what Slurm and torchrun send) ask for: finish the step, save, exit so that the job is
requeued. So does the end of the job's time. A second signal exits at once with 128 + its number.

The signals are blocked in the main thread and taken by a thread of their own. That makes three things right:
* a second signal works while the main thread hangs in a collective, where no Python handler would run;
* a signal that came before there was a `StopRequest` (slurm/node.py blocks them, too) is not lost but pending;
* child processes (encoders of data, compilers and their workers) inherit the mask, and so ignore what Slurm sends to
  every process of a job; the run stops them itself, or their pipes end.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import threading
import time
from types import FrameType

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: saved, start the same command again
HUNG = 124  # what timeout(1) says: the watchdog ended the process
INTERRUPTED = 128 + signal.SIGINT
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Why this process should stop. Make one in the main thread of each rank, before it starts other processes.

    deadline: seconds since the epoch from which on the run should stop; None: never. Clocks of nodes differ: whichever
    rank's comes first stops all of them.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.name: str | None = None
        self._deadline = deadline
        for number in STOP_SIGNALS:  # for a thread of some library that was started before and blocks nothing
            signal.signal(number, self._receive)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop; None: it does not."""
        if self.name is not None:
            return f"received {self.name}"
        if self._deadline is not None and time.time() >= self._deadline:
            return "the job's time is nearly over"
        return None

    def _wait(self) -> None:
        while True:
            self._receive(signal.sigwait(STOP_SIGNALS), None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            os._exit(128 + number)
        self.name = signal.Signals(number).name


def stop_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the one that started it dies (Linux; else nothing).

    torchrun starts workers in sessions of their own: without this they would train on after their agent was killed.
    """
    if platform.system() == "Linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM), 0, 0, 0)
