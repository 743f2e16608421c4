"""Everything that a run writes for people and tools: on rank 0; the other ranks hold a `Records` that is silent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from errors import UserError
from lowprec.engine import StepResult
from lowprec.policy import brief
from recipe import POLICIES, Recipe, policy_file, to_dict, to_yaml
from report.console import Console, open_console
from report.flops import Peak, mfu
from report.manifest import Start, record_start
from report.memory import peak_gib
from report.metrics import MetricsWriter, StepRecord, ValidationRecord
from report.sinks import Sink, open_sinks, step_scalars, validation_scalars
from run.stragglers import Report


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What turns a step's time into rates. flops_per_token: training FLOPs; devices: ranks, node_size of a node."""

    flops_per_token: float
    peak: Peak
    devices: int
    device: torch.device
    node_size: int = 1


class Records:
    """metrics.jsonl, log lines or live display, sinks, manifest; open on rank 0, a no-op elsewhere."""

    def __init__(self, recipe: Recipe, scale: Scale):
        self._recipe, self.scale = recipe, scale
        self._close = ExitStack()
        self._console: Console | None = None
        self._metrics: MetricsWriter | None = None
        self._probe: MetricsWriter | None = None
        self._sinks: list[Sink] = []
        self._opened: tuple[Start, str] | None = None
        self._refuted = False

    @property
    def peak_flops(self) -> float:
        """Peak FLOP/s of one device, which MFU refers to."""
        return self.scale.peak.flops

    def open(self, start: Start, samples: int, wandb_mode: str) -> None:
        """Start writing at `start.step`; lines of later steps move to metrics.discarded.jsonl. Rank 0 only."""
        run_dir, config = Path(self._recipe.run.dir), self._recipe.metrics
        self._opened = start, wandb_mode
        write_resolved(run_dir, self._recipe)
        record_start(run_dir, start, self.scale.device)
        self._metrics = self._close.enter_context(MetricsWriter(run_dir, start.step))
        if self._recipe.probe.on:
            self._probe = self._close.enter_context(MetricsWriter(run_dir, start.step, "probe"))
        self._sinks = open_sinks(
            config,
            run_dir,
            recipe=to_dict(self._recipe),
            start_step=start.step,
            start_samples=samples,
            wandb_mode=wandb_mode,
        )
        for sink in self._sinks:
            self._close.callback(sink.close)
        mark = "*" if self.scale.peak.guessed else ""
        self._console = self._close.enter_context(
            open_console(run_dir, self._recipe.train.global_batch, config.log_interval, mark)
        )

    def rewind(self, step: int, samples: int) -> None:
        """Go on at an earlier step, as a start that resumes there would."""
        if self._opened is not None:
            start, wandb_mode = self._opened
            self._close.close()
            self.open(dataclasses.replace(start, step=step), samples, wandb_mode)

    def message(self, text: str) -> None:
        if self._console:
            self._console.message(text)

    def event(self, kind: str, step: int, text: str, values: Mapping[str, object]) -> None:
        """Something that happened to a step: for people, and as a record of this kind in metrics.jsonl."""
        if self._console and self._metrics:
            self._console.message(f"step {step}: {text}")
            self._metrics.note(kind, step, values)

    def probe(
        self,
        step: int,
        samples: int,
        records: Sequence[Mapping[str, object]],
        scalars: Mapping[str, float],
        text: str | None,
    ) -> None:
        """A sample of the numerics: records for probe.jsonl, scalars for the sinks, a line for people."""
        if self._console and self._probe:
            self._probe.notes(step, records)
            self._send(scalars, step, samples)
            if text is not None:
                self._console.message(f"step {step}: {text}")

    def step(self, record: StepRecord) -> None:
        if not (self._console and self._metrics):
            return
        self._metrics.step(record)
        self._console.step(record, self._recipe.train.steps)
        self._send(step_scalars(record, self._recipe.train.global_batch), record.step, record.samples)
        if record.mfu is None and not self._refuted:
            self._refuted = True
            self._console.message(self.scale.peak.refuted_by(record.tflops * 1e12) or "")

    def receipt(self, step: int, gemms: Mapping[str, int], unquantized: Sequence[str]) -> None:
        """What the GEMMs of this process' first step really ran in, and the linears that are not quantized at all."""
        if self._console and self._metrics:
            self._metrics.note("receipt", step, {"gemms": dict(gemms), "unquantized": list(unquantized)})
            lines = [f"  {count:6d} {gemm}" for gemm, count in gemms.items()]
            lines += [f"  {len(unquantized)} linears not quantized: {brief(unquantized)}"] if unquantized else []
            self._console.message("\n".join([f"GEMMs of step {step}:", *lines]))

    def memory(self, step: int, held: Mapping[str, int], parameters: int) -> None:
        """Bytes that this rank's tensors held in the first step, and those bytes a parameter of the model."""
        if self._console and self._metrics:
            self._metrics.note("memory", step, {"bytes": dict(held), "parameters": parameters})
            parts = (f"{name} {count / parameters:.3f}" for name, count in held.items() if count)
            self._console.message(f"bytes a parameter on rank 0, of {parameters:,}: {', '.join(parts)}")

    def stragglers(self, step: int, report: Report) -> None:
        """Seconds of each rank's own part of the steps up to `step`; the slow ones are named."""
        if self._console and self._metrics:
            seconds = [round(each, 6) for each in report.seconds]
            self._metrics.note("stragglers", step, {"seconds": seconds, "slow": sorted(report.slow)})
            if report.slow:
                self._console.message(report.describe(self.scale.node_size))

    def skipped(self, step: int, samples: int) -> None:
        """So many samples were left out since this start, because their tokens are damaged (data.corrupt=skip)."""
        if self._console and self._metrics:
            self._metrics.note("skipped_samples", step, {"samples": samples})
            self._console.message(f"step {step}: {samples} damaged samples left out so far, others taken instead")

    def validation(self, record: ValidationRecord) -> None:
        if self._console and self._metrics:
            self._metrics.validation(record)
            self._console.validation(record)
            self._send(validation_scalars(record), record.step, record.samples)

    def close(self) -> None:
        self._close.close()

    def step_record(
        self, *, step: int, samples: int, loss: float, lr: float, update: StepResult, norm: float, seconds: float
    ) -> StepRecord:
        """The record of one step, rates and memory included."""
        train, scale = self._recipe.train, self.scale
        tokens_per_s = train.global_batch * train.seq_len / seconds
        per_device = tokens_per_s / scale.devices
        return StepRecord(
            step=step,
            tokens=samples * train.seq_len,
            samples=samples,
            loss=loss,
            lr=lr,
            grad_norm=update.grad_norm,
            param_norm=norm,
            loss_scale=1.0,
            skipped=update.skipped,
            nan=not (math.isfinite(update.grad_norm) and math.isfinite(loss)),
            step_time_s=seconds,
            tokens_per_s=tokens_per_s,
            tflops=per_device * scale.flops_per_token / 1e12,
            mfu=mfu(scale.flops_per_token, per_device, scale.peak),
            mem_gib=peak_gib(scale.device),
            sent_bytes=update.sent_bytes,
            edq=update.edq,
            lost_updates=update.lost,
            update_norm=update.update_norm,
        )

    def _send(self, values: Mapping[str, float], step: int, samples: int) -> None:
        for sink in self._sinks:
            sink.scalars(values, step, samples)


def write_resolved(run_dir: Path, recipe: Recipe) -> None:
    """RUN/resolved.yaml: every key of the run, the defaults included; and the policy, if it is a file of the user's."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (policy := policy_file(recipe.precision.policy)).parent != POLICIES:
            kept = run_dir / "policy.yaml"
            text = policy.read_bytes()  # before: it may be the very file
            kept.write_bytes(text)
            precision = dataclasses.replace(recipe.precision, policy=str(kept.resolve()))
            recipe = dataclasses.replace(recipe, precision=precision)
        partial = run_dir / "resolved.yaml.tmp"
        partial.write_text(f"# Resolved from the recipe {recipe.name}; `--recipe` takes this file.\n{to_yaml(recipe)}")
        partial.replace(run_dir / "resolved.yaml")
    except OSError as error:
        raise UserError(f"cannot write to run directory {run_dir}: {error.strerror}; choose another run.dir") from None
