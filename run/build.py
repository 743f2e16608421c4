"""From a recipe to a run: data, model, ZeRO engine, records, and the position that it resumes from.

Nothing here computes a step; train.py does. What the parts are is said in their own files; this one only connects.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import Data, open_data
from errors import CheckpointError, UsageError
from lowprec import kernels
from lowprec.apply import Precision, RunFacts
from lowprec.engine import Engine
from lowprec.fragments import Fragment
from lowprec.policy import HIGH
from lowprec.zero import ZeroPlan, build_engine
from model.init import initial_range
from model.transformer import Transformer
from model.weights import load_initial_weights, logical_shape, parameter_shapes
from parallel import checkpoint
from parallel.mesh import Mesh, build_mesh
from recipe import Recipe, load_policy, to_dict
from report.flops import faster_gemm, find_peak
from report.manifest import Start
from run.environment import Launch, choose_device, join, keep_memory, use_all_cores
from run.records import Records, Scale
from run.signals import StopRequest
from run.state import AMAX, Run, restore_random_states

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build(
    recipe: Recipe, launch: Launch, resume: str, *, allow_precision_change: bool = False, wandb_mode: str = "offline"
) -> Run:
    """Everything ready for the next step: fresh, or resumed from a checkpoint. Collective over all ranks.

    resume: auto (the newest valid checkpoint of the run directory, if any), never, or the path of a checkpoint.
    allow_precision_change: resume under another precision table than the checkpoint's.
    """
    stop = StopRequest()
    device = choose_device(recipe.device, launch)
    keep_memory()
    use_all_cores(device, launch)
    if device.type == "cpu" and recipe.precision.policy != HIGH:
        kernels.available()  # built now, not inside the first step
    # Before ranks wait for each other: one rank a node may tokenise for longer than a collective waits.
    data = open_data(
        recipe.data,
        vocab_size=recipe.model.vocab_size,
        seq_len=recipe.train.seq_len,
        seed=recipe.train.seed,
    )
    _check_validation(recipe, data)
    join(device, launch, recipe.parallel.timeout_s)
    mesh = build_mesh(recipe.parallel)
    start = checkpoint.resolve(Path(recipe.run.dir), resume)
    # A resumed run multiplies as before: another order of additions would not be bit-equal.
    saved = start.meta.get("gemm_dtype") if start is not None and device.type == "cpu" else None
    gemm_dtype = getattr(torch, saved) if saved else _gemm_dtype(DTYPES[recipe.model.dtype], device)
    model, precision = _build_model(recipe, device, gemm_dtype)
    engine = _build_engine(recipe, model, mesh)
    if start is None:
        engine.fill_weights(_initial_weights(recipe))
    dist.barrier()  # so that all ranks of a node measure the peak under the load of all
    scale = Scale(
        flops_per_token=recipe.model.flops_per_token(recipe.train.seq_len),
        peak=find_peak(device, gemm_dtype),
        devices=mesh.world_size,
        device=device,
    )
    run = Run(recipe, mesh, device, data, engine, precision, Records(recipe, scale), stop)
    _restore(run, start, allow_precision_change)
    if mesh.rank == 0:
        _open_records(run, launch, start, resume, wandb_mode)
        run.records.message(f"peak {scale.peak}; {scale.flops_per_token / 1e6:.1f} MFLOP a token")
        run.records.message(f"precision policy {recipe.precision.policy}\n{precision.describe()}")
    return run


def _check_validation(recipe: Recipe, data: Data) -> None:
    if recipe.eval.interval and data.validation is None:
        raise UsageError("eval.interval is set, data.validation is null; name validation data, or set eval.interval=0")


def _build_model(recipe: Recipe, device: torch.device, gemm_dtype: torch.dtype) -> tuple[Transformer, Precision]:
    """The model with its precision applied, parameters uninitialised (the engine fills them from FP32 masters)."""
    train = recipe.train
    with torch.device(device):
        model = Transformer(recipe.model, z_loss=train.z_loss, gemm_dtype=gemm_dtype)
    facts = RunFacts(
        seed=train.seed,
        steps=train.steps,
        tokens_per_step=train.global_batch * train.seq_len,
        keep_weights=recipe.zero.stage < 3,
        gemm_dtype=gemm_dtype,
    )
    precision = Precision(model, load_policy(recipe.precision.policy), recipe.precision, facts)
    if should_compile(recipe, device):
        compile_model(model)
    return model, precision


def _gemm_dtype(model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`faster_gemm` as rank 0 finds it, for all ranks: they would add in another order otherwise."""
    chosen = torch.tensor(faster_gemm(model_dtype, device) == torch.float32, dtype=torch.uint8, device=device)
    dist.broadcast(chosen, src=0)
    return torch.float32 if chosen else model_dtype


