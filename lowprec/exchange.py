"""How quantized messages are exchanged: the parts of a flat tensor among the ranks of one group.

    reduce_parts   shared scales -> a message to each rank -> all_to_all_single -> FP32 sum in rank order
    gather_parts   shared scales -> one message -> all_gather_single -> everybody decodes all

A part is given by its `Pieces`, so that it may come from anywhere in the logical tensors: collectives.py, whose page
says why things are so, takes parts in order with one level, and every nth with two.

Bytes are counted from the arguments of the collectives: what a rank hands over for others, its own part excluded; an
all-reduce of b bytes counts as a ring's 2 b (n - 1) / n.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lowprec.payload import (
    Cast,
    Payload,
    Pieces,
    elements,
    pack,
    piece_amaxes,
    saturated,
    shared_scales,
    unpack,
)
from lowprec.philox import RandomKey

Group = dist.ProcessGroup | None  # None: the default group

COUNT_BYTES = 8  # int64 at the end of each message under a shared scale: the sender's saturated numbers


@dataclass(frozen=True)
class ReduceScatter:
    """What a reduce-scatter gave this rank.

    result:      FP32 [splits[rank]], the sum over ranks
    sent_bytes:  what this rank sent to others, amax reductions included
    saturated:   int64 scalar, numbers at the format's maximum on all ranks, equal on all; None where blocks have scales
                 of their own, which always reach it
    elements:    numbers quantized on all ranks: what `saturated` is a part of
    inside_bytes:  of sent_bytes, those that stayed inside the node; 0 with one level
    """

    result: Tensor
    sent_bytes: int
    saturated: Tensor | None
    elements: int
    inside_bytes: int = 0


@dataclass(frozen=True)
class AllGather:
    """What an all-gather gave every rank.

    result:      [sum(sizes)], bit-equal on all ranks
    sent_bytes, inside_bytes:  as in `ReduceScatter`
    """

    result: Tensor
    sent_bytes: int
    inside_bytes: int = 0


@dataclass(frozen=True)
class Wish:
    """How to quantize, before the scales are known.

    tensors:  number of logical tensors
    groups:   over which the amaxes of logical tensors are reduced; the first is the one that exchanges messages
    """

    payload: Payload
    tensors: int
    groups: tuple[Group, ...]
    mu: float = 1.0
    key: RandomKey | None = None


def all_reduce_bytes(nbytes: int, group: Group) -> int:
    size = dist.get_world_size(group)
    return 2 * nbytes * (size - 1) // size


def scale_bytes(wish: Wish, group: Group) -> int:
    """What agreeing on shared scales over a group takes."""
    return all_reduce_bytes(torch.float32.itemsize * wish.tensors, group) if wish.payload.shared else 0


def _cast(x: Tensor, pieces: Pieces, wish: Wish) -> Cast:
    """The cast; all ranks of the groups agree on its scales."""
    if not wish.payload.shared:
        return Cast(wish.payload, key=wish.key)
    amaxes = piece_amaxes(x, pieces, wish.tensors)
    for group in wish.groups:
        dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=group)
    return Cast(wish.payload, shared_scales(amaxes, wish.payload, wish.mu), wish.key)


def reduce_parts(x: Tensor, parts: Sequence[Pieces], wish: Wish, error: Tensor | None) -> ReduceScatter:
    """Quantize each part of x, exchange, add up. parts: what is for each rank of the first group, in order."""
    group, payload = wish.groups[0], wish.payload
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    lengths = [elements(part) for part in parts]
    assert len(parts) == world and x.ndim == 1 and x.numel() == sum(lengths), (len(parts), world, x.shape, lengths)
    x = x.contiguous() if error is None else _fed_back(x, error)
    cast = _cast(x, tuple(itertools.chain(*parts)), wish)
    casts = [cast.for_part(f"{rank}.{place}") for place in range(world)]
    messages = [pack(*given) for given in zip(x.split(lengths), parts, casts, strict=True)]
    trailer, count = 0, None
    if payload.shared:
        # the counts ride on the messages: one collective less
        trailer, count = COUNT_BYTES, saturated(list(itertools.chain(*messages)), payload).to(x.device)
        messages = [[*message, count.view(1).view(torch.uint8)] for message in messages]
    sizes = [payload.message_bytes(part) + trailer for part in parts]
    sent = _joined(x, messages, payload)
    received = sent.new_empty(world * sizes[rank])
    dist.all_to_all_single(received, sent, [sizes[rank]] * world, sizes, group=group)

    incoming = received.view(world, sizes[rank])
    result = _summed(incoming[:, : sizes[rank] - trailer], parts[rank], cast, x.device)
    if count is not None:
        count = incoming[:, sizes[rank] - trailer :].contiguous().view(torch.int64).sum()
    if error is not None:
        _keep_residual(x, error, [m[: m.numel() - trailer] for m in sent.split(sizes)], parts, cast)
    sent_bytes = sum(sizes) - sizes[rank] + scale_bytes(wish, group)
    return ReduceScatter(result, sent_bytes, count, x.numel() * world)


def _joined(x: Tensor, messages: Sequence[Sequence[Tensor]], payload: Payload) -> Tensor:
    """All messages in one buffer; numbers that travel as they are need no copy."""
    if payload.dtype == x.dtype:
        return x.view(torch.uint8)
    return torch.cat([x.new_empty(0, dtype=torch.uint8), *itertools.chain(*messages)])


def _summed(incoming: Tensor, pieces: Pieces, cast: Cast, device: torch.device) -> Tensor:
    """FP32 sum of the messages [ranks, bytes], first rank first."""
    total = torch.empty(elements(pieces), device=device)
    for source, message in enumerate(incoming):
        start = 0
        for values in unpack(message, pieces, cast):
            here = total[start : start + values.numel()]
            here.add_(values) if source else here.copy_(values)
            start += values.numel()
    return total


def _fed_back(x: Tensor, error: Tensor) -> Tensor:
    """x + error in FP32, in the place of an FP32 error."""
    assert error.shape == x.shape and error.is_contiguous(), (error.shape, x.shape)
    return error.add_(x) if error.dtype == torch.float32 else error.float().add_(x)


def _keep_residual(x: Tensor, error: Tensor, sent: Sequence[Tensor], parts: Sequence[Pieces], cast: Cast) -> None:
    """error = x - what was sent, chunk by chunk; x is FP32 and may be `error` itself."""
    start = 0
    for message, pieces in zip(sent, parts, strict=True):
        for values in unpack(message, pieces, cast):
            here = slice(start, start + values.numel())
            residual = x[here].sub_(values).nan_to_num_(0.0, 0.0, 0.0)
            if error is not x:
                error[here].copy_(residual)
            start += values.numel()


def gather_parts(x: Tensor, parts: Sequence[Pieces], wish: Wish, dtype: torch.dtype) -> AllGather:
    """Quantize this rank's part, gather messages, decode all. parts: of each rank of the first group."""
    group, payload = wish.groups[0], wish.payload
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    lengths = [elements(part) for part in parts]
    assert len(parts) == world and x.shape == (lengths[rank],), (len(parts), world, x.shape, lengths)
    x = x.contiguous()
    cast = _cast(x, parts[rank], wish)
    sizes = [payload.message_bytes(part) for part in parts]
    message = _joined(x, [pack(x, parts[rank], cast)], payload)
    most = max(sizes)
    if message.numel() < most:
        message = torch.nn.functional.pad(message, (0, most - message.numel()))
    received = message.new_empty(world * most)
    dist.all_gather_single(received, message, group=group)

    result = torch.empty(sum(lengths), dtype=dtype, device=x.device)
    start = 0
    for part, size, line in zip(parts, sizes, received.view(world, most), strict=True):
        for values in unpack(line[:size], part, cast):
            result[start : start + values.numel()].copy_(values)
            start += values.numel()
    return AllGather(result, most * (world - 1) + scale_bytes(wish, group))
