"""ZeRO data parallelism through DeepSpeed: the only file that imports and patches DeepSpeed.

The gradient contract. Every parameter has exactly one gradient accumulator, in FP32. Autograd itself provides
it: with `param.grad_dtype = torch.float32`, AccumulateGrad adds what a layer's backward returns into an FP32
`.grad`, so a layer that returns an FP32 weight gradient loses nothing, and one that returns BF16 has been
rounded once, by its own GEMM. From there DeepSpeed carries FP32 all the way:

    stage 0, 1   micro-batches add up in `param.grad_accum`; one FP32 reduction per step
    stage 2      each micro-batch is reduced in FP32 (DeepSpeed would stage it in BF16: overridden) and added to
                 this rank's FP32 partition
    stage 3      as stage 2; weights are partitioned too and gathered around each use

Stage 0 is stage 1 over a group of one: every rank keeps all states and the gradients are averaged over the real
data-parallel group first (DeepSpeed itself refuses BF16 weights with FP32 accumulation at stage 0, and at
stage 1 would choose another optimizer class, so that choice is overridden and asserted).

What DeepSpeed keeps flat is shown to the rest of the program as `Fragment`s of logical tensors: checkpoints,
initialisation and statistics know parameters by name, shape and offset, never DeepSpeed's buffers.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from lowprec.optim import OptimizerConfig, adamw, allocate_states
from lowprec.patching import Patch, applied

# DeepSpeed logs dozens of lines, some while it is imported, that say nothing about the run.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)

import deepspeed  # noqa: E402
from deepspeed.accelerator import set_accelerator  # noqa: E402
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator  # noqa: E402
from deepspeed.runtime.engine import ZERO_OPTIMIZATION  # noqa: E402

REQUIRES = ">=0.19.8,<0.20"

Shapes = dict[int, tuple[str, tuple[int, ...]]]  # id of a parameter -> its name and logical shape
States = dict[int, dict[str, torch.Tensor]]  # id of a flat master partition -> its optimizer state


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """Partitioning over data-parallel ranks (ZeRO, arXiv 1910.02054).

    stage:           0 replicate, 1 partition optimizer states, 2 and gradients, 3 and weights
    reduce_bucket:   elements of gradient reduced at once
    gather_bucket:   elements of updated weights gathered at once
    """

    stage: Literal[0, 1, 2, 3] = 1
    reduce_bucket: int = 50_000_000
    gather_bucket: int = 100_000_000

    def problems(self) -> list[str]:
        return [
            f"{key} is {getattr(self, key)}; it must be at least 1024 elements"
            for key in ("reduce_bucket", "gather_bucket")
            if getattr(self, key) < 1024
        ]


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of one logical parameter, with everything this rank holds for it.

    name:    the parameter's name in the plain model
    shape:   its logical shape
    offset:  first element of the run in the row-major flattened parameter
    tensors: kind -> 1-D view of live memory; "weight" is the FP32 master, then "exp_avg", "exp_avg_sq"
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `grad_norm` is before clipping; infinite when the step was skipped."""

    grad_norm: float
    skipped: bool


