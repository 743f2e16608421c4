"""Tensor and sequence parallelism of a plain model, by a plan over module names (Megatron-LM, arXiv 1909.08053).

    rows        a linear split along its output (column-parallel): every rank has some of the features
    heads       the same for fused query, key and value rows: whole heads; key/value heads are repeated where there are
                fewer of them than ranks
    halves      the same for fused gate and up rows: a part of each
    channels    parameters of the features between such linears, split alike: nothing to communicate
    columns     a linear split along its input (row-parallel): every rank has a summand of the output
    vocabulary  an embedding split along the vocabulary

    x --enter--> [rows] -> attention, scan or activation -> [columns] --leave--> + bias

Without sequence parallelism x is the same on all ranks: `enter` is the identity (its backward adds up gradients),
`leave` an all-reduce. With it (Korthikanti et al., arXiv 2205.05198) residuals and norms hold S / tp positions of each
sequence: `enter` all-gathers them and its backward reduce-scatters, `leave` reduce-scatters and its backward
all-gathers.

`shard` comes first, while parameters are on the meta device or empty; then the low-precision linears take the place of
the plain ones (lowprec/apply.py); `connect` comes last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowprec.fragments import Run, Shard, matrix_shape
from lowprec.payload import Payload
from parallel import communication as comm
from parallel.mesh import Mesh
from parallel.vocabulary import VocabularyCrossEntropy, VocabularyEmbedding

# module name -> how it is split; what no line names is whole on every rank
PLAN: Mapping[str, str] = {
    "embedding": "vocabulary",
    "layers.*.attention.qkv": "heads",
    "layers.*.attention.out": "columns",
    "layers.*.mamba.in_proj": "rows",  # ordered by group, as all of Mamba
    "layers.*.mamba.conv": "channels",
    "layers.*.mamba": "channels",  # A_log, D, dt_bias
    "layers.*.mamba.norm": "channels",
    "layers.*.mamba.out_proj": "columns",
    "layers.*.mlp.gate_up": "halves",
    "layers.*.mlp.up": "rows",
    "layers.*.mlp.down": "columns",
    "lm_head": "rows",
}


@dataclass(frozen=True)
class TensorParallel:
    """This rank among those that share every layer. sp: sequence parallelism."""

    rank: int
    size: int
    group: dist.ProcessGroup | None
    sp: bool = False

    @classmethod
    def of(cls, mesh: Mesh, sp: bool) -> TensorParallel:
        return cls(mesh.tp_rank, mesh.tp, mesh.tp_group, sp)


def style_of(module: str) -> str | None:
    """How PLAN splits a module; None: not at all."""
    return next((style for pattern, style in PLAN.items() if fnmatchcase(module, pattern)), None)


def shard_of(weight: str, whole: tuple[int, ...], rank: int, size: int) -> Shard:
    """What rank `rank` of `size` holds of a parameter of logical shape `whole` that is not a bias.

    The recipe has been checked: everything divides.
    """
    style = style_of(weight.rpartition(".")[0])
    width = matrix_shape(whole)[1]
    if style is None or size == 1:
        return Shard.of_whole(whole, owned=rank == 0)
    if style == "columns":
        part = width // size
        return Shard(whole, (*whole[:-1], part), (Run(0, matrix_shape(whole)[0]),), (rank * part, part))
    runs, shape = _RUNS[style](whole, rank, size)
    return Shard(whole, shape, runs, (0, width), repeated=style == "heads" and whole[0] < size)


def _bias_of(weight: Shard, whole: tuple[int, ...], rank: int) -> Shard:
    """The biases of the rows that a rank has; all of them where columns are split."""
    if not weight.split or weight.columns[1] < matrix_shape(weight.whole)[1]:
        return Shard.of_whole(whole, owned=rank == 0)
    return Shard(whole, (sum(run.rows for run in weight.runs),), weight.runs, (0, 1), weight.repeated)


def _row_runs(whole: tuple[int, ...], rank: int, size: int) -> tuple[tuple[Run, ...], tuple[int, ...]]:
    part, rows = whole[0] // size, math.prod(whole[1:-1])
    return (Run(rank * part * rows, part * rows),), (part, *whole[1:])


def _half_runs(whole: tuple[int, ...], rank: int, size: int) -> tuple[tuple[Run, ...], tuple[int, ...]]:
    halves, features, *rest = whole
    part = features // size
    return tuple(Run(i * features + rank * part, part) for i in range(halves)), (halves, part, *rest)


def _head_runs(whole: tuple[int, ...], rank: int, size: int) -> tuple[tuple[Run, ...], tuple[int, ...]]:
    """[kv heads, queries + 2, head size, ...]: whole key/value heads, or a part of the queries of one of them."""
    kv_heads, rows, head, *rest = whole
    if kv_heads % size == 0:
        part = kv_heads // size
        return (Run(rank * part * rows * head, part * rows * head),), (part, rows, head, *rest)
    sharing = size // kv_heads
    queries = (rows - 2) // sharing
    kv_head, place = divmod(rank, sharing)
    first = kv_head * rows
    q = Run((first + place * queries) * head, queries * head)
    kv = Run((first + rows - 2) * head, 2 * head, owned=place == 0)
    return (q, kv), (1, queries + 2, head, *rest)


_RUNS = {
    "rows": _row_runs,
    "channels": _row_runs,
    "vocabulary": _row_runs,
    "halves": _half_runs,
    "heads": _head_runs,
}


def shards(shapes: Mapping[str, tuple[int, ...]], tp: TensorParallel) -> dict[str, Shard]:
    """Parameter name -> what this rank holds of it, from the logical shapes."""
    held: dict[str, Shard] = {}
    for name, whole in shapes.items():  # a module's weight comes before its bias
        weight = f"{name.removesuffix('bias')}weight"
        if name.endswith(".bias") and style_of(name.rpartition(".")[0]):
            held[name] = _bias_of(held[weight], whole, tp.rank)
        else:
            held[name] = shard_of(name, whole, tp.rank, tp.size)
    return held


def shard(parts: Sequence[Any], held: Mapping[str, Shard], tp: TensorParallel) -> None:
    """Give every parameter of the plan its local shape; values are lost: they are filled in later."""
    if tp.size == 1:
        return
    for module in (module for part in parts for module in part.named_modules()):
        name, layer = module
        style = style_of(name)
        if style is None:
            continue
        for kind, parameter in list(layer.named_parameters(recurse=False)):
            rows, width = matrix_shape(held[f"{name}.{kind}"].shape)
            local = (rows, width) if parameter.ndim > 1 else (rows,)
            setattr(layer, kind, nn.Parameter(parameter.new_empty(local)))
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        if style == "heads":  # the attention around it reads how many query heads share a key/value head
            _parent(parts, name).q_per_kv = held[f"{name}.weight"].shape[1] - 2


def _parent(parts: Sequence[Any], name: str) -> Any:
    parent = name.rpartition(".")[0]
    return next(part.get_submodule(parent) for part in parts if parent in dict(part.named_modules()))


def enters(module: str) -> bool:
    """Whether a module's input is gathered from all ranks with sequence parallelism."""
    return style_of(module) in ("rows", "heads", "halves") or module == "unembedding"


