"""Reduce-scatter and all-gather whose bytes are in a payload format (payload.py), as functions of (tensor, group).

    reduce_scatter   x + error -> shared scales (amaxes MAX-reduced) -> a message to each rank -> all_to_all_single
                     -> each owner decodes what came and adds it up in FP32, in rank order; error = what was not sent
    all_gather       the owner quantizes its part once; everybody, the owner too, decodes the same bytes
    ..._two_level    full precision between the ranks of a node, the payload between nodes

Why all_to_all: no partial sum is ever rounded, the order of additions does not depend on timing, and the volume is that
of a ring's reduce-scatter. Messages go as uint8, since gloo refuses FP8 dtypes in every collective; NCCL takes the same
calls. A group of one rank quantizes, too: the numerics are those of the payload on any number of ranks.

Two levels, for ranks that are numbered node after node (rank = node * ranks a node + local): first each node adds up,
so that its rank `local` holds the node's sum of all parts that are for some rank `local`; then the ranks `local` of all
nodes exchange quantized sums. Between nodes each number travels once a node instead of once a rank.

Error feedback (arXiv 1901.09847): what a rank's quantization lost is added to its next gradient. It needs one buffer as
large as x; where a residual is not finite it is forgotten (0), so that an overflow does not stay in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from errors import UsageError
from lowprec.exchange import (
    COUNT_BYTES,
    AllGather,
    Group,
    ReduceScatter,
    Wish,
    all_reduce_bytes,
    gather_parts,
    reduce_parts,
    scale_bytes,
)
from lowprec.payload import PAYLOADS, Payload, cut, next_mu, parse_payload
from lowprec.philox import RandomKey

__all__ = [
    "AllGather",
    "Payload",
    "ReduceScatter",
    "all_gather",
    "all_gather_two_level",
    "next_mu",
    "parse_payload",
    "reduce_scatter",
    "reduce_scatter_two_level",
]


def reduce_scatter(  # noqa: PLR0913  one keyword a decision
    x: Tensor,
    splits: Sequence[int],
    group: Group,
    payload: Payload,
    *,
    segments: Sequence[int] | None = None,
    error: Tensor | None = None,
    mu: float | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    key: RandomKey | None = None,
) -> ReduceScatter:
    """Sum a flat tensor over the ranks of a group; each rank gets its part. Callers divide for an average.

    x:         flat float32 or bfloat16, in order of destination; not changed
    splits:    elements for each rank of the group, the same on all ranks; may be 0
    segments:  elements of each logical tensor in x, in order; what a shared scale belongs to. None: x is one tensor
    error:     residual of error feedback, float32 or bfloat16 [x.numel()], zeros at first; updated in place
    mu:        factor of fp8_lm's scales, 1 by default; see `next_mu`
    rounding:  "nearest", or "stochastic" with a key
    key:       the same on all ranks, with the step; each rank and part draws its own bits

    Raises UsageError for options that the payload does not have.
    """
    key = _checked(payload, mu, rounding, key)
    parts = cut(splits, segments)
    wish = Wish(payload, len(segments or [0]), (group,), 1.0 if mu is None else mu, key)
    return reduce_parts(x, parts, wish, error)


def reduce_scatter_two_level(  # noqa: PLR0913
    x: Tensor,
    splits: Sequence[int],
    payload: Payload,
    *,
    inside: Group,
    between: Group,
    inside_payload: Payload = PAYLOADS["fp32"],
    segments: Sequence[int] | None = None,
    error: Tensor | None = None,
    mu: float | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    key: RandomKey | None = None,
) -> ReduceScatter:
    """`reduce_scatter` over nodes: `inside_payload` (fp32 or bf16) inside a node, `payload` between nodes.

    splits:   of all ranks, node after node
    inside:   this node's ranks, in order of their local number
    between:  the ranks of all nodes with this one's local number, in order of nodes
    error:    residual of the node's sums: as many elements as splits[local::ranks a node] together

    The other arguments are those of `reduce_scatter`; the saturated numbers are those of all nodes' sums.
    """
    key = _checked(payload, mu, rounding, key)
    _plain_inside(inside_payload)
    local, ranks, nodes = dist.get_rank(inside), dist.get_world_size(inside), dist.get_world_size(between)
    assert len(splits) == ranks * nodes, f"{len(splits)} splits for {nodes} nodes of {ranks} ranks"
    pieces = x.split(list(splits))
    by_local = torch.cat([piece for number in range(ranks) for piece in pieces[number::ranks]])
    totals = [sum(splits[number::ranks]) for number in range(ranks)]
    node = reduce_scatter(by_local, totals, inside, inside_payload)
    parts = cut(splits, segments)[local::ranks]
    wish = Wish(payload, len(segments or [0]), (between, inside), 1.0 if mu is None else mu, key)
    whole = reduce_parts(node.result, parts, wish, error)
    inside_bytes = node.sent_bytes + scale_bytes(wish, inside)
    if whole.saturated is not None:
        dist.all_reduce(whole.saturated, group=inside)
        inside_bytes += all_reduce_bytes(COUNT_BYTES, inside)
    sent_bytes = whole.sent_bytes + inside_bytes
    return ReduceScatter(whole.result, sent_bytes, whole.saturated, x.numel() * nodes, inside_bytes)


def all_gather(
    x: Tensor,
    sizes: Sequence[int],
    group: Group,
    payload: Payload,
    *,
    segments: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> AllGather:
    """Every rank's part, quantized once by its owner, on all ranks; the owner gets the quantized numbers, too.

    x:         this rank's part, flat float32 or bfloat16
    sizes:     elements of each rank's part, the same on all ranks; unequal ones are sent padded to the largest
    segments:  elements of each logical tensor in the gathered whole, in order. None: it is one tensor
    dtype:     of the result; x's by default. BF16 numbers pass exactly through payloads bf16 and fp32
    """
    wish = Wish(payload, len(segments or [0]), (group,))
    return gather_parts(x, cut(sizes, segments), wish, dtype or x.dtype)


def all_gather_two_level(
    x: Tensor,
    sizes: Sequence[int],
    payload: Payload,
    *,
    inside: Group,
    between: Group,
    inside_payload: Payload = PAYLOADS["fp32"],
    segments: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> AllGather:
    """`all_gather` over nodes: `payload` between nodes, then `inside_payload` (fp32 or bf16) inside each.

    Groups and order of ranks as in `reduce_scatter_two_level`, the other arguments as in `all_gather`.
    """
    _plain_inside(inside_payload)
    local, ranks, nodes = dist.get_rank(inside), dist.get_world_size(inside), dist.get_world_size(between)
    assert len(sizes) == ranks * nodes, f"{len(sizes)} sizes for {nodes} nodes of {ranks} ranks"
    wish = Wish(payload, len(segments or [0]), (between, inside))
    mine = gather_parts(x, cut(sizes, segments)[local::ranks], wish, torch.float32)
    totals = [sum(sizes[number::ranks]) for number in range(ranks)]
    node = all_gather(mine.result, totals, inside, inside_payload, dtype=dtype or x.dtype)
    by_local = [sizes[number + ranks * place] for number in range(ranks) for place in range(nodes)]
    pieces = node.result.split(by_local)
    whole = torch.cat([pieces[number * nodes + place] for place in range(nodes) for number in range(ranks)])
    inside_bytes = node.sent_bytes + scale_bytes(wish, inside)
    return AllGather(whole, mine.sent_bytes + inside_bytes, inside_bytes)


def _checked(payload: Payload, mu: float | None, rounding: str, key: RandomKey | None) -> RandomKey | None:
    """The key, if rounding needs one; raises UsageError for options that would be ignored."""
    if mu is not None and not payload.automatic:
        raise UsageError(f"mu is {mu}, but payload {payload.name} has no automatic scaling; use fp8_lm or leave it out")
    if rounding not in ("nearest", "stochastic"):
        raise UsageError(f"rounding is {rounding!r}; use nearest or stochastic")
    if rounding == "nearest":
        return None
    if payload.spec is None:
        raise UsageError(f"payload {payload.name} is rounded to nearest only; use that, or a quantized payload")
    if key is None:
        raise UsageError("stochastic rounding needs a key: pass key=RandomKey(seed=..., step=...)")
    return key


def _plain_inside(payload: Payload) -> None:
    if payload.spec is not None:
        raise UsageError(f"payload inside a node is {payload.name}; use fp32 or bf16")
