"""The engine that a run sees: DeepSpeed's, with its optimizer's flat buffers shown as fragments of logical parameters.

It knows what DeepSpeed's objects look like but does not import them: lowprec/zero.py makes and patches them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowprec.adamw import Tally
from lowprec.fragments import Fragment
from lowprec.payload import PAYLOADS
from lowprec.updater import Updater


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    grad_norm:    before clipping; infinite where a gradient was not finite
    skipped:      nothing was updated: a gradient was not finite, or the step was not accepted
    sent_bytes:   this rank's gradients and updated weights on their way to other ranks (0 at stage 3: not counted)
    edq, lost:    effective descent quality over its ideal and share of lost updates (adamw.Tally) where weights are
                  written in 16 bits; else None
    update_norm:  of the change of all weights; None where it is not measured, or nothing was updated
    """

    grad_norm: float
    skipped: bool
    sent_bytes: int = 0
    edq: float | None = None
    lost: float | None = None
    update_norm: float | None = None


class PartitionedAdamW(torch.optim.Optimizer):
    """What DeepSpeed holds as its optimizer: the groups' learning rates, and at stage 3 the update itself."""

    def __init__(self, groups: list[dict], updater: Updater) -> None:
        super().__init__(groups, {"lr": updater.config.lr})
        self.updater = updater
        self.held: dict[int, list[tuple[Fragment, slice]]] = {}  # id of a flat FP32 partition -> what lies in it
        self.tally = Tally.nothing()  # of the updates since it was last replaced

    def step(self, closure: Callable | None = None) -> None:
        """Update the flat partitions of the groups from their `.grad`; those that no fragment names are left alone."""
        for group in self.param_groups:
            for flat in group["params"]:
                if held := self.held.get(id(flat)):
                    gradients = [partial(flat.grad.__getitem__, here) for _, here in held]
                    self.tally += self.updater.step([fragment for fragment, _ in held], gradients, group["lr"], 1.0)


@dataclass(frozen=True)
class SumGroups:
    """Over which ranks a sum over all parameters runs: those that hold other partitions, and other parts of the model.

    None: this rank alone.
    """

    data: Any = None
    model: Any = None

    def sum(self, values: Tensor) -> Tensor:
        """Add up in place. Collective."""
        for group in (self.data, self.model):
            if group is not None:
                dist.all_reduce(values, group=group)
        return values