def _build_engine(recipe: Recipe, model: Transformer, mesh: Mesh) -> Engine:
    train = recipe.train
    plan = ZeroPlan(
        zero=recipe.zero,
        optimizer=recipe.optimizer,
        gradients=recipe.gradients,
        micro_batch=train.micro_batch,
        accumulation=train.global_batch // (train.micro_batch * mesh.dp),
        logical_shapes={
            name: logical_shape(recipe.model, name, shape) for name, shape in parameter_shapes(recipe.model).items()
        },
        seed=train.seed,
    )
    return build_engine(model, plan)


def _initial_weights(recipe: Recipe) -> Callable[[Fragment], Tensor]:
    """Fragment -> its initial FP32 values: from model.init_from, or drawn from the seed."""
    given = None
    if recipe.model.init_from:
        given = load_initial_weights(Path(recipe.model.init_from), recipe.model)

    def values(fragment: Fragment) -> Tensor:
        start, stop = fragment.offset, fragment.offset + fragment.extent.count
        if given is not None:
            return given[fragment.name].flatten()[start:stop]
        return initial_range(recipe.model, recipe.train.seed, fragment.name, fragment.shape, start, stop)

    return values


def should_compile(recipe: Recipe, device: torch.device) -> bool:
    """Whether train.compile asks for torch.compile, or leaves it to us and it can work here."""
    if recipe.train.compile != "auto":
        return recipe.train.compile
    if recipe.zero.stage == 3:  # gathers weights in module hooks, which a compiled region would not run
        return False
    return device.type == "cuda" or any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++"))


def compile_model(model: Transformer) -> None:
    """Compile one code for all blocks, and the loss. Names and parameters stay as they are."""
    block_forward = torch.compile(type(model.layers[0]).forward, dynamic=False)
    for block in model.layers:
        block.forward = functools.partial(block_forward, block)
    model.cross_entropy.compile(dynamic=False)


def _restore(run: Run, start: checkpoint.Checkpoint | None, allow_precision_change: bool) -> None:
    """Continue from `start`: weights, optimizer states, update count, amax histories, position, random states."""
    if start is None:
        return
    if start.meta["precision"] != run.precision.table() and not allow_precision_change:
        raise CheckpointError(
            f"{start.path} was trained under another precision table ({start.meta['recipe']['precision']['policy']}, "
            f"this run {run.recipe.precision.policy}); use that recipe, or say --allow-precision-change"
        )
    own = checkpoint.load(start, run.fragments(), run.mesh.dp_group, optional=frozenset({AMAX}))
    run.engine.updates = start.meta["updates"]
    run.engine.refresh_weights()
    run.step, run.samples = start.step, start.meta["samples"]
    restore_random_states(own, run.device)
    run.engine.restore_own_states(own)


def _open_records(run: Run, launch: Launch, start: checkpoint.Checkpoint | None, resume: str, wandb_mode: str) -> None:
    run_dir = Path(run.recipe.run.dir)
    if resume == "never" and (aside := checkpoint.set_aside(run_dir)):
        log.warning("--resume never: the checkpoints of the earlier run are kept in %s", aside)
    entry = Start(
        step=run.step,
        recipe=to_dict(run.recipe),
        data=run.data.hashes(),
        hosts=launch.world_size // launch.local_world_size,
        topology={"dp": run.mesh.dp, "tp": run.recipe.parallel.tp, "pp": run.recipe.parallel.pp},
    )
    run.records.open(entry, run.samples, wandb_mode)
    (run_dir / "precision.json").write_text(json.dumps(run.precision.table(), indent=1) + "\n")
    if tokenizer := run.data.tokenizer_path:  # the run directory alone must be enough to export the model
        shutil.copyfile(tokenizer, run_dir / f"tokenizer{tokenizer.suffix}")
    if start is not None:
        run.records.message(f"resumed from {start.path} (step {start.step}, {run.samples} samples)")
        for line in changes(start.meta["recipe"], to_dict(run.recipe)):
            run.records.message(f"changed since that checkpoint: {line}")


def changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """`section.key: old -> new` for each key of the recipe that differs and can change what is computed."""
    for key in sorted(old.keys() | new.keys()):
        path = f"{prefix}{key}"
        if path in {"name", "description", "run", "metrics", "train.stop_at"}:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from changes(before, after, f"{path}.")
        elif before != after:
            yield f"{path}: {before} -> {after}"
