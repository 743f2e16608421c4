"""What a person reads while a run trains: Megatron-format lines, or a live display on a terminal.

RUN/train.log always gets every message and the Megatron-format lines, appended over restarts.
Standard output gets the same lines, except on a terminal: there a live display (progress, loss,
speed) is redrawn in place and messages are printed above it.

The line is Megatron-LM's (`training_log` in megatron/training/training.py), read by many parsers:
same fields, order and widths. As there, it covers the steps since the last line: loss is the mean
over the steps that updated the weights (left out when there is none), time and throughput are
means, skipped and NaN steps are counted, the other fields are of the last step. `num zeros` is left
out, as Megatron-LM does unless asked for it.

The display is redrawn by `step` and never from a thread: no lock that a forked loader worker could
inherit, and no redrawing while the cores compute. It starts with the first step.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import TextIO

import rich.console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from report.metrics import AppendOnly, StepRecord, ValidationRecord

REDRAW_INTERVAL_S = 0.1  # no eye reads faster, and drawing costs about a millisecond


def megatron_line(records: Sequence[StepRecord], total_steps: int, global_batch: int, now: datetime) -> str:
    """Megatron-LM's log line for the steps in `records` (not empty); global_batch in sequences."""
    last = records[-1]
    seconds = sum(r.step_time_s for r in records)
    tflops = sum(r.tflops * r.step_time_s for r in records) / seconds if seconds else 0.0
    losses = [r.loss for r in records if not r.skipped and math.isfinite(r.loss)]
    fields = [
        f"iteration {last.step:8d}/{total_steps:8d}",
        f"consumed samples: {last.samples:12d}",
        f"elapsed time per iteration (ms): {1e3 * seconds / len(records):.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {tflops:.1f}",
        f"learning rate: {last.lr:.6E}",
        f"global batch size: {global_batch:5d}",
        *([f"lm loss: {math.fsum(losses) / len(losses):.6E}"] if losses else []),
        f"loss scale: {last.loss_scale:.1f}",
        f"grad norm: {last.grad_norm:.3f}",
        f"params norm: {last.param_norm:.3f}",
        f"number of skipped iterations: {sum(r.skipped for r in records):3d}",
        f"number of nan iterations: {sum(r.nan for r in records):3d}",
    ]
    return f" [{now:%Y-%m-%d %H:%M:%S.%f}] " + " | ".join(fields) + " |"


def megatron_validation_line(record: ValidationRecord) -> str:
    """Megatron-LM's validation line."""
    return (
        f" validation loss at iteration {record.step} | lm loss value: {record.validation_loss:.6E}"
        f" | lm loss PPL: {record.validation_ppl:.6E} |"
    )


class Console:
    """Lines to standard output and to RUN/train.log. A context manager: leaving it closes both.

    global_batch: sequences a step; log_interval: steps a Megatron line covers.
    """

    def __init__(self, run_dir: Path, global_batch: int, log_interval: int = 1, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._log = AppendOnly(run_dir / "train.log")
        self._global_batch = global_batch
        self._log_interval = log_interval
        self._interval: list[StepRecord] = []

    def message(self, text: str) -> None:
        """Say something once; it may have several lines."""
        self._write_log(text)
        self._print(text)

    def step(self, record: StepRecord, total_steps: int) -> None:
        """Report one step; a line follows at each multiple of log_interval and at the last step."""
        self._interval.append(record)
        if record.step % self._log_interval == 0 or record.step == total_steps:
            self._line(megatron_line(self._interval, total_steps, self._global_batch, datetime.now()))
            self._interval = []

    def validation(self, record: ValidationRecord) -> None:
        """Report one validation."""
        self._line(megatron_validation_line(record))

    def close(self) -> None:
        """Release the file; on a terminal, leave the display as it stands, cursor restored."""
        self._log.close()

    def _line(self, text: str) -> None:
        self._write_log(text)
        self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _write_log(self, text: str) -> None:
        self._log.write(text.encode() + b"\n")

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class LiveConsole(Console):
    """A live display on a terminal; lines go to RUN/train.log only.

    mfu_mark is written after MFU, for a peak that is not from the table of known devices.
    """

    def __init__(
        self,
        run_dir: Path,
        global_batch: int,
        log_interval: int = 1,
        stream: TextIO | None = None,
        mfu_mark: str = "",
    ) -> None:
        super().__init__(run_dir, global_batch, log_interval, stream)
        self._terminal = rich.console.Console(file=self._stream, highlight=False, markup=False)
        self._mfu_mark = mfu_mark
        self._live: Live | None = None
        self._last: tuple[StepRecord, int] | None = None  # latest step and the total
        self._first = (0, 0.0)  # step and clock at the first step seen: the base of the ETA
        self._drawn = -math.inf
        self._skipped = self._nan = 0
        self._validation = ""

    def step(self, record: StepRecord, total_steps: int) -> None:
        super().step(record, total_steps)
        self._skipped += record.skipped
        self._nan += record.nan
        self._last = (record, total_steps)
        if self._live is None:
            self._first = (record.step, time.monotonic())
            self._live = Live(console=self._terminal, auto_refresh=False)
            self._live.start()
        if time.monotonic() - self._drawn >= REDRAW_INTERVAL_S:
            self._draw()

    def validation(self, record: ValidationRecord) -> None:
        super().validation(record)
        self._validation = f"   validation {record.validation_loss:.4f} (step {record.step:,})"
        self._draw()

    def close(self) -> None:
        try:
            if self._live is not None:
                self._draw()
                self._live.stop()
                self._live = None
        finally:
            super().close()

    def _line(self, text: str) -> None:
        self._write_log(text)

    def _print(self, text: str) -> None:
        self._terminal.print(text, soft_wrap=True)

    def _draw(self) -> None:
        if self._live is not None and self._last is not None:
            self._drawn = time.monotonic()
            self._live.update(self._display(*self._last), refresh=True)

    def _display(self, record: StepRecord, total_steps: int) -> Table:
        first_step, first_time = self._first
        done = record.step - first_step
        # Time between steps, not time of steps: evaluation and saving count.
        pace = (self._drawn - first_time) / done if done else record.step_time_s
        eta = timedelta(seconds=round(pace * (total_steps - record.step)))
        mfu = "-" if record.mfu is None else f"{record.mfu:.1%}{self._mfu_mark}"
        bad = f"   skipped {self._skipped}   nan {self._nan}" if self._skipped or self._nan else ""
        progress = Table.grid(padding=(0, 2))
        progress.add_row(
            f"step {record.step:,}/{total_steps:,}",
            ProgressBar(total=total_steps, completed=record.step, width=30),
            f"ETA {eta}",
        )
        display = Table.grid()
        display.add_row(progress)
        display.add_row(
            f"loss {record.loss:.4f}{self._validation}   lr {record.lr:.3g}   grad norm {record.grad_norm:.3f}{bad}"
        )
        display.add_row(
            f"{record.tokens_per_s:,.0f} tokens/s   MFU {mfu}"
            f"   {record.tflops:.3g} TFLOP/s a device   memory {record.mem_gib:.2f} GiB"
        )
        return display


def open_console(run_dir: Path, global_batch: int, log_interval: int = 1, mfu_mark: str = "") -> Console:
    """The live display where standard output is a terminal that can redraw, else plain lines."""
    if sys.stdout.isatty() and not rich.console.Console().is_dumb_terminal:
        return LiveConsole(run_dir, global_batch, log_interval, mfu_mark=mfu_mark)
    return Console(run_dir, global_batch, log_interval)
