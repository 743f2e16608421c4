"""This rank's part of the model: built on the meta device, sharded, in its precision, under ZeRO and the pipeline.

    recipe -> stages of this rank -> tensor-parallel shards -> memory -> low precision -> communication -> ZeRO
           -> pipeline schedule

No rank ever holds more than its stages' shards of the model, in the model's own type (but while it reads
model.init_from); ZeRO 3 cuts them further once they have memory. Initial weights are the same for every layout: they
are drawn by name and element (model/init.py).
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import UsageError
from lowprec.apply import Precision, RunFacts, phases
from lowprec.backend import Backend, Situation, choose
from lowprec.engine import Engine
from lowprec.fragments import Fragment, Shard, matrix_shape
from lowprec.payload import Payload, parse_payload
from lowprec.slots import Place
from lowprec.zero import Layout, ZeroPlan, build_engine
from model.block import Block
from model.init import initial_range
from model.transformer import Transformer
from model.weights import load_initial_weights, logical_shape, parameter_shapes
from parallel import tensor
from parallel.mesh import SPLIT_BACKWARD, Mesh, Mpu, node_groups
from parallel.pipeline import Callbacks, Hidden, Pipeline, balance, stage_range, stages_of
from recipe import Recipe, load_policy
from run.joints import joints

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Local:
    """parts: the model, or this rank's stages of it; pipeline: None without pipeline parallelism.

    backend: what multiplies the quantized linears, and why; None if there are none
    tied:    the two pipeline ranks that hold a copy each of a tied embedding; None if there are none, or on other ranks
    """

    parts: Sequence[Transformer]
    precision: Precision
    engine: Engine
    pipeline: Pipeline | None
    backend: Backend | None
    tied: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Placed:
    """This rank's stages in their local shapes; what of each parameter of the model a rank of its tensor rank holds."""

    parts: Sequence[Transformer]
    held: dict[str, Shard]
    tp: tensor.TensorParallel


def build_local(
    recipe: Recipe, mesh: Mesh, device: torch.device, gemm_dtype: torch.dtype, node_size: int | None = None
) -> Local:
    """Everything of the model on this rank, weights not yet filled in. Collective over the mesh.

    node_size: processes a node; by default all are on one
    """
    placed = place_parts(recipe, mesh, device, gemm_dtype)
    backend = choose(situation(recipe, mesh, placed, device.type))
    precision = give_precision(recipe, mesh, placed, gemm_dtype, backend)
    parts = placed.parts
    if should_compile(recipe, device):
        compile_parts(parts)
    nodes = node_groups(mesh, node_size or mesh.world_size) if recipe.gradients.two_level else None
    plan = replace(zero_plan(recipe, mesh, placed), nodes=nodes)
    engine = build_engine(parts, plan)
    if backend is not None and backend.te and recipe.precision.wgrad_output == "fp32":
        engine.lend_main_grads([layer.weight for layer in precision.layers.values()], split=_split_backward(recipe))
    tied = None if plan.layout is None else plan.layout.tied
    return Local(parts, precision, engine, _pipeline(recipe, mesh, device, parts, precision, engine), backend, tied)


def place_parts(recipe: Recipe, mesh: Mesh, device: torch.device, gemm_dtype: torch.dtype) -> Placed:
    """The modules of this rank's stages, sharded, with uninitialised memory on `device` (none on meta)."""
    parts = _parts(recipe, mesh, gemm_dtype)
    tp = tensor.TensorParallel.of(mesh, recipe.parallel.sp)
    held = _shards(recipe, mesh, parts, tp)
    tensor.shard(parts, held, tp)
    for part in parts:
        part.to_empty(device=device)
    _tie(parts)
    return Placed(parts, held, tp)


