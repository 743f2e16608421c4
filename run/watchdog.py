"""A run that hangs says where, on every rank, and ends, so that whoever started it can start it again.

A rank that died is noticed by the others' collectives. One that stands still (a stopped process, a file system that
does not answer, a deadlock) is not, until a collective's timeout, which must be long. Each rank's watchdog knows how
long steps take here. When nothing has been done for many times that long it writes the stacks of all threads to
RUN/stacks/rank-00003.txt, waits until the other ranks' watchdogs, which see the same, have done so too, and ends the
process with code 124.

    limit = max(hang_least_s, hang_factor x median step, 2 x the longest of the steps, saves and validations so far)

Before three steps are done it is parallel.timeout_s. Time in which the whole process was stopped (a suspended job)
does not count. A hang that also holds Python's interpreter lock (a mapped file whose disk is gone) leaves this thread
no say: then `faulthandler` writes the stacks to stderr, and the other ranks end the run.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from datetime import datetime
from pathlib import Path

from run import exits
from run.signals import HUNG
from sections import WatchConfig

FOLDER = "stacks"
GRACE_S = 5.0  # for the other ranks' watchdogs
POLL_S = 1.0
REMEMBERED = 200  # steps whose median counts
MEASURED = 3  # steps before their median does; the first one compiles


class Watchdog:
    """Of one rank. `start` it before the first step, `beat` after all that a run does, `stop` it at the end."""

    def __init__(self, config: WatchConfig, run_dir: Path, rank: int, first_limit_s: float) -> None:
        self._config, self._run_dir, self._rank, self._first_limit_s = config, run_dir, rank, first_limit_s
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._last, self._longest = time.monotonic(), 0.0
        self._step, self._compiled = 0, False
        self._stopped = threading.Event()

    def start(self, step: int) -> None:
        """The run stands after `step` steps and goes on now."""
        if self._config.hang_factor:
            self._step, self._last = step, time.monotonic()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int) -> None:
        """A step was done if `step` is another one than at the last beat, else something between two steps."""
        now = time.monotonic()
        taken, self._last = now - self._last, now
        if step == self._step or self._compiled:
            self._longest = max(self._longest, taken)
        if step != self._step:
            if self._compiled:
                self._steps.append(taken)
            self._step, self._compiled = step, True
        if self._config.hang_factor and not self._stopped.is_set():
            faulthandler.dump_traceback_later(self.limit_s() + 2 * GRACE_S)

    def limit_s(self) -> float:
        """Seconds without a beat that are a hang."""
        if len(self._steps) < MEASURED:
            return max(self._config.hang_least_s, self._first_limit_s)
        usual = self._config.hang_factor * statistics.median(self._steps)
        return max(self._config.hang_least_s, usual, 2 * self._longest)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stopped.wait(POLL_S):
            now = time.monotonic()
            if now - looked > POLL_S + GRACE_S:  # this thread did not run, either: the process was stopped
                self._last += now - looked - POLL_S
            looked = now
            last = self._last  # read once: a beat may come in between
            if now - last > self.limit_s():
                self._bark(last)
                looked = time.monotonic()

    def _bark(self, since: float) -> None:
        """Write the stacks down; end the process unless it went on meanwhile."""
        waited, limit = time.monotonic() - since, self.limit_s()
        what = f"no progress for {waited:.0f} s (limit {limit:.0f} s) after step {self._step}; stacks in {FOLDER}/"
        print(f"rank {self._rank}: {what}", file=sys.stderr, flush=True)
        # Another thread: the disk of the run directory may be what does not answer.
        threading.Thread(target=self._write_stacks, args=(what,), daemon=True).start()
        time.sleep(GRACE_S)
        if self._last != since or self._stopped.is_set():
            print(f"rank {self._rank}: it went on after all", file=sys.stderr, flush=True)
            return
        recorder = threading.Thread(target=exits.record, args=(self._run_dir, HUNG, what, self._rank), daemon=True)
        recorder.start()
        recorder.join(GRACE_S)
        os._exit(HUNG)

    def _write_stacks(self, what: str) -> None:
        try:
            folder = self._run_dir / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank-{self._rank:05d}.txt", "a") as file:
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} rank {self._rank}: {what}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            print(f"rank {self._rank}: cannot write its stacks: {error.strerror}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
