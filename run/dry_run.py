"""What one rank of a run would hold, without the run: `train.py --recipe NAME --dry-run`.

The rank's modules are placed, sharded and put under their precision policy by the code of a real run (run/local.py), on
the meta device, which has shapes but no memory, under a process group that sends nothing. DeepSpeed cannot be built
without memory: the size of its partition is computed from the groups that it would be given (lowprec/zero.py). No
data, tokenizer or device is looked at and nothing is written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from errors import UsageError
from lowprec.apply import Precision
from lowprec.backend import reasons_of_the_recipe
from lowprec.policy import brief
from lowprec.quantized import block_of
from lowprec.slots import SLOT_AXES, specs_of
from lowprec.zero import ZeroPlan, check_states, partition_size
from model.weights import parameter_shapes
from parallel.mesh import Mesh, ParallelConfig, build_mesh
from parallel.pipeline import rank_of, stage_range
from recipe import Recipe, refuse
from run.local import DTYPES, Placed, give_precision, place_parts, situation, stage_layers, zero_plan

META = torch.device("meta")
T = TypeVar("T")


def dry_run(recipe: Recipe, world_size: int | None = None, rank: int | None = None) -> str:
    """The report on rank `rank` (by default 0) of `world_size` (parallel.ranks, else 1).

    Raises UsageError with everything that a run would refuse, and at once what it would refuse one after the other.
    """
    world_size, rank = recipe.parallel.ranks or 1 if world_size is None else world_size, rank or 0
    if not 0 <= rank < world_size:
        raise UsageError(f"--rank {rank} of --world-size {world_size}; it must be at least 0 and below the world size")
    problems = recipe.problems(world_size)
    if problems:  # this layout cannot be built; whether the policy fits the undivided model can still be said
        if not recipe.section_problems():
            undivided = replace(recipe, parallel=ParallelConfig())
            _attempt(problems, lambda: give_precision(undivided, Mesh(), _place(undivided, Mesh()), _dtype(recipe)))
        refuse(recipe, problems)
    with fake_group(rank, world_size):
        mesh = build_mesh(recipe.parallel)
        placed = _place(recipe, mesh)
        precision = _attempt(problems, lambda: give_precision(recipe, mesh, placed, _dtype(recipe)))
        if recipe.precision.backend == "te" and precision is not None:
            problems += reasons_of_the_recipe(situation(recipe, mesh, placed, META.type))
        plan = zero_plan(recipe, mesh, placed)
        _attempt(problems, lambda: check_states(plan, placed.held, mesh.dp))
        refuse(recipe, problems)
        assert precision is not None, "refused"
        sections = (
            _whole_model(recipe),
            _layout(recipe, mesh),
            _batches(recipe, mesh),
            _local_model(placed),
            _partition(plan, placed, mesh),
            [f"precision policy {recipe.precision.policy}", *precision.describe().splitlines()],
            _padding(recipe, precision),
        )
        return "\n".join(line for section in sections for line in section)


def _dtype(recipe: Recipe) -> torch.dtype:
    return DTYPES[recipe.model.dtype]


def _place(recipe: Recipe, mesh: Mesh) -> Placed:
    return place_parts(recipe, mesh, META, _dtype(recipe))


def _attempt(problems: list[str], step: Callable[[], T]) -> T | None:
    """What `step` returns; if it refuses, its reasons join the problems."""
    try:
        return step()
    except UsageError as error:
        problems += str(error).splitlines()
        return None


@contextmanager
def fake_group(rank: int, world_size: int) -> Iterator[None]:
    """A default process group of which this process is `rank`; its collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _whole_model(recipe: Recipe) -> Iterator[str]:
    """The parameter count as a sum over the modules, which must be that of the model's closed formula."""
    blocks: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for name, shape in parameter_shapes(recipe.model).items():
        top, _, rest = name.partition(".")
        if top == "layers":
            blocks[rest.partition(".")[0]] += math.prod(shape)
        else:
            ends[top] += math.prod(shape)
    alike = Counter(blocks.values())
    terms = [f"{name} {count:,}" for name, count in ends.items()]
    terms += [f"{times} blocks x {count:,}" for count, times in alike.items()]
    total = sum(ends.values()) + sum(blocks.values())
    assert total == recipe.model.parameter_count(), (total, recipe.model.parameter_count())
    yield f"{recipe.name}: {total:,} parameters = {' + '.join(terms)}"


