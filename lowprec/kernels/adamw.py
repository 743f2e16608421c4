"""The fused AdamW step: the same bits as the plain one in lowprec/adamw.py, in one pass over each tensor.

On CPUs the C++ operator of cpu/adamw_ops.cpp, on GPUs the Triton kernels of gpu/adamw_programs.py.

    states   fp32, bf16, fp16_scaled, fp8_e4m3, fp8_e4m3_b256, dynamic8_b256, dynamic4_b128, linear4_b128, linear4_rank1
    weight   fp32, fp16_scaled, bf16
    rules    all; stochastic rounding of weights with the same bits
    grad     float32 and bfloat16

Scales of whole tensors take the two passes that they take anyway (`statistics`, `apply`). Stochastically encoded states
and factored second moments go to the plain path: they are options of experiments, not what a large run is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowprec import kernels
from lowprec.codebooks import codebook, thresholds
from lowprec.codecs import UNIT, Codec, Coded, Extent
from lowprec.kernels import gpu
from lowprec.kernels.gpu import adamw as gpu_adamw
from lowprec.philox import RandomKey

_STORES = {  # enum Store in cpu/adamw_job.h
    "fp32": 0,
    "bf16": 1,
    "fp16_scaled": 2,
    "fp8_e4m3": 3,
    "fp8_e4m3_b256": 4,
    "dynamic8_b256": 5,
    "dynamic4_b128": 6,
    "linear4_b128": 6,
    "linear4_rank1": 7,
}
_WRITES = {"nearest": 0, "stochastic": 1, "kahan": 2, "collage_light": 3, "collage_plus": 4}


@dataclass(frozen=True)
class Job:
    """A step of one fragment, as the kernel is told of it.

    codecs:  of "exp_avg", "exp_avg_sq" and "weight"
    numbers: in the order of AdamJob in cpu/adamw_job.h
    """

    codecs: Mapping[str, Codec]
    rule: str
    extent: Extent
    tensors: Mapping[str, Tensor]
    grad: Tensor
    numbers: tuple[float, ...]

    def problem(self) -> str | None:
        """None if the kernel can do it; else why not."""
        if self.grad.device.type not in ("cpu", "cuda"):
            return f"tensors on {self.grad.device.type}"
        return self.unsuited() or (gpu.unavailable_because() if self.grad.is_cuda else _unavailable_because())

    def unsuited(self) -> str | None:
        """Why no kernel takes a step of this form, on any device; None if one does."""
        if "exp_avg_sq" not in self.codecs:
            return "factored second moments"
        for name, codec in self.codecs.items():
            if codec.stochastic:
                return f"stochastically encoded {name}"
            if codec.ties != "down":
                return "ties that go up"
        if self.rule == "stochastic" and not self.extent.aligned:
            return "random bits of a fragment that begins within a unit"
        return None

    def statistics(self) -> Tensor:
        """Maxima [as the codecs' statistics, one after the other]."""
        if self.grad.is_cuda:
            return gpu_adamw.statistics(self)
        return torch.ops.lowprec_cpu.adamw_maxima(
            self._places(), self._tables(), self.grad, self._spec(), list(self.numbers)
        )

    def apply(self, statistics: Tensor | None, key: RandomKey | None, measure: bool) -> Tensor:
        """Step in place. Returns float64 [3], the first three sums of a tally. key: of the weight's random bits."""
        if self.grad.is_cuda:
            return gpu_adamw.apply(self, statistics, key, measure)
        random = torch.tensor([*key.words(), key.step, self.extent.offset // 256, 0]) if key is not None else None
        return torch.ops.lowprec_cpu.adamw(
            self._places(), self._tables(), self.grad, statistics, random, self._spec(), list(self.numbers), measure
        )

    def _places(self) -> list[Tensor]:
        tensors, nothing = self.tensors, torch.empty(0)
        low = tensors.get("compensation", tensors.get("weight.low", nothing))
        found = [tensors["weight"], tensors.get("weight.scale", nothing), low]
        for name in ("exp_avg", "exp_avg_sq"):
            found.append(tensors[name] if name in tensors else tensors[f"{name}.codes"])
            found += [tensors.get(f"{name}.{suffix}", nothing) for suffix in ("scale", "rows", "columns")]
        return [*found, tensors.get("exp_avg_sq.low", nothing)]

    def _tables(self) -> list[Tensor]:
        return [table for name in ("exp_avg", "exp_avg_sq") for table in _tables(self.codecs[name])]

    def _spec(self) -> list[int]:
        stores = [_STORES[self.codecs[name].name] for name in ("exp_avg", "exp_avg_sq", "weight")]
        columns = self.extent.columns
        unit = self.extent.offset // UNIT * UNIT  # blocks and random bits count from it; without them it says nothing
        return [*stores, _WRITES[self.rule], unit, self.extent.numel // columns, columns]


@cache
def _tables(codec: Codec) -> tuple[Tensor, Tensor, Tensor]:
    """Codebook, limits with Inf after them, and the code of the least number of each 65,536th of FP32 numbers."""
    if not isinstance(codec, Coded) or codec.kind == "fp8":
        return torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.uint8)
    limits = thresholds(codec.kind, codec.bits, codec.signed)
    bits = torch.arange(1 << 16, dtype=torch.int32) << 16
    smallest = torch.where(bits < 0, bits | 0xFFFF, bits).view(torch.float32)  # a negative cell ends at its least
    cells = torch.bucketize(smallest.nan_to_num(0.0), limits)
    inside = torch.bucketize(torch.where(bits < 0, bits, bits | 0xFFFF).view(torch.float32).nan_to_num(0.0), limits)
    assert ((inside - cells) <= 1).all() or codec.bits == 4, "two limits in one cell"
    return codebook(codec.kind, codec.bits, codec.signed), torch.cat((limits, torch.tensor([torch.inf]))), cells.byte()


@cache
def _unavailable_because() -> str | None:
    reason = kernels.unavailable_because()
    if reason is None:
        _register_fakes()
    return reason


def _register_fakes() -> None:
    def adamw_maxima(tensors, tables, grad, spec: list[int], numbers: list[float]) -> Tensor:  # noqa: ANN001
        rank1, scaled = (7,), (2, 3)
        length = sum(1 if s in scaled else spec[5] + spec[6] if s in rank1 else 0 for s in spec[:3])
        return grad.new_empty(length, dtype=torch.float32)

    def adamw(tensors, tables, grad, maxima, random, spec, numbers, measure: bool) -> Tensor:  # noqa: ANN001, PLR0913
        return grad.new_empty(3, dtype=torch.float64)

    torch.library.register_fake("lowprec_cpu::adamw_maxima", adamw_maxima)
    torch.library.register_fake("lowprec_cpu::adamw", adamw)