def connect(
    parts: Sequence[Any],
    held: Mapping[str, Shard],
    tp: TensorParallel,
    payloads: Mapping[str, Payload] = MappingProxyType({}),
) -> None:
    """Put the communication around the sharded modules, and add up gradients that every rank has only a part of.

    payloads: module -> what its gathered input travels in, where that is not exact
    """
    if tp.size == 1:
        return
    for part in parts:
        for name, module in list(part.named_modules()):
            if getattr(module, "communicates", False):  # by itself: another library's layer, or a part of one
                continue
            style = style_of(name)
            if style == "columns":
                module.skip_bias = True  # it must be added once, after the sum
                module.register_forward_hook(_leave(tp, module.bias))
            elif enters(name):
                module.register_forward_pre_hook(Enter(tp, payloads.get(name)))
        if hasattr(part, "embedding"):
            part.embedding = VocabularyEmbedding(part.embedding.weight, tp.rank, tp.group, sp=tp.sp)
        if hasattr(part, "cross_entropy"):
            part.cross_entropy = VocabularyCrossEntropy(part.cross_entropy.z_loss, tp.rank, tp.group)
        for name, parameter in part.named_parameters():
            if sync := _gradient_sync(name, held, tp):
                parameter.register_hook(sync)


@dataclass
class Enter:
    """The hook before a module whose input is gathered. payload: what it travels in where that is not exact."""

    tp: TensorParallel
    payload: Payload | None

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        function: Any = partial(comm.gather_sequence, payload=self.payload) if self.tp.sp else comm.copy
        return function(inputs[0], self.tp.group), *inputs[1:]


@contextmanager
def exact_inputs(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Gathered inputs travel as they are, for as long as this lasts."""
    hooks = [hook for part in parts for module in part.modules() for hook in module._forward_pre_hooks.values()]
    held = [(hook, hook.payload) for hook in hooks if isinstance(hook, Enter)]
    for hook, _ in held:
        hook.payload = None
    try:
        yield
    finally:
        for hook, payload in held:
            hook.payload = payload


def _leave(tp: TensorParallel, bias: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    function: Any = comm.scatter_sequence if tp.sp else comm.reduce

    def hook(_: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> Tensor:
        y = function(y, tp.group)
        return y if bias is None else y + bias

    return hook


def _gradient_sync(name: str, held: Mapping[str, Shard], tp: TensorParallel) -> Callable[[Tensor], Tensor] | None:
    """What adds up the gradients of a parameter of which every rank sees only some tokens, or some heads."""
    if held[name].split:
        return _sync_heads(name, held, tp) if held[name].repeated else None
    seen_in_part = name.endswith(("q_norm.weight", "k_norm.weight"))
    if not (seen_in_part or tp.sp):
        return None  # every rank computes the same gradient from the same numbers

    def add(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else comm.all_reduced(gradient, tp.group)

    return add  # pyright: ignore[reportReturnType]


def _sync_heads(name: str, held: Mapping[str, Shard], tp: TensorParallel) -> Callable[[Tensor], Tensor]:
    """Of key and value rows that several ranks hold; a split backward hands over no gradient at first (None)."""
    kv_heads = held[f"{name.rpartition('.')[0]}.weight"].whole[0]
    kv_head, rows = tp.rank // (tp.size // kv_heads), held[name].runs[-1].rows

    def add(gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        whole = gradient.new_zeros(kv_heads, rows, *gradient.shape[1:])
        whole[kv_head] = gradient[-rows:]
        dist.all_reduce(whole, group=tp.group)
        return torch.cat([gradient[:-rows], whole[kv_head]])

    return add  # pyright: ignore[reportReturnType]
