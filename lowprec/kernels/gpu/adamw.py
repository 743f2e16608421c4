"""Launching the Triton kernels of the AdamW step for a `kernels.adamw.Job` whose tensors are on a GPU.

They are called directly, not as operators: an optimizer's step is in no compiled graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowprec.codebooks import codebook, thresholds
from lowprec.codecs import UNIT, Codec, Coded, Rank1, Scaled
from lowprec.formats import ElementFormat, element_format
from lowprec.philox import RandomKey

if TYPE_CHECKING:
    from lowprec.kernels.adamw import Job


@dataclass(frozen=True)
class Plan:
    """What the kernels are compiled for: their only compile-time argument, read there as plain attributes.

    exp_avg, exp_avg_sq, weight: names of codecs;  rule: how the weight is written
    """

    exp_avg: str
    exp_avg_sq: str
    weight: str
    rule: str
    bf16_grad: bool

    @property
    def e4m3(self) -> ElementFormat:
        return element_format("e4m3")

    @property
    def half(self) -> ElementFormat:
        return element_format("e5m10")


def statistics(job: Job) -> Tensor:
    """As `Job.statistics`."""
    from lowprec.kernels.gpu.adamw_programs import maxima_kernel

    extent = job.extent
    lengths = [codec.statistics_length(extent.shape) for codec in job.codecs.values()]
    found = torch.zeros(sum(lengths), dtype=torch.int32, device=job.grad.device)
    states = [_state(job, name, None) for name in job.codecs]
    sizes = (extent.columns, extent.numel // extent.columns)
    _launch(maxima_kernel, job, *states, found.split(lengths), *sizes, job.numbers, extent.count, extent.offset)
    return found.view(torch.float32)


def apply(job: Job, statistics: Tensor | None, key: RandomKey | None, measure: bool) -> Tensor:
    """As `Job.apply`."""
    from lowprec.kernels.gpu.adamw_programs import SPAN, adamw_kernel

    device, extent = job.grad.device, job.extent
    lengths = [codec.statistics_length(extent.shape) for codec in job.codecs.values()]
    parts = [None] * len(lengths) if statistics is None else statistics.split(lengths)
    states = [_state(job, name, part) for name, part in zip(job.codecs, parts, strict=True)]
    words = (0, 0, 0)
    if key is not None:
        k0, k1 = key.words()
        words = (k1 << 32 | k0) - (k1 >> 31 << 64), extent.offset // UNIT, key.step
    lows = [job.tensors.get("compensation", job.tensors.get("weight.low")), job.tensors.get("exp_avg_sq.low")]
    lows = [None if low is None else _bits(low) for low in lows]
    programs = -(-extent.count // SPAN.value)
    tally = torch.empty(programs, 3, dtype=torch.float64, device=device) if measure else None
    place = (extent.columns, job.numbers, extent.count, extent.offset)
    _launch(adamw_kernel, job, *states, *lows, tally, *place, *words)
    for name, state in zip(job.codecs, states, strict=True):
        for suffix, value in zip(("scale", "rows", "columns"), (state[2], state[5], state[6]), strict=True):
            if value is not None:
                job.tensors[f"{name}.{suffix}"].copy_(value)
    return torch.zeros(3, dtype=torch.float64, device=device) if tally is None else tally.sum(dim=0)


def _launch(kernel: Any, job: Job, *arguments: Any) -> None:
    """A program for each span of the fragment; products and sums are not contracted into one rounding."""
    from lowprec.kernels.gpu.adamw_programs import SPAN

    names = {name: codec.name for name, codec in job.codecs.items()}
    plan = Plan(**names, rule=job.rule, bf16_grad=job.grad.dtype == torch.bfloat16)
    with torch.cuda.device_of(job.grad):
        programs = -(-job.extent.count // SPAN.value)
        kernel[(programs,)](_bits(job.grad), *arguments, plan, num_warps=4, enable_fp_fusion=False)


def _bits(x: Tensor) -> Tensor:
    """BF16 as the kernels read and write it."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _state(job: Job, name: str, found: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tuple of gpu/adamw_programs.py; found: statistics of the whole tensor."""
    codec, tensors = job.codecs[name], job.tensors
    payload = _bits(tensors[name] if name in tensors else tensors[f"{name}.codes"])
    scale, rows, columns = (tensors.get(f"{name}.{suffix}") for suffix in ("scale", "rows", "columns"))
    next_scale = next_rows = next_columns = None
    if found is not None and isinstance(codec, Scaled):
        assert scale is not None
        next_scale = codec.next_scale(found, scale)
    elif found is not None and isinstance(codec, Rank1):
        assert rows is not None
        next_rows, next_columns = found[: len(rows)], found[len(rows) :]
    tables = _tables(codec, job.grad.device)
    return payload, scale, next_scale, rows, columns, next_rows, next_columns, *tables


@cache
def _tables(codec: Codec, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Codebook, and its limits with Inf after them."""
    if not isinstance(codec, Coded) or codec.kind == "fp8":
        return None, None
    limits = thresholds(codec.kind, codec.bits, codec.signed)
    limits = torch.cat((limits, torch.tensor([torch.inf])))
    return codebook(codec.kind, codec.bits, codec.signed).to(device), limits.to(device)