def give_precision(
    recipe: Recipe, mesh: Mesh, placed: Placed, gemm_dtype: torch.dtype, backend: Backend | None = None
) -> Precision:
    """Put the recipe's policy to work on the placed modules, then the communication around them. Raises UsageError.

    backend: whose layers run it; None: ours
    """
    facts = replace(_facts(recipe, mesh, placed), gemm_dtype=gemm_dtype)
    if backend is not None:
        facts = replace(facts, swap=backend.swap(joints(placed.parts), placed.tp.sp))
    precision = Precision(placed.parts, load_policy(recipe.precision.policy), recipe.precision, facts)
    for part in placed.parts:
        part.recompute_context = precision.recompute_context
    tensor.connect(placed.parts, placed.held, placed.tp, _payloads(recipe, precision))
    return precision


def situation(recipe: Recipe, mesh: Mesh, placed: Placed, device: str) -> Situation:
    """What decides whose layers can run the recipe, the same on all ranks."""
    facts, shapes = _facts(recipe, mesh, placed), {}
    for name in facts.linears or ():
        shard = placed.held[f"{name}.weight"]
        shapes[name] = (sum(run.rows for run in shard.runs), shard.columns[1])
    tables = phases(shapes, load_policy(recipe.precision.policy), recipe.precision, facts)
    tokens = recipe.train.micro_batch * recipe.train.seq_len // (mesh.tp if recipe.parallel.sp else 1)
    return Situation([table for _, table in tables], shapes, tokens, device, recipe.precision, _without_te(recipe))


def _without_te(recipe: Recipe) -> list[str]:
    """Settings that Transformer Engine's layers do not join in."""
    found, parallel, model = [], recipe.parallel, recipe.model
    if recipe.zero.stage == 3:
        found.append("zero.stage is 3, which frees weights that its layers keep for the backward; use stage 0 to 2")
    if parallel.sp_payload != "exact":
        found.append(
            f"parallel.sp_payload is {parallel.sp_payload}, but its layers gather sequences themselves, in their own "
            "format; use exact"
        )
    if recipe.probe.on:
        found.append("probe is on, which watches our own linears; set probe.interval=0 and probe.te_debug=null")
    if recipe.precision.wgrad_output == "fp32" and "*" in "".join(model.blocks) and parallel.tp > model.kv_heads:
        found.append(
            "precision.wgrad_output is fp32, which its GEMMs add up themselves, but parallel.tp exceeds the key/value "
            "heads, whose gradients must be summed over ranks first; use bf16"
        )
    return found


def stage_layers(recipe: Recipe) -> tuple[int, ...]:
    """Blocks of each pipeline stage: as the recipe says, or balanced by their FLOPs."""
    config, model = recipe.parallel, recipe.model
    if config.stage_layers is not None:
        return config.stage_layers
    costs = model.block_flops(recipe.train.seq_len)
    return balance(costs, config.stages, (0, model.flops_per_token(recipe.train.seq_len) - sum(costs)))


def _parts(recipe: Recipe, mesh: Mesh, gemm_dtype: torch.dtype) -> list[Transformer]:
    """This rank's stages, on the meta device, unsharded."""
    counts, stages = stage_layers(recipe), recipe.parallel.stages
    with torch.device("meta"):
        return [
            Transformer(
                recipe.model,
                recipe.train.z_loss,
                gemm_dtype,
                blocks=stage_range(stage, counts),
                first=stage == 0,
                last=stage == stages - 1,
            )
            for stage in stages_of(mesh.pp_rank, recipe.parallel)
        ]


def _shards(recipe: Recipe, mesh: Mesh, parts: Sequence[Transformer], tp: tensor.TensorParallel) -> dict[str, Shard]:
    """What this rank holds of each parameter of the model, if its stage has it."""
    shapes = {name: logical_shape(recipe.model, name, shape) for name, shape in parameter_shapes(recipe.model).items()}
    held = tensor.shards(shapes, tp)
    if _second_copy(mesh, parts):
        held["embedding.weight"] = held["embedding.weight"].disowned()
    return held


