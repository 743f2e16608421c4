"""What one tensor and its quantized copy say, as sums and maxima: those of shards add up to those of the whole.

    underflow        share of the numbers that are not zero but quantize to zero
    overflow         share of the numbers beyond the largest that their block's scale can reach: they are clipped
    relative error   |Q(x) - x| / |x|, L2 norms over the tensor
    signal to noise  -20 log10 of it, dB
    scales           the stored block scales: their extremes, and how many lie in each octave [2^k, 2^(k+1))

A rotated operand is compared in its rotated coordinates. Definitions: Transformer Engine's LogFp8TensorStats, but for
underflow, whose share is of the numbers that are not zero, as in its LogNvfp4TensorStats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.hadamard import rotate, sign_vector
from lowprec.philox import RandomKey
from lowprec.quantized import Operand, QuantizedTensor, block_of, post_scale

OCTAVES = 256  # [0] zero scales; [k + 128] scales of [2^k, 2^(k+1)) for k = -127 .. 127
_SUMS = ("count", "nonzero", "underflow", "overflow", "square", "error")
_SLACK = 1.0 + 2.0**-20  # 1 / (max / amax) may round below amax / max


@dataclass(frozen=True)
class OperandSums:
    """sums: float64 [6 + OCTAVES], those of _SUMS, then scales; maxima: float64 [3] amax, scale max, -scale min."""

    sums: Tensor
    maxima: Tensor

    @classmethod
    def of(cls, x: Tensor, packed: QuantizedTensor, found: Operand, key: RandomKey) -> OperandSums:
        """x: the matrix; packed: its codes and scales; found: `packed` decoded; key: of its rotation's signs."""
        spec, count = packed.spec, x.numel()
        if spec.hadamard:
            x = rotate(x, sign_vector(spec.hadamard, spec.signs, key, x.device), packed.axis)
        x = x.float()
        q = found.values.float() if found.scale is None else found.values.float() * found.scale
        occupied = x != 0
        scales = packed.block_scales().float()
        numbers = (
            occupied.sum(),
            ((q == 0) & occupied).sum(),
            _overflows(x, packed, scales),
            torch.linalg.vector_norm(x).double().square(),
            torch.linalg.vector_norm(q - x).double().square(),
        )
        sums = torch.stack([x.new_tensor(count, dtype=torch.float64), *(n.double() for n in numbers)])
        extremes = (x.abs().amax(), scales.amax(), -scales.amin())
        return cls(torch.cat([sums, _octaves(scales)]), torch.stack([e.double() for e in extremes]))

    def record(self) -> dict[str, object]:
        """JSON-able statistics."""
        values = dict(zip(_SUMS, self.sums[: len(_SUMS)].tolist(), strict=True))
        amax, largest, smallest = self.maxima.tolist()
        counts = self.sums[len(_SUMS) :].tolist()
        relative = root_ratio(values["error"], values["square"])
        return {
            "amax": amax,
            "underflow": share(values["underflow"], values["nonzero"]),
            "overflow": share(values["overflow"], values["count"]),
            "relative_error": relative,
            "snr_db": decibels(relative),
            "mse": share(values["error"], values["count"]),
            "scale_min": -smallest,
            "scale_max": largest,
            "scales": {str(k - 128) if k else "zero": int(n) for k, n in enumerate(counts) if n},
        }


def _overflows(x: Tensor, packed: QuantizedTensor, scales: Tensor) -> Tensor:
    """How many numbers of the (rotated) matrix lie beyond what their block reaches."""
    spec, (rows, cols) = packed.spec, x.shape
    post = post_scale(spec, packed.amax, x.device)
    limits = scales * (spec.format.max * _SLACK)
    if post is not None:
        limits = limits * (post[:, None] if post.ndim else post)
    limits = limits.T if packed.axis == 0 else limits
    down, across = block_of(spec, packed.axis, rows, cols)
    x = torch.nn.functional.pad(x, (0, -cols % across, 0, -rows % down))
    blocks = x.view(len(limits), down, limits.shape[1], across)
    return (blocks.abs() > limits[:, None, :, None]).sum()


def _octaves(scales: Tensor) -> Tensor:
    """float64 [OCTAVES]; a scale that is not finite counts as the largest."""
    exponents = torch.frexp(scales)[1] - 1
    places = torch.where(scales > 0, exponents.clamp(-127, 127) + 128, 0)
    places = torch.where(scales.isfinite(), places, OCTAVES - 1)
    return torch.bincount(places.flatten(), minlength=OCTAVES).double()


@dataclass(frozen=True)
class TensorSums:
    """Of a tensor as it is.

    sums:   float64 [4] count, sum, L1, squares
    maxima: float64 [4] max, -min, amax, -least |x| > 0 (of a tensor of zeros: -inf)
    """

    sums: Tensor
    maxima: Tensor

    @classmethod
    def of(cls, x: Tensor) -> TensorSums:
        x = x.detach().float()
        size = x.abs()
        least = torch.where(size > 0, size, torch.inf).amin()
        sums = (x.new_tensor(x.numel()), x.sum(dtype=torch.float64), size.sum(dtype=torch.float64))
        square = torch.linalg.vector_norm(x).double().square()
        maxima = (x.amax(), -x.amin(), size.amax(), -least)
        return cls(torch.stack([s.double() for s in (*sums, square)]), torch.stack([m.double() for m in maxima]))

    def record(self) -> dict[str, float]:
        """Under the names of Transformer Engine's LogTensorStats."""
        (count, total, l1, square), (high, low, amax, least) = self.sums.tolist(), self.maxima.tolist()
        variance = max(square - total * total / count, 0.0) / max(count - 1, 1)
        return {
            "min": -low,
            "max": high,
            "mean": total / count,
            "std": math.sqrt(variance),
            "l1_norm": l1,
            "l2_norm": math.sqrt(square),
            "cur_amax": amax,
            "dynamic_range": math.log2(amax) - math.log2(-least) if amax > 0 else 0.0,
        }


def blockwise_range(x: Tensor, size: int, dims: int) -> Tensor:
    """Largest log2(amax / least |x| > 0) of a block: `size` numbers along the last axis (dims 1), or a square (2)."""
    rows, cols = x.shape
    down = size if dims == 2 else 1
    sides = torch.nn.functional.pad(x.detach().float().abs(), (0, -cols % size, 0, -rows % down))
    blocks = sides.view(-1, down, sides.shape[1] // size, size)
    high = blocks.amax(dim=(1, 3))
    low = torch.where(blocks > 0, blocks, torch.inf).amin(dim=(1, 3))
    return torch.where(high > 0, high.log2() - low.log2(), 0.0).amax()


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def root_ratio(error: float, square: float) -> float:
    """sqrt(error / square): 0 where both are 0, and infinite where only the signal is."""
    return math.sqrt(error / square) if square else math.inf if error else 0.0


def decibels(relative: float) -> float | None:
    """None: infinite, no error at all."""
    return -20.0 * math.log10(relative) if relative else None
