"""ZeRO data parallelism through DeepSpeed: the only file that imports and patches DeepSpeed.

The gradient contract. Every parameter has exactly one gradient accumulator, in FP32 unless the recipe says otherwise
(gradients.accumulate). Autograd hands over what a layer's backward returns in FP32 (`param.grad_dtype`), so a layer
that returns an FP32 weight gradient loses nothing, and one that returns BF16 has been rounded once, by its own GEMM.
Then:

    stage 0, 1   micro-batches add up in a GradientStore a parameter; one reduction a step
    stage 2      each micro-batch is reduced and added to this rank's GradientStores
    stage 3      as stage 2, in DeepSpeed's own FP32 partitions; weights are partitioned too, and gathered at each use

Stages 0-2 run our subclass of DeepSpeed's optimizer (zero_optimizer.py), which DeepSpeed would not choose for BF16 with
FP32 accumulation at stage 1 and refuses at stage 0: its choice is overridden, and asserted. At stage 3 a smaller
subclass (zero_stage3.py) runs our update on DeepSpeed's partitions.

What DeepSpeed keeps flat is shown to the rest of the program as `Fragment`s of logical tensors. Parameters are laid out
so that a partition's border always falls on a multiple of 256 elements of a parameter: fillers, small parameters of
zeros that no module has, round every parameter up.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from errors import UsageError
from lowprec import zero_sources
from lowprec.adamw import Update
from lowprec.codecs import UNIT
from lowprec.collectives import parse_payload
from lowprec.engine import Engine, PartitionedAdamW, SumGroups
from lowprec.fragments import Shard
from lowprec.gradients import GradientsConfig
from lowprec.optim import OptimizerConfig
from lowprec.patching import Patch, applied
from lowprec.policy import together
from lowprec.updater import Updater
from lowprec.zero_optimizer import low_precision
from lowprec.zero_parts import Plan
from lowprec.zero_stage3 import LowPrecisionStage3

# DeepSpeed logs dozens of lines, some while it is imported, that say nothing about the run.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)

import deepspeed  # noqa: E402
from deepspeed.accelerator import set_accelerator  # noqa: E402
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator  # noqa: E402
from deepspeed.runtime.engine import ZERO_OPTIMIZATION  # noqa: E402
from deepspeed.runtime.utils import combine_grad_norm_groups  # noqa: E402
from deepspeed.utils import groups as deepspeed_groups  # noqa: E402

REQUIRES = ">=0.19.8,<0.20"


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """Partitioning over data-parallel ranks (ZeRO, arXiv 1910.02054).

    stage:           0 replicate, 1 partition optimizer states, 2 and gradients, 3 and weights
    reduce_bucket:   elements of gradient reduced at once
    gather:          what updated weights travel in at stages 1 and 2: exact (as they are), or fp8_e4m3, mxfp8_e4m3, ...
                     The working weights are then those numbers, made from the master
    """

    stage: int = 1  # no Literal, which takes false for 0
    reduce_bucket: int = 50_000_000
    gather: str = "exact"

    def problems(self) -> list[str]:
        found = []
        if self.stage not in range(4):
            found.append(f"stage is {self.stage}; use 0, 1, 2 or 3")
        if self.reduce_bucket < 1024:
            found.append(f"reduce_bucket is {self.reduce_bucket}; it must be at least 1024 elements")
        try:
            if self.gather != "exact" and parse_payload(self.gather) and self.stage in (0, 3):
                found.append(
                    f"gather is {self.gather} at stage {self.stage}, which gathers no updated weights; use exact"
                )
        except UsageError as error:
            found.append(f"gather: {error}")
        return found


def _engine_class(base: type) -> type:
    class ZeroEngine(base):
        """Always takes the ZeRO optimizer, which DeepSpeed would not for BF16 + FP32 accumulation at stage 1."""

        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
            return ZERO_OPTIMIZATION

    return ZeroEngine


_PATCH_ENGINE = Patch(
    dist="deepspeed",
    requires=REQUIRES,
    module="deepspeed",
    name="DeepSpeedEngine",
    build=_engine_class,
    relies_on=zero_sources.ENGINE,
    why="BF16 with FP32 accumulation must run in the ZeRO optimizer at stage 1",
)


_PATCH_STAGE3 = Patch(
    dist="deepspeed",
    requires=REQUIRES,
    module="deepspeed.runtime.zero.stage3",
    name="DeepSpeedZeroOptimizer_Stage3",
    build=lambda base: type(
        "LowPrecisionStage3Optimizer", (LowPrecisionStage3, base), {"combined": staticmethod(combine_grad_norm_groups)}
    ),
    relies_on=zero_sources.STAGE_3,
    why="masters in the format of the recipe; a step whose loss or gradient is an outlier is not applied",
)


def _optimizer_patch(plan: Plan) -> Patch:
    return Patch(
        dist="deepspeed",
        requires=REQUIRES,
        module="deepspeed.runtime.engine",
        name="DeepSpeedZeroOptimizer",
        build=lambda base: low_precision(base, plan),
        relies_on=zero_sources.STAGES_0_TO_2,
        why="gradients, states and updates of stages 0 to 2 in the formats of the recipe",
    )


@dataclass(frozen=True)
class Layout:
    """How the model is spread beyond data parallelism.

    mpu:      Megatron-style groups, as DeepSpeed asks for them
    tensor:   the tensor-parallel group; None: parameters are whole
    stage:    the ranks that hold parts of the same parameters, over data and tensor parallelism
    pipeline: whether a pipeline schedule runs the backwards
    tied:     the group of the two pipeline ranks that hold tied embeddings; None where this rank holds none, or both
    """

    mpu: Any
    tensor: Any = None
    stage: Any = None
    pipeline: bool = False
    tied: Any = None


@dataclass(frozen=True, kw_only=True)
class ZeroPlan:
    """What `build_engine` needs beside the model.

    micro_batch:    samples a forward on one rank
    accumulation:   micro-batches a step
    shards:         name -> what of the logical parameter the module holds, or would hold in another pipeline stage; by
                    default all of it, in the module's shape
    layout:         None when all ranks are data-parallel
    nodes:          groups of a reduction in two levels (gradients.two_level)
    seed:           of stochastic rounding
    update_norm:    measure the norm of each update
    """

    zero: ZeroConfig
    optimizer: OptimizerConfig
    gradients: GradientsConfig = field(default_factory=GradientsConfig)
    micro_batch: int
    accumulation: int
    shards: Mapping[str, Shard] | None = None
    layout: Layout | None = None
    nodes: tuple[Any, Any] | None = None
    seed: int = 0
    update_norm: bool = False


def build_engine(parts: Sequence[nn.Module], plan: ZeroPlan) -> Engine:
    """Put a model (on its device, working dtype) under ZeRO. The default process group must exist.

    parts: the model, or the pipeline stages of it that this rank runs; their parameters have the whole model's names

    Raises PatchError when the installed DeepSpeed is not the one that this file was written against, UsageError for
    states that this layout cannot hold.
    """
    model = parts[0] if len(parts) == 1 else nn.ModuleList(parts)
    parameters = dict(pair for part in parts for pair in part.named_parameters())
    device = next(iter(parameters.values())).device
    if device.type == "cpu":
        set_accelerator(CPU_Accelerator())
    for name, parameter in parameters.items():
        parameter.grad_dtype = torch.float32
        if plan.shards and plan.shards[name].split:
            vars(parameter)["tensor_model_parallel"] = (
                True  # DeepSpeed's own norm, at stage 3, counts other ones on one rank
            )
    shards = plan.shards or {name: Shard.of_whole(tuple(p.shape)) for name, p in parameters.items()}
    stage, layout = plan.zero.stage, plan.layout
    data_parallel = dist.group.WORLD if layout is None else layout.mpu.get_data_parallel_group()
    dp = dist.get_world_size(data_parallel)
    check_states(plan, shards, dp)
    names = {id(parameter): name for name, parameter in parameters.items()}
    held = {name: shards[name] for name in parameters}
    updater = Updater(plan.optimizer, held, device, seed=plan.seed, norm=plan.update_norm)
    if layout is not None and layout.tensor is not None:
        updater.group = layout.tensor if stage == 0 else layout.stage
    elif stage > 0 and dp > 1:
        updater.group = data_parallel
    ours = Plan(
        names=names,
        updater=updater,
        gradients=plan.gradients,
        gather=plan.zero.gather,
        replicas=data_parallel if stage == 0 else None,
        nodes=plan.nodes,
    )
    groups = _groups(parameters.values(), plan, dp)
    deepspeed_groups.mpu = None  # of an earlier engine in this process, which one without an mpu would take for its own
    patches = _PATCH_ENGINE, _PATCH_STAGE3 if stage == 3 else _optimizer_patch(ours)
    # It also prints, once a rank, that it built its shared-memory operator.
    with applied(*patches), contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=PartitionedAdamW(groups, updater),
            config=_deepspeed_config(model, plan),
            mpu=layout.mpu if layout else None,
            dist_init_required=False,
        )
    chosen = type(engine.optimizer).__name__
    wanted = "LowPrecisionStage3Optimizer" if stage == 3 else "LowPrecisionZeroOptimizer"
    if chosen != wanted:
        raise RuntimeError(f"DeepSpeed chose {chosen}, not {wanted}")
    sums = SumGroups(None if stage == 0 or dp == 1 else data_parallel, layout and layout.mpu.get_model_parallel_group())
    made = Engine(engine, names, updater, sums)
    if layout is not None and layout.pipeline:
        made.run_by_schedule(parameters.get("embedding.weight") if layout.tied is not None else None, layout.tied)
    return made


def partition_size(parts: Sequence[nn.Module], plan: ZeroPlan, dp: int) -> int:
    """Elements of which one of `dp` ranks keeps the optimizer states (stage 3: and weights), fillers included.

    From the very groups that `build_engine` gives to DeepSpeed, which cuts each into equal parts (at stage 3 each
    parameter). The modules may be on the meta device.
    """
    parameters = dict.fromkeys(parameter for part in parts for parameter in part.parameters())
    members = [[p.numel() for p in group["params"]] for group in _groups(parameters, plan, dp)]
    if plan.zero.stage == 3:
        return sum(-(-count // dp) for counts in members for count in counts)
    return sum(sum(counts) for counts in members) // (1 if plan.zero.stage == 0 else dp)


def check_states(plan: ZeroPlan, shards: Mapping[str, Shard], dp: int) -> None:
    """Refuse what a part of a parameter cannot have as the whole one would; all at once, the same on all ranks.

    dp: number of data-parallel ranks, into whose equal slices stage 3 cuts each parameter
    """
    problems = [(name, problem) for name, shard in shards.items() if shard.split for problem in _misfits(plan, shard)]
    if problems:
        raise UsageError("\n".join(["optimizer states and gradients do not fit parallel.tp:", *together(problems)]))
    if plan.zero.stage < 3 or dp == 1:
        return
    sliced = [(name, problem) for name, shard in shards.items() for problem in _cut_blocks(plan, shard, dp)]
    if sliced:
        raise UsageError("\n".join(["optimizer states do not fit zero.stage 3:", *together(sliced)]))


def _cut_blocks(plan: ZeroPlan, shard: Shard, dp: int) -> Iterator[str]:
    count = math.prod(shard.shape)
    parts = plan.optimizer.storage.parts(shard.shape)
    if any(part.per > 1 for part in parts.values()) and -(-count // dp) % UNIT:
        yield (
            f"{count} elements in equal slices on {dp} ranks cut blocks of {UNIT} elements, by which its states are "
            "stored; use zero.stage 1 or 2, another number of ranks, or states without blocks"
        )


def _misfits(plan: ZeroPlan, shard: Shard) -> Iterator[str]:
    storage: Update = plan.optimizer.storage
    parts, whole = storage.parts(shard.shape), storage.parts(shard.whole)
    if [(key, part.per, part.dtype) for key, part in parts.items()] != [
        (key, part.per, part.dtype) for key, part in whole.items()
    ]:
        yield (
            f"{math.prod(shard.shape)} elements on a rank are so few that their optimizer states would be stored "
            "otherwise than unsharded ones; choose a smaller parallel.tp, or FP32 states"
        )
    if storage.sums_length(shard.shape) or any(part.per == 0 and part.length > 1 for part in parts.values()):
        yield (
            "optimizer states of whole rows and columns (rank-1, factored) are not built for parallel.tp "
            "above 1; choose block states, or tp 1"
        )
    if any(part.per > 1 for part in parts.values()) and not shard.multiples_of(UNIT):
        yield (
            f"parallel.tp cuts it within blocks of {UNIT} elements, by which its optimizer states are stored; "
            "choose a smaller parallel.tp, sizes that divide, or states without blocks"
        )
    if shard.repeated and (why := _differs_between_copies(plan)):
        yield (
            f"parallel.tp exceeds the key/value heads, which ranks then hold copies of; {why} would let them "
            "drift apart; choose a smaller parallel.tp, or drop it"
        )


def _differs_between_copies(plan: ZeroPlan) -> str | None:
    """What would treat two copies of the same rows differently, because it looks at everything that a rank holds."""
    optimizer, gradients = plan.optimizer, plan.gradients
    if plan.zero.stage == 3:
        return "zero.stage 3"
    if parse_payload(gradients.payload).spec is not None:
        return f"gradients.payload {gradients.payload}"
    if gradients.accumulate == "fp8":
        return "gradients.accumulate fp8"
    if plan.zero.gather != "exact":
        return f"zero.gather {plan.zero.gather}"
    if optimizer.update == "stochastic" or optimizer.exp_avg.endswith("_sr") or optimizer.exp_avg_sq.endswith("_sr"):
        return "stochastic rounding of weights or states"
    return None


def _groups(parameters: Iterable[nn.Parameter], plan: ZeroPlan, dp: int) -> list[dict]:
    """Two groups: parameters of two or more dimensions decay, the rest do not; up to stage 2 filled to whole units."""
    stage = plan.zero.stage
    matrices, vectors = [], []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    return [
        {"params": _filled(members, dp if stage else 1) if stage < 3 else members, "weight_decay": decay}
        for members, decay in ((matrices, plan.optimizer.weight_decay), (vectors, 0.0))
        if members
    ]


def _filled(parameters: list[nn.Parameter], ranks: int) -> list[nn.Parameter]:
    """Fillers after every parameter that ends within a unit, and at the end so that every partition is whole units."""
    filled, total = [], 0
    for parameter in parameters:
        filled.append(parameter)
        missing = -parameter.numel() % UNIT
        total += parameter.numel() + missing
        if missing:
            filled.append(nn.Parameter(parameter.new_zeros(missing)))
    if missing := -total % (UNIT * ranks):
        filled.append(nn.Parameter(parameters[0].new_zeros(missing)))
    return filled


def _deepspeed_config(model: nn.Module, plan: ZeroPlan) -> dict[str, Any]:
    """DeepSpeed's JSON. It ignores unknown top-level keys, so every key here is one that it documents."""
    elements = sum(p.numel() for p in model.parameters())
    on_gpu = next(model.parameters()).is_cuda
    low_precision = next(model.parameters()).dtype == torch.bfloat16
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": plan.optimizer.clip,
        "steps_per_print": 2**31,
        "bf16": {"enabled": low_precision, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": max(plan.zero.stage, 1),  # stage 0 is stage 1 over a group of one
            # A bucket is allocated whole: one larger than the model would only waste memory.
            "reduce_bucket_size": min(plan.zero.reduce_bucket, elements),
            "overlap_comm": on_gpu and not (plan.layout and plan.layout.pipeline),
            "contiguous_gradients": True,
        },
    }
