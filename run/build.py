"""From a recipe to a run: data, model, ZeRO engine, records, and the position that it resumes from.

Nothing here computes a step; train.py does. What the parts are is said in their own files; this one only connects.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.loader import Data, open_data
from errors import CheckpointError, UsageError
from lowprec import kernels
from lowprec.policy import HIGH
from parallel import checkpoint
from parallel.mesh import build_mesh
from parallel.saver import Saver
from recipe import Recipe, to_dict
from report.flops import faster_gemm, find_peak
from report.manifest import Start
from run.environment import Launch, choose_device, join, keep_memory, use_all_cores
from run.local import DTYPES, build_local, initial_weights
from run.records import Records, Scale
from run.signals import StopRequest
from run.state import AMAX, Run, restore_random_states
from run.stragglers import Stragglers
from run.watchdog import Watchdog

log = logging.getLogger(__name__)


def build(
    recipe: Recipe, launch: Launch, resume: str, *, allow_precision_change: bool = False, wandb_mode: str = "offline"
) -> Run:
    """Everything ready for the next step: fresh, or resumed from a checkpoint. Collective over all ranks.

    resume: auto (the newest valid checkpoint of the run directory, if any), never, or the path of a checkpoint.
    allow_precision_change: resume under another precision table than the checkpoint's.
    """
    find = lambda: checkpoint.resolve(Path(recipe.run.dir), resume)  # noqa: E731
    run, start = assemble(recipe, launch, find, allow_precision_change=allow_precision_change)
    if run.mesh.rank == 0:
        _open_records(run, launch, start, resume, wandb_mode)
        peak, flops = run.records.scale.peak, run.records.scale.flops_per_token
        run.records.message(f"peak {peak}; {flops / 1e6:.1f} MFLOP a token")
        run.records.message(f"precision policy {recipe.precision.policy}\n{run.precision.describe()}")
        if run.local.backend is not None:
            run.records.message(run.local.backend.news)
    if start is not None:
        run.prove_resume(start)
    run.watchdog.start(run.step)
    return run


def assemble(
    recipe: Recipe,
    launch: Launch,
    find: Callable[[], checkpoint.Checkpoint | None],
    *,
    allow_precision_change: bool = False,
) -> tuple[Run, checkpoint.Checkpoint | None]:
    """A run that stands where the checkpoint of `find` does, or at its start, and writes nothing yet. Collective."""
    stop = StopRequest(launch.end_time and launch.end_time - recipe.run.stop_before_s)
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
        starts=recipe.data_phases(),
    )
    _check_validation(recipe, data)
    join(device, launch, recipe.parallel.timeout_s)
    mesh = build_mesh(recipe.parallel)
    start = find()
    # A resumed run multiplies as before: another order of additions would not be bit-equal.
    saved = start.meta.get("gemm_dtype") if start is not None and device.type == "cpu" else None
    gemm_dtype = getattr(torch, saved) if saved else _gemm_dtype(DTYPES[recipe.model.dtype], device)
    local = build_local(recipe, mesh, device, gemm_dtype, launch.local_world_size)
    if start is None:
        local.engine.fill_weights(initial_weights(recipe))
    dist.barrier()  # so that all ranks of a node measure the peak under the load of all
    scale = Scale(
        flops_per_token=recipe.model.flops_per_token(recipe.train.seq_len),
        peak=find_peak(device, gemm_dtype),
        devices=mesh.world_size,
        device=device,
        node_size=launch.local_world_size,
    )
    records = Records(recipe, scale)
    announce = lambda path: records.message(f"saved {path}")  # noqa: E731
    saver = Saver(Path(recipe.run.dir), recipe.checkpoint, announce, recipe.parallel.timeout_s)
    watchdog = Watchdog(recipe.watch, Path(recipe.run.dir), mesh.rank, recipe.parallel.timeout_s)
    run = Run(recipe, mesh, device, data, local, records, saver, stop, watchdog, Stragglers(recipe.watch, device))
    if start is not None:
        restore(run, start, allow_precision_change=allow_precision_change)
    return run, start


def _check_validation(recipe: Recipe, data: Data) -> None:
    if recipe.eval.interval and data.validation is None:
        raise UsageError("eval.interval is set, data.validation is null; name validation data, or set eval.interval=0")


def _gemm_dtype(model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`faster_gemm` as rank 0 finds it, for all ranks: they would add in another order otherwise."""
    chosen = torch.tensor(faster_gemm(model_dtype, device) == torch.float32, dtype=torch.uint8, device=device)
    dist.broadcast(chosen, src=0)
    return torch.float32 if chosen else model_dtype


def restore(run: Run, start: checkpoint.Checkpoint, *, allow_precision_change: bool = False) -> None:
    """Continue from `start`: weights, optimizer states, update count, amax histories, position, random states.

    Collective. The run may be fresh, or at any later step.
    """
    if start.meta["precision"] != run.precision.table() and not allow_precision_change:
        raise CheckpointError(
            f"{start.path} was trained under another precision table ({start.meta['recipe']['precision']['policy']}, "
            f"this run {run.recipe.precision.policy}); use that recipe, or say --allow-precision-change"
        )
    own = checkpoint.load(start, run.fragments(), optional=frozenset({AMAX}))
    run.engine.updates = start.meta["updates"]
    run.engine.refresh_weights()
    run.step, run.samples = start.step, start.meta["samples"]
    run.guard.load(start.meta.get("spikes", {}))
    if start.meta.get("layout", run.layout()) != run.layout():
        log.warning("the checkpoint is of another layout: random states and residuals of error feedback begin anew")
        return
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
        topology={"dp": run.mesh.dp, "tp": run.mesh.tp, "pp": run.mesh.pp},
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
        if path in {"name", "description", "run", "metrics", "watch", "probe", "train.stop_at"}:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from changes(before, after, f"{path}.")
        elif before != after:
            yield f"{path}: {before} -> {after}"