class Engine:
    """A model under ZeRO: call it for the loss, then `backward`, then `step` once a global batch."""

    def __init__(self, engine: Any, names: Mapping[int, str], updater: Updater, sums: SumGroups):
        self._engine = engine
        self._names = names
        self._sums = sums
        self.updater = updater
        self._by_schedule = False
        self._pending = 0  # micro-batches whose backward ran since the last step
        self._touched: set[int] = set()
        for parameter in engine.module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: self._touched.add(id(p)))
        if engine.zero_optimization_stage() == 3:
            self._fragments = list(_sliced_fragments(engine.optimizer, names, updater))
        else:
            self._fragments = [piece.fragment for piece in engine.optimizer.pieces]

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss` (the mean of one micro-batch) divided by the micro-batches a step."""
        if self._pending == self._engine.gradient_accumulation_steps():
            raise RuntimeError(f"step() is due after {self._pending} micro-batches")
        if self._pending:
            self._engine.step()  # closes the previous micro-batch; DeepSpeed updates at the boundary only
        self._engine.backward(loss)
        self._pending += 1

    def step(self, lr: float, accept: Callable[[float], bool] | None = None) -> StepResult:
        """Reduce, clip and update with learning rate `lr`; a non-finite gradient skips the step on all ranks.

        accept: is told the norm of a finite gradient, the same number on every rank; False skips the step, too
        """
        if not self._by_schedule and self._pending != self._engine.gradient_accumulation_steps():
            raise RuntimeError(
                f"step() after {self._pending} of {self._engine.gradient_accumulation_steps()} micro-batches"
            )
        if missing := [name for key, name in self._names.items() if key not in self._touched]:
            raise RuntimeError(f"parameters that got no gradient in this step: {missing}")
        self._pending = 0
        self._touched.clear()
        optimizer, stage = self._engine.optimizer, self._engine.zero_optimization_stage()
        optimizer.accept = accept
        for group in optimizer.optimizer.param_groups:
            group["lr"] = lr
        if self._by_schedule:
            optimizer.reduce_accumulated()
            optimizer.step()
        else:
            self._engine.step()
        skipped, sent = bool(optimizer.overflow), 0
        if stage == 3:
            norm, tally, optimizer.optimizer.tally = optimizer.norm, optimizer.optimizer.tally, Tally.nothing()
            self.updater.updates += not skipped
        else:
            norm, tally, sent = optimizer._global_grad_norm, optimizer.tally, optimizer.sent_bytes
            optimizer.sent_bytes = 0
        if skipped or not self.updater.measures:
            return StepResult(norm, skipped, sent)
        tally = Tally(self._sums.sum(tally.sums.to(self.updater.device)))
        quality = (tally.edq, tally.lost) if self.updater.update.measured else (None, None)
        return StepResult(norm, skipped, sent, *quality, tally.norm)

    def run_by_schedule(self, tied: nn.Parameter | None, group: Any) -> None:
        """From now on a pipeline schedule runs the backwards; `step` finds their gradients accumulated.

        tied: the parameter of which another pipeline rank holds a copy, and the group of both; or None
        """
        self._by_schedule = True
        self._engine.optimizer.accumulate_by_hooks(tied, group)

    def lend_main_grads(self, parameters: Iterable[Tensor], *, split: bool) -> None:
        """Let the GEMMs of weight gradients add them up themselves; see lowprec/main_grads.py. Not at stage 3."""
        self._engine.optimizer.main_grads.lend(parameters, split=split)

    def add_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Accumulate what autograd did not: a weight gradient of a split backward, as it left its GEMM."""
        hooks: dict[int, Any] = parameter._backward_hooks or {}
        for hook in hooks.values():  # sums over tensor-parallel ranks, in FP32 as where autograd accumulates
            changed = hook(gradient.float())
            gradient = gradient if changed is None else changed
        self._engine.optimizer.accumulate(parameter, gradient)
        self._touched.add(id(parameter))

    @contextmanager
    def exact_gradients(self) -> Iterator[None]:
        """Gradients add up and travel in FP32, for as long as this lasts (stages 0 to 2)."""
        optimizer = self._engine.optimizer
        plan, payload, mu = optimizer.plan, optimizer.payload, optimizer.mu
        exact = replace(plan.gradients, payload="fp32", accumulate="fp32", error_feedback=False)
        optimizer.plan, optimizer.payload, optimizer.mu = replace(plan, gradients=exact), PAYLOADS["fp32"], None
        stores = [piece.store for piece in optimizer.pieces]
        for store in stores:
            store.accumulate = exact.accumulate
        try:
            yield
        finally:
            optimizer.plan, optimizer.payload, optimizer.mu = plan, payload, mu
            for store in stores:
                store.accumulate = plan.gradients.accumulate

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Working weights are gathered as they are instead of quantized, for as long as this lasts (stages 1 and 2)."""
        optimizer = self._engine.optimizer
        plan = optimizer.plan
        optimizer.plan = replace(plan, gather="exact")
        self.refresh_weights()
        try:
            yield
        finally:
            optimizer.plan = plan
            self.refresh_weights()

    def fragments(self) -> list[Fragment]:
        """This rank's share of every logical parameter and its states, as views of live memory."""
        return self._fragments

    @torch.no_grad()
    def parameter_norm(self) -> float:
        """L2 norm of all master weights. Collective over all ranks of the run."""
        total = torch.zeros((), device=self.updater.device)
        for fragment in self._fragments:
            weights = self.updater.update.weights(fragment.extent, fragment.tensors)
            for owned in fragment.owned():
                total += torch.linalg.vector_norm(weights[owned]).square()
        return float(self._sums.sum(total).sqrt())

    def fill_weights(self, values: Callable[[Fragment], Tensor]) -> None:
        """Set every master fragment to `values(fragment)` (1-D, FP32), then the working weights from them."""
        self.updater.set_weights(self._fragments, values)
        self.refresh_weights()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Round the masters into the working weights and gather them; after masters were written from outside."""
        optimizer = self._engine.optimizer
        if self._engine.zero_optimization_stage() < 3:
            optimizer.update_lp_params()
            optimizer.sent_bytes = 0  # of no step
            return
        optimizer._partition_all_parameters()  # drops the small weights that stay gathered between steps
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @property
    def updates(self) -> int:
        """Optimizer updates applied so far: AdamW's t."""
        return self.updater.updates

    @updates.setter
    def updates(self, count: int) -> None:
        self.updater.updates = count

    def own_states(self) -> dict[str, Tensor]:
        """Live tensors of this rank alone, which no other layout could take over: residuals of error feedback, mu."""
        optimizer = self._engine.optimizer
        if self._engine.zero_optimization_stage() == 3:
            return {}
        names = {optimizer.param_id[key]: name for key, name in self._names.items()}
        residuals = {f"error.{names[param_id]}": tensor for param_id, tensor in sorted(optimizer.errors.items())}
        return residuals if optimizer.mu is None else residuals | {"mu": torch.tensor([optimizer.mu]).double()}

    def restore_own_states(self, states: Mapping[str, Tensor]) -> None:
        """Continue from `own_states`; what is missing is as at a start."""
        optimizer = self._engine.optimizer
        if self._engine.zero_optimization_stage() < 3:
            optimizer.errors.clear()
        for key, name in self._names.items():
            if (residual := states.get(f"error.{name}")) is not None:
                optimizer.errors[optimizer.param_id[key]] = residual.to(self.updater.device)
        if "mu" in states:
            optimizer.mu = float(states["mu"])

    @property
    def parameters(self) -> int:
        """Elements of the model, or of the part of it that this rank's modules hold."""
        return sum(math.prod(shard.shape) for shard in self.updater.shards.values())

    def memory(self) -> dict[str, int]:
        """Bytes of this rank's tensors: weights, master, gradients (the most in a step so far), states, scales.

        The buffer in which a bucket of gradients waits for its reduction is not among them: it lives for one backward,
        and zero.reduce_bucket sets its size.
        """
        optimizer = self._engine.optimizer
        found: dict[str, int] = {"weights": 0, "master": 0, "gradients": 0}
        for parameter in self.module.parameters():
            held = getattr(parameter, "ds_tensor", parameter)  # stage 3: this rank's slice
            found["weights"] += held.numel() * held.element_size()
        for fragment in self._fragments:
            for kind, tensor in fragment.tensors.items():
                name = "scales" if fragment.per.get(kind, 1) not in (1, 2) else kind.split(".")[0]
                if kind == "weight":
                    if self.updater.update.master == "none":
                        continue  # the working weights themselves
                    name = "master"
                found[name] = found.get(name, 0) + tensor.nbytes
        if self._engine.zero_optimization_stage() == 3:
            found["gradients"] = optimizer.grad_partitions_flat_buffer.nbytes
        else:
            found["gradients"] = optimizer.gradient_bytes
            found["error_feedback"] = sum(tensor.nbytes for tensor in optimizer.errors.values())
        return found


def _sliced_fragments(zero: Any, names: Mapping[int, str], updater: Updater) -> Iterator[Fragment]:
    """Stage 3: every parameter is cut into equal slices (the last ones padded); a group strings them together."""
    for index, parameters in enumerate(zero.fp16_groups):
        flat, place = zero.fp32_partitioned_groups_flat[index], 0
        decay = zero.optimizer.param_groups[zero.sub_group_to_group_id[index]]["weight_decay"] > 0
        held = zero.optimizer.held.setdefault(id(flat), [])
        for parameter in parameters:
            size = parameter.partition_numel()
            offset = zero._get_param_partition_rank(parameter) * size
            count = min(size, parameter.ds_numel - offset)
            if count > 0:
                here = slice(place, place + count)
                working = zero.fp16_partitioned_groups_flat[index][here]
                fragment = updater.adopt(names[id(parameter)], offset, flat.detach()[here], working, decay)
                held.append((fragment, here))
                yield fragment
            place += size
