"""The parts that every rank is made of, traced once each: embedding, every kind of block, and norm, logits and loss.

A rank's work is a sum over its parts, and the blocks of a kind under the same six slots are alike. So a model of any
depth under any pipeline, data parallelism and ZeRO stage is put together from a handful of traces; what changes a
trace itself is a `View`. The parts are those that a run would build (run/local.py), on fake tensors.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from lowprec.apply import Precision
from lowprec.backend import reasons_of_the_recipe
from lowprec.fragments import Shard
from lowprec.linear import LowPrecisionLinear
from lowprec.native import native
from lowprec.payload import Payload, parse_payload
from model.attention import Attention
from model.mamba import Mamba
from model.transformer import Transformer, document_mask
from parallel.mesh import SPLIT_BACKWARD, Mesh, ParallelConfig, build_mesh
from recipe import Recipe
from report.plan.partition import Parameter
from report.plan.trace import Phase, Quantizers, Receipt, Trace
from run.dry_run import fake_group
from run.local import DTYPES, Placed, give_precision, place_parts, situation

Recompute = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class View:
    """What the traces of a layout depend on, beside recomputation.

    keep_weights: quantized weights are made once a step (not at ZeRO stage 3)
    split:        weight gradients are computed apart (zero-bubble schedules)
    gemm_dtype:   what exact operands are multiplied in
    """

    tp: int
    sp: bool
    keep_weights: bool
    split: bool
    gemm_dtype: torch.dtype


@dataclass(frozen=True)
class Unit:
    """One part of the model, one micro-batch, on one tensor-parallel rank.

    prepare:  quantizing its weights, once a step; keeps the copies
    forward:  keeps what the backward needs, the output included
    backward: recomputation included; its peak counts what the forward kept. With a split backward it keeps what the
              weight gradients need
    weights:  the weight gradients of a split backward, else nothing
    parameters: which it gives gradients to (of blocks of a kind those of the first one)
    """

    parameters: tuple[Parameter, ...]
    prepare: Phase
    forward: Phase
    backward: Phase
    weights: Phase


@dataclass(frozen=True)
class Linear:
    """A linear of the whole model as a tensor-parallel rank has it. whole: elements of all ranks' parts together;
    specs: its six slots, of the first phase."""

    name: str
    rows: int
    cols: int
    whole: int
    swapped: bool
    specs: Mapping[str, Any]


@dataclass(frozen=True)
class Units:
    """All parts of a model under one view, with one kind of recomputation.

    blocks:  the unit of each block, in order
    shared:  bytes that all parts of a stage use in a micro-batch: rotary angles, the mask of documents; in a pipeline,
             where positions come with each micro-batch, `shared_in_pipeline`
    held:    what this tensor-parallel rank has of each parameter of the model
    dims:    dimensions of each parameter as its module has it
    linears: all of the model
    hidden:  bytes of what travels between stages
    logits:  bytes of the logits of a micro-batch
    emulated: why no native kernels multiply the quantized linears, whatever the GPU; empty if they may
    """

    first: Unit
    blocks: tuple[Unit, ...]
    last: Unit
    shared: int
    shared_in_pipeline: int
    held: Mapping[str, Shard]
    dims: Mapping[str, int]
    linears: tuple[Linear, ...]
    hidden: int
    logits: int
    emulated: tuple[str, ...]


def view_of(recipe: Recipe, gemm_dtype: torch.dtype) -> View:
    """The view of a recipe's own layout."""
    parallel = recipe.parallel
    split = parallel.pp > 1 and parallel.schedule in SPLIT_BACKWARD
    return View(parallel.tp, parallel.sp, recipe.zero.stage < 3, split, gemm_dtype)


