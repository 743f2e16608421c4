"""A run between two steps: what the training loop holds, and what it asks of it."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.baseline import interpolated_bigram_cross_entropy
from data.loader import Data
from data.stream import Batch
from errors import CheckpointError
from lowprec.apply import Precision
from lowprec.engine import Engine, StepResult
from lowprec.fragments import Fragment
from parallel import checkpoint
from parallel.mesh import Mesh
from parallel.saver import Saver
from recipe import Recipe, to_dict
from report.metrics import StepRecord, ValidationRecord
from run.evaluation import Replayed, validation_loss
from run.exits import CLOSED
from run.local import Local, stage_layers
from run.probing import Prober
from run.records import Records
from run.schedules import lr_factor
from run.signals import StopRequest
from run.spikes import SpikeGuard
from run.stragglers import Stragglers
from run.watchdog import Watchdog

log = logging.getLogger(__name__)

AMAX = "amax"  # kind of the tensors of delayed scaling in a checkpoint; another policy may not have them


@dataclass
class Run:
    """`step` steps and `samples` sequences are done: the position of everything, and the only one."""

    recipe: Recipe
    mesh: Mesh
    device: torch.device
    data: Data
    local: Local
    records: Records
    saver: Saver
    signals: StopRequest
    watchdog: Watchdog
    stragglers: Stragglers
    step: int = 0
    samples: int = 0
    stop_agreed: bool = False
    validated: float | None = None
    skipped: int = 0  # damaged samples that were left out since this start
    receipted: bool = False  # whether this process has said what its first step ran in
    guard: SpikeGuard = field(init=False)
    prober: Prober | None = field(init=False)

    def __post_init__(self) -> None:
        self.guard = SpikeGuard(self.recipe.spikes)
        self.prober = Prober(self) if self.recipe.probe.on else None

    @property
    def engine(self) -> Engine:
        return self.local.engine

    @property
    def precision(self) -> Precision:
        return self.local.precision

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # after an error, others may never come to a collective again
            self.watchdog.stop()  # a save behind training may take longer than any step; its agreements have timeouts
            self.saver.finish()
        self.records.close()
        if error is None:
            try:
                dist.barrier()
            except RuntimeError as ending:
                # Who is through may close its connections before the others are. All is saved and said by now.
                if not any(sign in str(ending) for sign in CLOSED):
                    raise
                log.info("another rank has left: %s", ending)
            dist.destroy_process_group()

    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.recipe.optimizer.lr * lr_factor(self.recipe.schedule, self.step, self.recipe.train.steps)

    def begin_step(self) -> None:
        """The precision of the next step: quantized copies of the weights as they are now, perhaps a new phase."""
        if news := self.precision.begin_step(self.step):
            self.records.message(news)

    def micro_batches(self) -> Iterator[tuple[int, Batch]]:
        """This rank's micro-batches of the next step, each with the global row of its first token.

        They are dealt out over the data-parallel ranks as Megatron-LM does.
        """
        train, mesh = self.recipe.train, self.mesh
        for first in range(mesh.dp_rank * train.micro_batch, train.global_batch, mesh.dp * train.micro_batch):
            start = self.samples + first
            yield first * train.seq_len, self.data.train.batch(range(start, start + train.micro_batch)).to(self.device)

    def forward_backward(self) -> list[Tensor]:
        """All micro-batches of the next step; their cross-entropies, on ranks that have the logits."""
        with self.stragglers.timed():
            if self.local.pipeline is not None:
                return self.local.pipeline.step(self.micro_batches())
            losses = []
            for row, batch in self.micro_batches():
                self.precision.at(row)
                loss = self.engine(batch.tokens, batch.labels, batch.positions, batch.document_ids)
                self.engine.backward(loss.loss)
                losses.append(loss.cross_entropy.detach())
            return losses

    def agree(self, losses: Sequence[Tensor]) -> float:
        """The mean cross-entropy of the global batch; and all ranks know whether one was asked to stop. Collective."""
        counted = losses and self.mesh.tp_rank == 0
        loss = torch.stack(list(losses)).double().mean() if counted else self._number(0.0)
        reads = self.mesh.tp_rank == self.mesh.pp_rank == 0  # the ranks beside it read the same samples
        skipped = len(self.data.train.skipped) if reads else 0
        mine = torch.stack([loss, self._number(self.signals.reason is not None), self._number(skipped)])
        dist.all_reduce(mine)
        self.stop_agreed = bool(mine[1])
        if (skipped := int(mine[2])) > self.skipped:
            self.skipped = skipped
            self.records.skipped(self.step + 1, skipped)
        return float(mine[0]) / self.mesh.dp

    def rehearse(self) -> tuple[float, StepResult]:
        """The next step without applying it: its loss, and what the engine says of its gradient. Collective.

        Changes no weight, no state and no amax history.
        """
        own = {name: tensor.clone() for name, tensor in self.engine.own_states().items()}
        self.begin_step()
        loss = self.agree(self.forward_backward())
        update = self.engine.step(0.0, lambda _: False)
        self.precision.forget_step()
        self.engine.restore_own_states(own)
        return loss, update

    def advance(self, loss: float, update: StepResult) -> None:
        """The step is done: the position, amax histories and what spikes are judged by. Collective."""
        self.precision.end_step(self.mesh.stage_group)
        self.step += 1
        self.samples += self.recipe.train.global_batch
        self.guard.finish(loss, update)

    def finish_step(self, loss: float, lr: float, update: StepResult, began: float) -> StepRecord:
        """Advance the position; `began` on perf_counter's clock. Collective."""
        self.advance(loss, update)
        if not self.receipted:
            self.precision.check_ran()
            self.records.receipt(self.step, *self._receipt())
            self.records.memory(self.step, self.engine.memory(), self.engine.parameters)
            self.receipted = True
        self.watchdog.beat(self.step)
        if report := self.stragglers.step_done(self.step):
            self.records.stragglers(self.step, report)
        self.saver.poll()
        norm = self.engine.parameter_norm()
        return self.records.step_record(
            step=self.step,
            samples=self.samples,
            loss=loss,
            lr=lr,
            update=update,
            norm=norm,
            seconds=time.perf_counter() - began,
        )

    def _number(self, value: float) -> Tensor:
        return torch.tensor(float(value), dtype=torch.float64, device=self.device)

    def _receipt(self) -> tuple[dict[str, int], list[str]]:
        """GEMMs run and linears not quantized, of all pipeline stages. Collective over the pipeline."""
        mine = self.precision.receipt(), self.precision.unquantized()
        if self.mesh.pp == 1:
            return mine
        everyone: list[Any] = [None] * self.mesh.pp
        dist.all_gather_object(everyone, mine, group=self.mesh.pp_group)
        gemms: Counter[str] = sum((Counter(counts) for counts, _ in everyone), Counter())
        return dict(sorted(gemms.items())), [name for _, names in everyone for name in names]

    def layout(self) -> dict[str, object]:
        """What decides which rank holds what: ranks of another layout cannot take over each other's own states."""
        mesh, zero = self.mesh, self.recipe.zero
        stages = stage_layers(self.recipe)
        degrees: dict[str, object] = {"dp": mesh.dp, "tp": mesh.tp, "pp": mesh.pp}
        return degrees | {"schedule": self.recipe.parallel.schedule, "stages": list(stages), "zero": zero.stage}

    def stop_reason(self) -> str | None:
        """Why the run stops at this step edge, the same decision on all ranks; None to go on."""
        if self.stop_agreed:
            return self.signals.reason or "another rank was asked to stop"
        if self.step == self.recipe.train.stop_at:
            return f"train.stop_at={self.step}"
        return None

    def _beat(self) -> None:
        """Something between two steps is done."""
        self.watchdog.beat(self.step)

    def probe(self) -> None:
        """Sample the numerics, if that is due. Collective."""
        if self.prober is not None and self.prober.due(self.step):
            self.prober.sample(self)
            self.watchdog.beat(self.step)

    def validate(self) -> None:
        """Measure and record the validation loss. Collective."""
        stream = self.data.validation
        assert stream is not None and stream.num_samples is not None, "checked when the run was built"
        count = min(self.recipe.eval.samples or stream.num_samples, stream.num_samples)
        micro_batch = self.recipe.train.micro_batch
        self.begin_step()  # validation sees the weights as they are after the last update
        self.validated = validation_loss(self.local, stream, count, micro_batch, self.mesh, self.device, self._beat)
        self._beat()
        tokens = self.samples * self.recipe.train.seq_len
        self.records.validation(
            ValidationRecord(step=self.step, tokens=tokens, samples=self.samples, validation_loss=self.validated)
        )

    def compare_with_bigram(self) -> None:
        """Say how far below an interpolated bigram model the last validation loss is."""
        if self.mesh.rank == 0 and self.validated is not None and self.data.validation is not None:
            baseline = interpolated_bigram_cross_entropy(
                self.data.train, self.data.validation, self.recipe.model.vocab_size
            )
            verdict = "below" if self.validated < baseline else "NOT below"
            self.records.message(
                f"validation loss {self.validated:.4f} is {verdict} the cross-entropy {baseline:.4f} of an "
                "interpolated bigram model on the same tokens"
            )

    def fragments(self) -> list[Fragment]:
        """Everything that a checkpoint holds of this rank; amax histories are the same on all ranks of a stage."""
        return [*self.engine.fragments(), *amax_fragments(self.precision)]

    def save(self) -> None:
        """Write the checkpoint of the steps done so far. Collective."""
        meta = {
            "recipe": to_dict(self.recipe),
            "samples": self.samples,
            "updates": self.engine.updates,
            "data": self.data.hashes(),
            "precision": self.precision.table(),
            "layout": self.layout(),
            "spikes": self.guard.state(),
            "gemm_dtype": str(self.precision.shared.gemm_dtype).removeprefix("torch."),
        }
        if self.recipe.resume.verify:
            count = self.recipe.train.global_batch
            meta["replay"] = {"loss": self.replay(count, self._beat), "samples": count, "by": self._arithmetic()}
        self.saver.save(self.step, self.fragments(), meta, random_states(self.device) | self.engine.own_states())
        self.watchdog.beat(self.step)

    def replay(self, count: int, beat: Callable[[], object] = lambda: None) -> float:
        """The loss of the weights as they are on the `count` sequences before the position. Collective."""
        self.begin_step()
        batch, micro_batch = Replayed(self.data.train, self.samples - count), self.recipe.train.micro_batch
        return validation_loss(self.local, batch, count, micro_batch, self.mesh, self.device, beat)

    def _arithmetic(self) -> dict[str, object]:
        """What the order of additions in a forward depends on."""
        parallel, micro_batch = self.recipe.parallel, self.recipe.train.micro_batch
        sp = {"sp": parallel.sp, "sp_payload": parallel.sp_payload}
        layers = "te" if self.local.backend is not None and self.local.backend.te else "emulate"
        threads = torch.get_num_threads() if self.device.type == "cpu" else None  # each multiplies some of the rows
        machine = {"device": self.device.type, "threads": threads, "backend": layers}
        return self.layout() | sp | {"micro_batch": micro_batch} | machine

    def prove_resume(self, start: checkpoint.Checkpoint) -> None:
        """Replay what `start` noted when it was saved; CheckpointError if it is not the same. Collective."""
        if not self.recipe.resume.verify:
            return
        saved = start.meta.get("replay")
        if saved is None:
            raise CheckpointError(
                f"resume.verify is true, but {start.path} was saved without it; resume once with resume.verify=false"
            )
        if start.meta["precision"] != self.precision.table():
            self.records.message("not replayed: the checkpoint is of another precision, as was allowed")
            return
        found, same = self.replay(saved["samples"]), saved["by"] == self._arithmetic()
        if not math.isclose(found, saved["loss"], rel_tol=0.0 if same else 0.01):
            limit = "the same layout: they must be equal" if same else "another layout or thread count, limit 1 %"
            raise CheckpointError(
                f"{start.path}: the loss of its weights on the batch of step {start.step} was {saved['loss']!r} when "
                f"it was saved and is {found!r} now ({limit}); the data, the machine or the code are not those of the "
                "saved run"
            )
        self.precision.forget_receipt()  # which speaks of training
        self.records.message(f"replayed the batch of step {start.step}: loss {found:.6f}, saved {saved['loss']:.6f}")


def amax_fragments(precision: Precision) -> Iterator[Fragment]:
    """Histories and scales of delayed scaling, for a checkpoint: live memory."""
    for name, tensor in precision.state().items():
        yield Fragment(name, (tensor.numel(),), 0, {AMAX: tensor.view(-1)})


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that a step could draw from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Continue from `random_states`; a checkpoint of another number of ranks has none, and the seeds stay."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
