"""Collectives of tensor parallelism as autograd functions, in conjugate pairs, over dimension 1 of [B, S, ...].

    copy              identity             backward: sum over ranks
    reduce            sum over ranks       backward: identity
    gather_sequence   all-gather of S      backward: reduce-scatter of S
    scatter_sequence  reduce-scatter of S  backward: all-gather of S

Sums are in the tensor's own dtype, as Megatron-LM's are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowprec.collectives import all_gather
from lowprec.payload import Payload

Group = dist.ProcessGroup | None


def all_reduced(x: Tensor, group: Group) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def all_gathered(x: Tensor, group: Group, payload: Payload | None = None) -> Tensor:
    """[B, S / n, ...] of each rank -> [B, S, ...]; with a payload they travel quantized, and arrive so."""
    lead = x.transpose(0, 1).contiguous()
    if payload is not None:
        sizes = [lead.numel()] * dist.get_world_size(group)
        found = all_gather(lead.flatten(), sizes, group, payload).result
        return found.view(-1, *lead.shape[1:]).transpose(0, 1).contiguous()
    out = lead.new_empty(lead.shape[0] * dist.get_world_size(group), *lead.shape[1:])
    dist.all_gather_into_tensor(out, lead, group=group)
    return out.transpose(0, 1).contiguous()


def reduce_scattered(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks of [B, S, ...], each rank its [B, S / n, ...]."""
    lead = x.transpose(0, 1).contiguous()
    out = lead.new_empty(lead.shape[0] // dist.get_world_size(group), *lead.shape[1:])
    dist.reduce_scatter_tensor(out, lead, group=group)
    return out.transpose(0, 1).contiguous()


def _same(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


class _Pair(torch.autograd.Function):
    """A collective whose backward is its conjugate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, there: Any, back: Any) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(gradients[0], ctx.group), None, None, None


@torch.compiler.disable
def copy(x: Tensor, group: Group) -> Tensor:
    return _Pair.apply(x, group, _same, all_reduced)


@torch.compiler.disable
def reduce(x: Tensor, group: Group) -> Tensor:
    return _Pair.apply(x, group, all_reduced, _same)


@torch.compiler.disable
def gather_sequence(x: Tensor, group: Group, payload: Payload | None = None) -> Tensor:
    return _Pair.apply(x, group, partial(all_gathered, payload=payload), reduce_scattered)


@torch.compiler.disable
def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    return _Pair.apply(x, group, reduce_scattered, all_gathered)