class Engine:
    """A model under ZeRO: call it for the loss, then `backward`, then `step` once a global batch."""

    def __init__(self, engine: Any, shapes: Shapes, group: Any):
        """group: the one over which states are partitioned, None if they are replicated."""
        self._engine = engine
        self._shapes = shapes
        self._group = group
        self._pending = 0  # micro-batches whose backward ran since the last step
        self._touched: set[int] = set()
        for parameter in engine.module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: self._touched.add(id(p)))
        # AdamW counts its steps in every flat partition; the counts are equal, so any of them tells.
        self._states = {id(m): allocate_states(engine.optimizer.optimizer, m) for m in self._masters()}
        walk = _sliced_fragments if engine.zero_optimization_stage() == 3 else _flat_fragments
        self._fragments = list(walk(engine.optimizer, shapes, self._states))

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of `loss` (the mean of one micro-batch) divided by the micro-batches a step."""
        if self._pending == self._engine.gradient_accumulation_steps():
            raise RuntimeError(f"step() is due after {self._pending} micro-batches")
        if self._pending:
            self._engine.step()  # closes the previous micro-batch; DeepSpeed updates at the boundary only
        self._engine.backward(loss)
        self._pending += 1

    def step(self, lr: float) -> StepResult:
        """Reduce, clip and update with learning rate `lr`; a non-finite gradient skips the step on all ranks."""
        if self._pending != self._engine.gradient_accumulation_steps():
            raise RuntimeError(
                f"step() after {self._pending} of {self._engine.gradient_accumulation_steps()} micro-batches"
            )
        if missing := [name for key, (name, _) in self._shapes.items() if key not in self._touched]:
            raise RuntimeError(f"parameters that got no gradient in this step: {missing}")
        self._pending = 0
        self._touched.clear()
        for group in self._engine.optimizer.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return StepResult(grad_norm=norm, skipped=bool(self._engine.optimizer.overflow))

    def fragments(self) -> list[Fragment]:
        """This rank's share of every logical parameter and its states, as views of live memory."""
        return self._fragments

    @torch.no_grad()
    def parameter_norm(self) -> float:
        """L2 norm of all master weights over the data-parallel group."""
        squares = [torch.linalg.vector_norm(f.tensors["weight"]).square() for f in self._fragments]
        device = self._masters()[0].device
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=device)
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return float(total.sqrt())

    @torch.no_grad()
    def fill_weights(self, values: Callable[[Fragment], torch.Tensor]) -> None:
        """Set every master fragment to `values(fragment)` (1-D, FP32), then the working weights from them."""
        for fragment in self._fragments:
            fragment.tensors["weight"].copy_(values(fragment))
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Round the masters into the working weights and gather them; after masters were written from outside."""
        optimizer = self._engine.optimizer
        if self._engine.zero_optimization_stage() < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()  # drops the small weights that stay gathered between steps
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @property
    def updates(self) -> int:
        """Optimizer updates applied so far: AdamW's t."""
        return int(next(iter(self._states.values()))["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self._states.values():
            state["step"].fill_(count)

    def _masters(self) -> list[torch.Tensor]:
        optimizer = self._engine.optimizer
        if self._engine.zero_optimization_stage() == 3:
            return optimizer.fp32_partitioned_groups_flat
        return optimizer.single_partition_of_fp32_groups


def _flat_fragments(zero: Any, shapes: Shapes, states: States) -> Iterator[Fragment]:
    """Stages 0-2: each group's parameters lie one after the other in a buffer cut into equal partitions."""
    for index, parameters in enumerate(zero.round_robin_bit16_groups):
        master, size = zero.single_partition_of_fp32_groups[index], int(zero.partition_size[index])
        start = dist.get_rank(zero.real_dp_process_group[index]) * size
        for parameter, place in zip(parameters, zero.round_robin_bit16_offsets[index], strict=True):
            name, shape = shapes[id(parameter)]
            low, high = max(place, start), min(place + parameter.numel(), start + size)
            if low < high:
                here = slice(low - start, high - start)
                yield Fragment(name, shape, low - place, _views(master, states[id(master)], here))


def _sliced_fragments(zero: Any, shapes: Shapes, states: States) -> Iterator[Fragment]:
    """Stage 3: every parameter is cut into equal slices (the last ones padded); a group strings them together."""
    for index, parameters in enumerate(zero.fp16_groups):
        master, place = zero.fp32_partitioned_groups_flat[index], 0
        for parameter in parameters:
            name, shape = shapes[id(parameter)]
            size = parameter.partition_numel()
            offset = zero._get_param_partition_rank(parameter) * size
            count = min(size, parameter.ds_numel - offset)
            if count > 0:
                here = slice(place, place + count)
                yield Fragment(name, shape, offset, _views(master, states[id(master)], here))
            place += size


def _views(master: torch.Tensor, state: dict[str, torch.Tensor], here: slice) -> dict[str, torch.Tensor]:
    flat = {"weight": master.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    return {kind: tensor[here] for kind, tensor in flat.items()}


def _fp32_reduction(base: type) -> type:
    class FP32ReductionZeroOptimizer(base):
        """Its reduction buffer is FP32, where stage 2 would stage gradients in BF16."""

        def _gradient_reduction_buffer_dtype(self) -> torch.dtype:
            return self.gradient_accumulation_dtype

    return FP32ReductionZeroOptimizer


def _replicated(base: type) -> type:
    class ReplicatedZeroOptimizer(_fp32_reduction(base)):
        """Stage 0: its partitions are those of a group of one; gradients are averaged over the real group first."""

        def __init__(self, *args: Any, dp_process_group: Any, **kwargs: Any):
            self.replicas = dp_process_group
            alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            super().__init__(*args, dp_process_group=alone, **kwargs)

        def average_tensor(self, tensor: torch.Tensor, communication_data_type: torch.dtype) -> None:
            tensor.div_(dist.get_world_size(self.replicas))
            dist.all_reduce(tensor, group=self.replicas)
            super().average_tensor(tensor, communication_data_type)

    return ReplicatedZeroOptimizer


def _engine_class(base: type) -> type:
    class FP32AccumulationEngine(base):
        """Always takes the ZeRO optimizer, which DeepSpeed would not for BF16 + FP32 accumulation at stage 1."""

        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
            return ZERO_OPTIMIZATION

    return FP32AccumulationEngine


_PATCH_ENGINE = Patch(
    dist="deepspeed",
    requires=REQUIRES,
    module="deepspeed",
    name="DeepSpeedEngine",
    build=_engine_class,
    relies_on={"_do_optimizer_sanity_check": "697bd4d5478d", "_configure_zero_optimizer": "cc7870325a7c"},
    why="BF16 with FP32 accumulation must run in the ZeRO optimizer at stage 1",
)
_PATCH_OPTIMIZER = Patch(
    dist="deepspeed",
    requires=REQUIRES,
    module="deepspeed.runtime.engine",
    name="DeepSpeedZeroOptimizer",
    build=_fp32_reduction,
    relies_on={
        "_gradient_reduction_buffer_dtype": "a5798dc54849",
        "setup_buckets": "2e4a2c97d31b",
        "average_tensor": "a9941e3d346c",
        "update_lp_params": "d160564ab4e9",
    },
    why="gradients are reduced in FP32 at every stage",
)
_PATCH_REPLICATED = replace(
    _PATCH_OPTIMIZER,
    build=_replicated,
    relies_on=_PATCH_OPTIMIZER.relies_on
    | {"reduce_gradients": "292fd17a4948", "scaled_global_norm": "1958b47f32d1", "has_overflow": "8934dabca3dd"},
    why="stage 0: states of a group of one, gradients of the whole group",
)


_OPTIMIZERS = (
    "ReplicatedZeroOptimizer",
    "FP32ReductionZeroOptimizer",
    "FP32ReductionZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
)


def build_engine(
    model: nn.Module,
    config: ZeroConfig,
    optimizer: OptimizerConfig,
    *,
    micro_batch: int,
    accumulation: int,
    logical_shapes: Mapping[str, tuple[int, ...]] | None = None,
    mpu: Any = None,
) -> Engine:
    """Put `model` (on its device, working dtype) under ZeRO. The default process group must exist.

    micro_batch:  samples a forward on one rank
    accumulation: micro-batches a step
    logical_shapes: name -> shape by which fragments speak of a parameter; by default that of the module
    mpu:          Megatron-style groups; None when all ranks are data-parallel
    Raises PatchError when the installed DeepSpeed is not the one that this file was written against.
    """
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    if device.type == "cpu":
        set_accelerator(CPU_Accelerator())
    for parameter in parameters.values():
        parameter.grad_dtype = torch.float32
    logical = logical_shapes or {name: tuple(p.shape) for name, p in parameters.items()}
    shapes = {id(p): (name, logical[name]) for name, p in parameters.items()}
    zero_patch = _PATCH_REPLICATED if config.stage == 0 else _PATCH_OPTIMIZER
    # It also prints, once a rank, that it built its shared-memory operator.
    with applied(_PATCH_ENGINE, zero_patch), contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(parameters.values(), optimizer),
            config=_deepspeed_config(model, config, optimizer, micro_batch, accumulation),
            mpu=mpu,
            dist_init_required=False,
        )
    chosen = type(engine.optimizer).__name__
    if chosen != _OPTIMIZERS[config.stage]:
        raise RuntimeError(f"DeepSpeed chose {chosen}, not {_OPTIMIZERS[config.stage]}")
    return Engine(engine, shapes, None if config.stage == 0 else engine.data_parallel_group)


def _deepspeed_config(
    model: nn.Module, config: ZeroConfig, optimizer: OptimizerConfig, micro_batch: int, accumulation: int
) -> dict[str, Any]:
    """DeepSpeed's JSON. It ignores unknown top-level keys, so every key here is one that it documents."""
    sizes = [p.numel() for p in model.parameters()]
    on_gpu = next(model.parameters()).is_cuda
    low_precision = next(model.parameters()).dtype == torch.bfloat16
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip,
        "steps_per_print": 2**31,
        "bf16": {"enabled": low_precision, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": max(config.stage, 1),  # stage 0 is stage 1 over a group of one
            # A bucket is allocated whole: one larger than the model would only waste memory.
            "reduce_bucket_size": min(config.reduce_bucket, sum(sizes)),
            "allgather_bucket_size": min(config.gather_bucket, sum(sizes) + sum(sizes) % 2),
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
        },
    }