def _second_copy(mesh: Mesh, parts: Sequence[Transformer]) -> bool:
    """Whether the embedding here is a copy for the logits, which another rank owns."""
    return mesh.pp > 1 and hasattr(parts[-1], "embedding") and not parts[0].first


def _tie(parts: Sequence[Transformer]) -> None:
    """One embedding for the first and the last stage, where one rank has both."""
    first, last = parts[0], parts[-1]
    if first is not last and first.first and hasattr(last, "embedding"):
        last.embedding = first.embedding


def _facts(recipe: Recipe, mesh: Mesh, placed: Placed) -> RunFacts:
    train = recipe.train
    with torch.device("meta"):
        whole = Transformer(recipe.model)
    linears = [name for name, module in whole.named_modules() if isinstance(module, nn.Linear)]
    return RunFacts(
        seed=train.seed,
        steps=train.steps,
        tokens_per_step=train.global_batch * train.seq_len,
        keep_weights=recipe.zero.stage < 3,
        swap_all=_split_backward(recipe),
        linears=linears,
        places={name: place for name in linears if (place := _place(placed.held[f"{name}.weight"], mesh))},
    )


def _split_backward(recipe: Recipe) -> bool:
    """Whether weight gradients are computed apart from the backward."""
    return recipe.parallel.pp > 1 and recipe.parallel.schedule in SPLIT_BACKWARD


def _place(shard: Shard, mesh: Mesh) -> Place | None:
    """Where a linear's matrices lie among the tensor-parallel ranks'; None if it is whole."""
    if not shard.split:
        return None
    by_rows = shard.columns[1] == matrix_shape(shard.whole)[1]
    split = frozenset({"w", "dy"} if by_rows else {"w", "x"})
    return Place(tuple((run.start, run.rows) for run in shard.runs), shard.columns, split, mesh.tp_group)


def _payloads(recipe: Recipe, precision: Precision) -> dict[str, Payload]:
    """Linears whose input may travel quantized: those whose forward quantizes it so, in every phase."""
    if recipe.parallel.sp_payload == "exact":
        return {}
    payload = parse_payload(recipe.parallel.sp_payload)
    tables = [table for _, table in precision.tables]
    found = [
        name
        for name in tables[0]
        if tensor.enters(name) and all(table[name].fprop.a == payload.spec for table in tables)
    ]
    if recipe.model.hidden_size % payload.block:
        raise UsageError(
            f"parallel.sp_payload {payload.name} has blocks of {payload.block}, which model.hidden_size "
            f"{recipe.model.hidden_size} would cut; use parallel.sp_payload=exact"
        )
    if not found:
        raise UsageError(
            f"parallel.sp_payload is {payload.name}, but the forward of no linear quantizes its input so under policy "
            f"{recipe.precision.policy}; use parallel.sp_payload=exact"
        )
    return dict.fromkeys(found, payload)


def zero_plan(recipe: Recipe, mesh: Mesh, placed: Placed) -> ZeroPlan:
    """What the engine is told of the placed modules."""
    train, parts, layout = recipe.train, placed.parts, None
    if mesh.sharded:
        tied = mesh.pp > 1 and recipe.model.tied_embeddings and any(hasattr(part, "embedding") for part in parts)
        both = recipe.parallel.stages - 1 in stages_of(0, recipe.parallel)
        layout = Layout(
            Mpu(mesh),
            tensor=mesh.tp_group if mesh.tp > 1 else None,
            stage=mesh.stage_group,
            pipeline=mesh.pp > 1,
            tied=mesh.tied_group if tied and not both else None,
        )
    return ZeroPlan(
        zero=recipe.zero,
        optimizer=recipe.optimizer,
        gradients=recipe.gradients,
        micro_batch=train.micro_batch,
        accumulation=train.global_batch // (train.micro_batch * mesh.dp),
        shards=placed.held,
        layout=layout,
        seed=train.seed,
        update_norm=recipe.spikes.update_norm and recipe.spikes.action != "off",
    )


