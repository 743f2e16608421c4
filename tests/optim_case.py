"""What the tests of the update share: every combination, and one step of a tensor cut anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lowprec.adamw import Hyper, Tally, Update
from lowprec.codecs import Extent
from lowprec.philox import RandomKey

HYPER = Hyper(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=1)

_STATES = [
    ("fp32", "fp32"),
    ("bf16", "bf16"),
    ("fp8_e4m3", "fp16_scaled"),
    ("fp8_e4m3_b256", "fp8_e4m3_b256"),
    ("dynamic8_b256", "dynamic8_b256"),
    ("dynamic4_b128", "linear4_b128"),
    ("dynamic4_b128", "linear4_rank1"),
    ("dynamic4_b128", "factor"),
    ("fp16_scaled", "bf16"),
    ("linear4_b128", "dynamic4_b128"),
    ("dynamic8_b256_sr", "fp8_e4m3_b256_sr"),
    ("dynamic4_b128_sr", "linear4_rank1_sr"),
]
_RULES = [
    ("fp32", "nearest"),
    ("fp16_scaled", "nearest"),
    ("none", "nearest"),
    ("none", "stochastic"),
    ("bf16", "kahan"),
]


def updates() -> Iterator[Update]:
    for exp_avg, exp_avg_sq in _STATES:
        for master, update in _RULES:
            yield Update(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, master=master, update=update)  # pyright: ignore
    for update in ("collage_light", "collage_plus"):
        yield Update(exp_avg="bf16", exp_avg_sq="bf16", master="none", update=update)


def name_of(update: Update) -> str:
    return "-".join(vars(update).values())


def cut(shape: tuple[int, ...], *places: int) -> list[Extent]:
    """Fragments of a tensor, cut at the multiples `places` of 256."""
    ends = [0, *(256 * p for p in places), math.prod(shape)]
    return [Extent(shape, low, high - low) for low, high in zip(ends[:-1], ends[1:], strict=True)]


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(7)
    size = torch.logspace(-6, -1, math.prod(shape))
    return [torch.randn(len(size), generator=random) * size for _ in range(steps)]


def start(update: Update, shape: tuple[int, ...], extents: list[Extent]) -> list[dict[str, Tensor]]:
    """Tensors of each fragment, for weights from N(0, 0.02)."""
    how = update.weight_codec
    flat = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(1)) * 0.02
    flat[5] = 0.0
    found = []
    for extent in extents:
        weight = how.allocate(extent)
        how.encode(
            flat[extent.offset : extent.offset + extent.count], extent, weight,
            how.statistics(flat, extent), None,
        )  # fmt: skip
        tensors = update.allocate(extent, weight[""])
        found.append(tensors | {f"weight.{key}" if key else "weight": value for key, value in weight.items()})
    return found


def step(
    update: Update, extents: list[Extent], fragments: list[dict[str, Tensor]], grad: Tensor, hyper: Hyper
) -> Tally:
    """One step of a tensor that several ranks hold, reductions done here."""
    grads = [grad[e.offset : e.offset + e.count] for e in extents]
    sums = [update.sums(e, g, hyper) for e, g in zip(extents, grads, strict=True)]
    if sums[0] is not None:
        total = torch.stack(sums).sum(dim=0)  # pyright: ignore
        for extent, tensors in zip(extents, fragments, strict=True):
            update.advance(extent, tensors, total, hyper)
    maxima = [update.statistics(e, t, g, hyper) for e, t, g in zip(extents, fragments, grads, strict=True)]
    statistics = None if maxima[0] is None else torch.stack(maxima).amax(dim=0)  # pyright: ignore
    key = RandomKey(seed=11, tensor="layers.0.attn.qkv", step=hyper.step)
    tally = Tally.nothing()
    for extent, tensors, part in zip(extents, fragments, grads, strict=True):
        tally += update.apply(extent, tensors, part, hyper, statistics, key, measure=True)
    return tally