def _layout(recipe: Recipe, mesh: Mesh) -> Iterator[str]:
    counts, config = stage_layers(recipe), recipe.parallel
    for stage, count in enumerate(counts):
        blocks = stage_range(stage, counts)
        parts = ["embedding"] if stage == 0 else []
        parts += [f"{count} blocks {blocks[0]}-{blocks[-1]}"]
        parts += ["norm, logits, loss"] if stage == len(counts) - 1 else []
        yield f"stage {stage} on pipeline rank {rank_of(stage, config)}: {', '.join(parts)}"
    yield (
        f"rank {mesh.rank} of {mesh.world_size}: tp {mesh.tp_rank} of {mesh.tp}, dp {mesh.dp_rank} of {mesh.dp}, "
        f"pp {mesh.pp_rank} of {mesh.pp}"
    )
    groups = {
        "tensor": mesh.tp_group,
        "data": mesh.dp_group if mesh.sharded else dist.group.WORLD,
        "pipeline": mesh.pp_group,
        "stage": mesh.stage_group,
        "tied embeddings": mesh.tied_group if recipe.model.tied_embeddings else None,
    }
    for name, group in groups.items():
        if group is not None and (ranks := dist.get_process_group_ranks(group))[1:]:
            yield f"  {name} group of {len(ranks)}: {_series(ranks)}"


def _series(ranks: Sequence[int]) -> str:
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]}"


def _batches(recipe: Recipe, mesh: Mesh) -> Iterator[str]:
    train = recipe.train
    tokens = train.global_batch * train.seq_len
    count = train.global_batch // (train.micro_batch * mesh.dp)
    yield f"{count} micro-batches a step of {train.micro_batch} x {train.seq_len:,} tokens on each data-parallel rank"
    yield f"{train.steps:,} steps x {train.global_batch:,} x {train.seq_len:,} = {train.steps * tokens:,} tokens"
    yield f"recomputation: {recipe.model.recompute}"
    for begin, phase in zip(recipe.data_phases(), recipe.data.phases, strict=True):
        yield f"data from step {begin // train.global_batch:,} on: {phase.train or 'yours'}"


def _local_model(placed: Placed) -> Iterator[str]:
    """This rank's parameters, those of equal name and shape in one line, with the whole shape where it is another."""
    parameters = {name: tuple(p.shape) for part in placed.parts for name, p in part.named_parameters()}
    yield f"{sum(map(math.prod, parameters.values())):,} parameters on this rank"
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in parameters.items():
        alike.setdefault((name.split(".", 2)[-1] if name.startswith("layers.") else name, shape), []).append(name)
    for (_, shape), names in alike.items():
        shard = placed.held[names[0]]
        note = f" of {list(shard.whole)}" if shard.split else ""
        note += "" if any(run.owned for run in shard.runs) else ", counted by another rank"
        yield f"  {brief(names)} {list(shape)}{note}"


def _partition(plan: ZeroPlan, placed: Placed, mesh: Mesh) -> Iterator[str]:
    what = "states and weights" if plan.zero.stage == 3 else "states"
    size = partition_size(placed.parts, plan, mesh.dp)
    yield f"ZeRO stage {plan.zero.stage}: {what} of {size:,} elements here (computed: DeepSpeed itself needs memory)"
    if plan.gradients.two_level:
        yield "gradients.two_level is not looked at: it depends on how the ranks lie on nodes"


def _padding(recipe: Recipe, precision: Precision) -> Iterator[str]:
    """Matrices that end within a quantization block: the emulation pads them with zeros, as a run here does."""
    tokens, found = recipe.train.micro_batch * recipe.train.seq_len, dict[str, None]()
    for name, layer in precision.layers.items():
        sizes = {
            "x": (tokens, layer.in_features),
            "w": (layer.out_features, layer.in_features),
            "dy": (tokens, layer.out_features),
        }
        for slot, spec in (pair for _, table in precision.tables for pair in specs_of(table[name]).items()):
            if spec is None or spec.block in ("row", "tensor"):
                continue
            kind, axis = SLOT_AXES[slot]
            block = block_of(spec, axis, *sizes[kind])
            if any(size % unit for size, unit in zip(sizes[kind], block, strict=True)):
                found[f"{kind} {list(sizes[kind])} of {name.split('.', 2)[-1]} ({slot}, blocks {list(block)})"] = None
    if found:
        yield "padded with zeros to whole blocks, which kernels on GPUs may refuse:"
        yield from (f"  {line}" for line in found)