def trace_units(recipe: Recipe, view: View, recomputes: Sequence[Recompute] = RECOMPUTES) -> dict[Recompute, Units]:
    """Trace the parts, once for each kind of recomputation.

    Raises UsageError where the policy does not fit the model under this tensor parallelism.
    """
    whole = replace(
        recipe,
        parallel=ParallelConfig(tp=view.tp, sp=view.sp),
        zero=replace(recipe.zero, stage=1 if view.keep_weights else 3),
    )
    importlib.import_module("torch.distributed._tools.fake_collectives")  # registers those of tensors without memory
    with fake_group(0, view.tp), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        mesh = build_mesh(whole.parallel)
        placed = place_parts(whole, mesh, torch.device("meta"), view.gemm_dtype)
        (part,) = placed.parts
        with FakeTensorMode(allow_non_fake_inputs=True):
            _pretend(part)
            # A split backward swaps all linears; what else depends on pp was decided when the parts were placed.
            split = replace(whole, parallel=replace(whole.parallel, pp=2, schedule="zbv")) if view.split else whole
            precision = give_precision(split, replace(mesh, pp=2) if view.split else mesh, placed, view.gemm_dtype)
            for parameter in part.parameters():
                parameter.grad_dtype = torch.float32  # as lowprec/zero.py
                parameter.register_post_accumulate_grad_hook(_drop)
            payload = None if recipe.parallel.sp_payload == "exact" else parse_payload(recipe.parallel.sp_payload)
            tracer = _Tracer(whole, view, part, precision, placed.held, payload)
            emulated = _emulated(recipe, whole, mesh, placed)
            return {recompute: tracer.units(recompute, emulated) for recompute in recomputes}


def _emulated(recipe: Recipe, whole: Recipe, mesh: Mesh, placed: Placed) -> tuple[str, ...]:
    """Why Transformer Engine's kernels, the only native ones, do not multiply the linears. whole: as it is traced."""
    if recipe.precision.backend == "emulate":
        return ("precision.backend is emulate",)
    payload = recipe.parallel.sp_payload if whole.parallel.sp else "exact"
    asked = replace(whole, parallel=replace(whole.parallel, sp_payload=payload))
    case = situation(asked, mesh, placed, "cuda")
    custom = [slots.scheme for slots in case.schemes() if native(slots) is None]
    if recipe.precision.backend == "te" and custom:
        return (f"scheme {', '.join(custom)} is none of Transformer Engine's own recipes, which dequantize it first",)
    return tuple(reasons_of_the_recipe(case))


def _pretend(part: nn.Module) -> None:
    """Parameters on a CPU instead of on the meta device: what runs depends on it."""
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


