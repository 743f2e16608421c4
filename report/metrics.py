"""metrics.jsonl: the one record of a run that is always written.

One JSON object a line, written with one system call and therefore whole, unless the process is
killed inside that call. `kind` says what a line is:

    {"kind": "step", "step": 7, "tokens": 28672, "samples": 112, "loss": 6.1, ..., "mfu": 0.41, ...}
    {"kind": "validation", "step": 7, ..., "validation_loss": 6.2, "validation_ppl": 492.7, ...}

Floats keep every digit, so two runs can be compared bit by bit. JSON has no NaN and no infinity: a
non-finite float is written as null, and `nan` of a step says that its loss or gradient was not
finite.

A run that resumes at step N repeats the steps after N. Their old lines move to
metrics.discarded.jsonl, and metrics.jsonl is replaced by rename, so that it always holds each step
once, in order. What cannot be parsed (a line torn by a kill) moves as {"kind": "torn", "text":
...}. A kill between the two files repeats lines in the discarded file; it loses none.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from errors import UserError

PPL_LOSS_LIMIT = 20.0  # perplexity is exp(min(loss, 20)), as in Megatron-LM: exp(710) has no float


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is recorded besides metrics.jsonl and train.log, which are always written.

    log_interval: steps between two Megatron-format lines; each is the mean over its interval.
    tensorboard: also write TensorBoard events to RUN/tensorboard (needs the package tensorboard).
    wandb: also write a Weights & Biases run, offline unless WANDB_MODE is set (needs wandb).
    wandb_project: project of that run.
    """

    log_interval: int = 1
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "lowprec"

    def problems(self) -> list[str]:
        """Messages for invalid values; empty when all are valid."""
        found = []
        if self.log_interval < 1:
            found.append(f"log_interval is {self.log_interval}; it must be 1 or more steps")
        if self.wandb and not self.wandb_project:
            found.append("wandb_project is empty; name the project, or set wandb: false")
        return found


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step; step, tokens and samples count from the start of training, it included.

    loss: mean cross-entropy in nats a token over the global batch. tokens_per_s is global; tflops
    (1e12 model FLOP/s) and mfu (fraction of the peak; None when the peak is wrong) are per device.
    nan: the loss or the gradient was not finite; skipped: the weights were not updated. sent_bytes: of gradients and
    updated weights, by rank 0. edq (effective descent quality over its ideal, Collage) and lost_updates (share of the
    weights that should have moved and did not) are None where weights have FP32 or scaled FP16 masters. update_norm: of
    the change of all weights; None where it was not measured, or nothing was updated.
    """

    step: int
    tokens: int
    samples: int
    loss: float
    lr: float
    grad_norm: float
    param_norm: float
    loss_scale: float
    skipped: bool
    nan: bool
    step_time_s: float
    tokens_per_s: float
    tflops: float
    mfu: float | None
    mem_gib: float
    sent_bytes: int = 0
    edq: float | None = None
    lost_updates: float | None = None
    update_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """One evaluation after `step`; `extra` holds further values of it by name, written beside."""

    step: int
    tokens: int
    samples: int
    validation_loss: float
    extra: Mapping[str, float | int | str | bool | None] = field(default_factory=dict)

    @property
    def validation_ppl(self) -> float:
        """exp(min(validation_loss, 20)); NaN stays NaN."""
        return math.exp(min(self.validation_loss, PPL_LOSS_LIMIT))


class AppendOnly:
    """A file that grows by whole writes: no buffer to lose, and a full disk is a UserError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)
        except OSError as error:
            raise self._failure(error) from error

    def write(self, data: bytes) -> None:
        """Append `data`; raises UserError where not all of it can be written."""
        try:
            if self._file.write(data) != len(data):  # only for want of space
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Close; further writes are errors."""
        self._file.close()

    def _failure(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {self.path}: {error.strerror}; make room or mend the permissions, then "
            "start the same command again: it resumes"
        )


class MetricsWriter:
    """Appends records to RUN/metrics.jsonl. Make one, on one rank, after the checkpoint is chosen.

    start_step: the step resumed from, 0 for a fresh run; every line after it is moved away first.
    name: of another file of records that is kept in the same way, without its suffix.
    `discarded` counts the lines moved.
    """

    def __init__(self, run_dir: Path, start_step: int = 0, name: str = "metrics") -> None:
        path = run_dir / f"{name}.jsonl"
        self.discarded = _discard_after(path, start_step) if path.exists() else 0
        self._out = AppendOnly(path)

    def step(self, record: StepRecord) -> None:
        """Write one step; it is in the file when this returns."""
        self._write({"kind": "step", **asdict(record)})

    def validation(self, record: ValidationRecord) -> None:
        """Write one validation; it is in the file when this returns."""
        values: dict[str, object] = {"kind": "validation", **asdict(record)}
        values["validation_ppl"] = record.validation_ppl
        del values["extra"]
        assert not values.keys() & record.extra.keys(), f"a field is shadowed by {record.extra}"
        self._write({**values, **record.extra})

    def note(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """Write another kind of record about `step`."""
        self._write({"kind": kind, "step": step, **values})

    def notes(self, step: int, records: Sequence[Mapping[str, object]]) -> None:
        """Write several records about `step` at once; each has its kind."""
        self._out.write(b"".join(_line({"kind": record["kind"], "step": step, **record}) for record in records))

    def _write(self, values: Mapping[str, object]) -> None:
        self._out.write(_line(values))

    def close(self) -> None:
        """Close the file."""
        self._out.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _line(values: Mapping[str, object]) -> bytes:
    strict = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    return json.dumps(strict, allow_nan=False).encode() + b"\n"


def _discard_after(path: Path, start_step: int) -> int:
    """Keep the records of steps <= start_step in `path`; append the rest to the discarded file."""
    partial = path.with_suffix(".jsonl.tmp")
    dropped: list[bytes] = []
    try:
        with open(path, "rb") as lines, open(partial, "wb") as kept:
            for line in lines:
                step = _step_of(line)
                if step is None:
                    text = line.decode(errors="replace").rstrip("\n")
                    dropped.append(_line({"kind": "torn", "text": text}))
                elif step > start_step:
                    dropped.append(line.rstrip(b"\n") + b"\n")
                else:
                    kept.write(line.rstrip(b"\n") + b"\n")  # the newline may be torn off
            _sync(kept)
        if dropped:
            with open(path.with_name(f"{path.stem}.discarded.jsonl"), "ab") as discarded:
                discarded.writelines(dropped)
                _sync(discarded)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"cannot rewrite {path} for a resume at step {start_step}: {error.strerror}; make room "
            "or mend the permissions, then start again: no line is lost"
        ) from error
    return len(dropped)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _step_of(line: bytes) -> int | None:
    """Step of a record, None for a line that is not one."""
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError and JSONDecodeError
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None