def _pipeline(
    recipe: Recipe,
    mesh: Mesh,
    device: torch.device,
    parts: Sequence[Transformer],
    precision: Precision,
    engine: Engine,
) -> Pipeline | None:
    if mesh.pp == 1:
        return None
    train, config = recipe.train, recipe.parallel
    sequence = train.seq_len // mesh.tp if config.sp else train.seq_len
    hidden = Hidden(train.micro_batch, sequence, recipe.model.hidden_size, DTYPES[recipe.model.dtype], device)
    if _split_backward(recipe):
        precision.shared.deferred = []
    callbacks = Callbacks(at=precision.at, queue=precision.shared.deferred, add=engine.add_gradient)
    return Pipeline(config, mesh, parts, hidden, train.global_batch // (train.micro_batch * mesh.dp), callbacks)


def initial_weights(recipe: Recipe) -> Callable[[Fragment], Tensor]:
    """Fragment -> its initial FP32 values: from model.init_from, or drawn from the seed."""
    given = None
    if recipe.model.init_from:
        given = load_initial_weights(Path(recipe.model.init_from), recipe.model)

    def whole(name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        if given is not None:
            return given[name].flatten()[start:stop].float()
        return initial_range(recipe.model, recipe.train.seed, name, shape, start, stop)

    def values(fragment: Fragment) -> Tensor:
        shard, stop = fragment.shard, fragment.offset + fragment.extent.count
        if shard is None or not shard.split:
            return whole(fragment.name, fragment.shape, fragment.offset, stop)
        width, (first, columns) = matrix_shape(shard.whole)[1], shard.columns
        pieces, at = [], 0
        for run in shard.runs:  # the rows of this run that the fragment touches, then what it has of them
            low, high = max(fragment.offset, at), min(stop, at + run.rows * columns)
            if low < high:
                top, bottom = (low - at) // columns, -(-(high - at) // columns)
                rows = whole(fragment.name, shard.whole, (run.start + top) * width, (run.start + bottom) * width)
                part = rows.view(-1, width)[:, first : first + columns].reshape(-1)
                pieces.append(part[low - at - top * columns : high - at - top * columns])
            at += run.rows * columns
        return torch.cat(pieces)

    return values


def should_compile(recipe: Recipe, device: torch.device) -> bool:
    """Whether train.compile asks for torch.compile, or leaves it to us and it can work here."""
    if recipe.train.compile != "auto":
        return recipe.train.compile
    if recipe.zero.stage == 3:  # gathers weights in module hooks, which a compiled region would not run
        return False
    return device.type == "cuda" or any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++"))


@contextmanager
def uncompiled(parts: Sequence[Transformer]) -> Iterator[None]:
    """The blocks and the loss as `compile_parts` found them, for as long as this lasts: hooks are run."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    for part in parts:
        held += [(vars(block), "forward", vars(block).pop("forward", None)) for block in part.layers.values()]
        if part.last:
            state = vars(part.cross_entropy)
            held.append((state, "_compiled_call_impl", state.pop("_compiled_call_impl", None)))
    try:
        yield
    finally:
        for state, key, value in held:
            if value is not None:
                state[key] = value


def compile_parts(parts: Sequence[Transformer]) -> None:
    """Compile one code for all blocks of a kind, and the loss. Names and parameters stay as they are."""
    blocks: list[Any] = [block for part in parts for block in part.layers.values()]
    forwards = {  # isolated: kinds share neither guards nor the limit of recompilations
        block.sublayers: torch.compile(Block.forward, dynamic=False, isolate_recompiles=True)  # pyright: ignore[reportCallIssue]
        for block in blocks
    }
    for block in blocks:
        block.forward = functools.partial(forwards[block.sublayers], block)
    for part in parts:
        if part.last:
            part.cross_entropy.compile(dynamic=False)
