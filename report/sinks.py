"""TensorBoard and Weights & Biases under Megatron-LM's scalar names: existing dashboards work.

Every scalar is written twice: against the step, and with the suffix " vs samples" against consumed
samples.

    lm loss, learning-rate, batch-size, loss-scale, grad-norm, params-norm, iteration-time (s),
    throughput (TFLOP/s a device), lm loss validation, lm loss validation ppl

TensorBoard on resume: `purge_step` hides what a run wrote from that step on, whatever the tag. A
sample count read as a step would be hidden as well, so each axis has its own writer: tensorboard/
and tensorboard/samples/. W&B on resume: steps of one W&B run cannot go back, so each start is a run
of its own; the run directory is their group.

Names: Megatron-LM `training_log` and `evaluate_and_print_results` in megatron/training/training.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from errors import UsageError
from report.metrics import MetricsConfig, StepRecord, ValidationRecord

VS_SAMPLES = " vs samples"


class Sink(Protocol):
    """Somewhere that scalars go: names and values at a step and a sample count."""

    def scalars(self, values: Mapping[str, float], step: int, samples: int) -> None: ...

    def close(self) -> None: ...


def step_scalars(record: StepRecord, global_batch: int) -> dict[str, float]:
    """A step under Megatron-LM's names; `global_batch` in sequences."""
    return {
        "lm loss": record.loss,
        "learning-rate": record.lr,
        "batch-size": global_batch,
        "loss-scale": record.loss_scale,
        "grad-norm": record.grad_norm,
        "params-norm": record.param_norm,
        "iteration-time": record.step_time_s,
        "throughput": record.tflops,
    }


def validation_scalars(record: ValidationRecord) -> dict[str, float]:
    """A validation under Megatron-LM's names."""
    return {
        "lm loss validation": record.validation_loss,
        "lm loss validation ppl": record.validation_ppl,
    }


class TensorBoard:
    """Events under RUN/tensorboard; what an earlier start wrote after `start_step` is hidden."""

    def __init__(self, run_dir: Path, start_step: int, start_samples: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        root = run_dir / "tensorboard"
        self._by_step = SummaryWriter(str(root), purge_step=start_step + 1, flush_secs=10)
        self._by_samples = SummaryWriter(str(root / "samples"), purge_step=start_samples + 1, flush_secs=10)

    def scalars(self, values: Mapping[str, float], step: int, samples: int) -> None:
        for name, value in values.items():
            self._by_step.add_scalar(name, value, step)
            self._by_samples.add_scalar(name + VS_SAMPLES, value, samples)

    def close(self) -> None:
        self._by_step.close()
        self._by_samples.close()


class WandB:
    """One W&B run a start; `mode` is W&B's own (offline, online, disabled)."""

    def __init__(self, run_dir: Path, project: str, mode: str, recipe: Mapping[str, Any]) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise _missing("wandb") from error
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project=project, group=run_dir.name, dir=str(run_dir), mode=mode, config=dict(recipe))
        self._defined: set[str] = set()

    def scalars(self, values: Mapping[str, float], step: int, samples: int) -> None:
        for name in values.keys() - self._defined:  # the twin's axis; W&B keeps the step itself
            self._run.define_metric(name + VS_SAMPLES, step_metric="samples")
            self._defined.add(name)
        twins = {name + VS_SAMPLES: value for name, value in values.items()}
        self._run.log({**values, **twins, "samples": samples}, step=step)

    def close(self) -> None:
        self._run.finish()


def open_sinks(
    config: MetricsConfig,
    run_dir: Path,
    *,
    recipe: Mapping[str, Any],
    start_step: int = 0,
    start_samples: int = 0,
    wandb_mode: str = "offline",
) -> list[Sink]:
    """The sinks that `config` asks for, on the rank that records.

    start_step, start_samples: position that the run resumes at (0 for a fresh run). wandb_mode: the
    environment's WANDB_MODE where it is set. Raises UsageError for a package that is not installed.
    """
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(TensorBoard(run_dir, start_step, start_samples))
    if config.wandb:
        sinks.append(WandB(run_dir, config.wandb_project, wandb_mode, recipe))
    return sinks


def _missing(package: str) -> UsageError:
    return UsageError(
        f"metrics.{package} is true but the package {package} cannot be imported; "
        f"pip install {package}, or set metrics.{package}=false (metrics.jsonl is always written)"
    )