class _Tracer:
    def __init__(
        self,
        recipe: Recipe,
        view: View,
        part: Transformer,
        precision: Precision,
        held: Mapping[str, Shard],
        payload: Payload | None,
    ) -> None:
        self.recipe, self.view, self.part, self.precision, self.held = recipe, view, part, precision, held
        self.payload = payload  # of gathered activations; the traced gathers are exact
        self.trace = Trace()
        shared = precision.shared
        shared.quantizers, shared.counts = Quantizers(self.trace), Receipt(self.trace)
        self.queue: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []
        shared.deferred = self.queue if view.split else None

    def units(self, recompute: Recompute, emulated: tuple[str, ...]) -> Units:
        train, model, part = self.recipe.train, self.recipe.model, self.part
        self._set(recompute)
        tokens = torch.empty(train.micro_batch, train.seq_len, dtype=torch.int64)
        documents = torch.empty_like(tokens) if self.recipe.data.reset_at_document else None
        rope = part._rope(tokens, None if documents is None else torch.empty_like(tokens))
        mask = None if documents is None else document_mask(documents)
        length = train.seq_len // (self.view.tp if self.view.sp else 1)
        x = torch.empty(train.micro_batch, length, model.hidden_size, dtype=DTYPES[model.dtype], requires_grad=True)
        given_to_all = [t for t in (tokens, rope, mask, documents) if t is not None]
        self.trace.known([*part.parameters(), *given_to_all, x])

        first = self._unit([part.embedding], lambda: part.embedding(tokens), None)
        kinds: dict[Any, Unit] = {}
        for name, block in part.layers.items():
            if (key := self._kind(name, block)) not in kinds:
                kinds[key] = self._unit([block], functools.partial(self._block, block, x, rope, mask, documents), x)
        blocks = tuple(kinds[self._kind(name, block)] for name, block in part.layers.items())
        ends = [part.norm, part.embedding if model.tied_embeddings else part.lm_head]
        last = self._unit(ends, lambda: self._loss(x, tokens), x)
        angles, masks = (0 if t is None else t.numel() * t.element_size() for t in (rope, mask))
        return Units(
            first=first,
            blocks=blocks,
            last=last,
            shared=angles + masks,
            shared_in_pipeline=angles * (train.micro_batch if documents is None else 1) + masks,
            held=self.held,
            dims={name: p.ndim for name, p in part.named_parameters()},
            linears=tuple(self._linears()),
            hidden=x.numel() * x.element_size(),
            logits=max(count for op in last.forward.ops if op.kind == "gemm" for _, count in op.writes),
            emulated=emulated,
        )

    def _set(self, recompute: Recompute) -> None:
        """What a model of this recomputation would have been built with."""
        self.recompute = recompute
        for module in self.part.modules():
            if isinstance(module, Attention):
                module.recompute_core = recompute == "selective"
            elif isinstance(module, Mamba):
                module.recompute = recompute == "selective"

    def _kind(self, name: str, block: nn.Module) -> tuple[Any, ...]:
        """Blocks of equal kinds do the same."""
        table = self.precision.tables[0][1]
        inside = f"layers.{name}."
        slots = tuple((n.removeprefix(inside), s) for n, s in table.items() if n.startswith(inside))
        swapped = tuple(isinstance(module, LowPrecisionLinear) for module in block.modules())
        return block.sublayers, slots, swapped

    def _linears(self) -> list[Linear]:
        table, found = self.precision.tables[0][1], []
        for name, module in self.part.named_modules():
            if isinstance(module, nn.Linear | LowPrecisionLinear):
                rows, cols = module.weight.shape
                swapped = isinstance(module, LowPrecisionLinear)
                specs = module.specs if swapped else {}
                assert swapped or not table[name].quantized, name
                whole = math.prod(self.held[f"{name}.weight"].whole)
                found.append(Linear(name, rows, cols, whole, swapped, specs))
        return found

    def _block(
        self, block: nn.Module, x: Tensor, rope: Tensor | None, mask: Tensor | None, documents: Tensor | None
    ) -> Tensor:
        if self.recompute != "full":
            return block(x, rope, mask, documents)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(block, x, rope, mask, documents, context_fn=self.part.recompute_context, **options)

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        part = self.part
        x = part.norm(x)
        logits = part.unembedding(x, part.embedding.weight) if part.config.tied_embeddings else part.lm_head(x)
        return part.cross_entropy(logits, labels)[0]

    def _unit(self, modules: Sequence[nn.Module], call: Callable[[], Tensor], x: Tensor | None) -> Unit:
        trace, layers = self.trace, [m for top in modules for m in top.modules() if isinstance(m, LowPrecisionLinear)]
        with trace:
            empty = trace.live
            with trace.phase() as prepared:
                for layer in layers:
                    layer.prepare()
            base = trace.live
            with trace.phase() as forward:
                y = call()
            edge, like = get_gradient_edge(y), y.detach()
            with trace.phase() as backward:
                dy = torch.empty_like(like)
                del y, like
                torch.autograd.backward((edge,), (dy,))
                del dy, edge
                if x is not None:
                    x.grad = None
            with trace.phase() as weights:
                while self.queue:
                    _, compute = self.queue.pop(0)
                    compute().float()
                    del compute
        for layer in layers:
            layer.use(layer.slots)  # drops the copies
        own = [_above(phase, base) for (phase,) in (forward, backward, weights)]
        if self.payload is not None and any(layer.specs["fprop.a"] == self.payload.spec for layer in layers):
            gathers = sum(op.kind == "all_gather" for op in own[0].ops)
            repeated = gathers if self.recompute == "full" else 0  # in the backward they come first
            own[:2] = _travels(own[0], gathers, self.payload), _travels(own[1], repeated, self.payload)
        mine = {id(p) for top in modules for p in top.parameters()}
        parameters = tuple(
            Parameter(name, self.held[name].shape, p.ndim) for name, p in self.part.named_parameters() if id(p) in mine
        )
        return Unit(parameters, _above(prepared[0], empty), *own)


def _travels(phase: Phase, count: int, payload: Payload) -> Phase:
    """The first `count` gathers of a phase with what they give in a payload."""
    ops = []
    for op in phase.ops:
        if op.kind == "all_gather" and count:
            count -= 1
            op = replace(op, packed=payload.message_bytes(((0, op.reads[0][1] // op.width),)))
        ops.append(op)
    return replace(phase, ops=tuple(ops))


def _above(phase: Phase, base: int) -> Phase:
    return replace(phase, peak=phase.peak - base, kept=phase.kept - base)
