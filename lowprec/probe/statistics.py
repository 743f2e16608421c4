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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.hadamard import rotate, sign_vector
from lowprec.philox import RandomKey
from lowprec.quantized import Operand, QuantizedTensor, block_of, post_scale

OCTAVES = 256  # [0] zero scales; [k + 128] scales of [2^k, 2^(k+1)) for k = -127 .. 127
_SUMS = ("count", "nonzero", "underflow", "overflow", "square", "error")
_PART = 1 << 16  # elements
_SLACK = 1.0 + 2.0**-20  # 1 / (max / amax) may round below amax / max


@dataclass(frozen=True)
class OperandSums:
    """sums: float64 [6 + OCTAVES], those of _SUMS, then scales; maxima: float64 [3] amax, scale max, -scale min."""

    sums: Tensor
    maxima: Tensor

    @classmethod
    def of(cls, x: Tensor, packed: QuantizedTensor, found: Operand, key: RandomKey | None) -> OperandSums:
        """x: the matrix; packed: its codes and scales; found: `packed` decoded; key: of its rotation's signs."""
        spec, count = packed.spec, x.numel()
        if spec.hadamard:
            x = rotate(x, sign_vector(spec.hadamard, spec.signs, key, x.device), packed.axis)
        scales = packed.block_scales().float()
        limits, (down, across) = _limits(packed, scales, x.shape)
        # Parts whose temporaries stay in a processor's cache; whole rows of blocks.
        each = len(x) if x.is_cuda else max(1, _PART // (x.shape[1] * down)) * down
        parts: list[Tensor] = []
        for start in range(0, len(x), each):
            here = slice(start, start + each)
            scale = found.scale if found.scale is None or found.scale.ndim < 2 else found.scale.expand(len(x), -1)[here]
            q = found.values[here].float() if scale is None else found.values[here].float() * scale
            parts.append(_numbers(x[here].float(), q, limits[start // down : (start + each) // down + 1], down, across))
        numbers = torch.stack(parts)
        sums = torch.cat([numbers.new_tensor([count]), numbers[:, :-1].sum(0), _octaves(scales)])
        extremes = (numbers[:, -1].amax(), scales.amax(), -scales.amin())
        return cls(sums, torch.stack([extreme.double() for extreme in extremes]))

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


def _limits(packed: QuantizedTensor, scales: Tensor, shape: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """The largest number that each block of the matrix reaches, [row blocks, column blocks], and a block's sides.

    A block that has all rows is cut into single ones.
    """
    spec = packed.spec
    post = post_scale(spec, packed.amax, scales.device)
    limits = scales * (spec.format.max * _SLACK)
    if post is not None:
        limits = limits * (post[:, None] if post.ndim else post)
    limits = limits.T if packed.axis == 0 else limits
    down, across = block_of(spec, packed.axis, *shape)
    return (limits.expand(shape[0], -1), (1, across)) if len(limits) == 1 else (limits, (down, across))


def _numbers(x: Tensor, q: Tensor, limits: Tensor, down: int, across: int) -> Tensor:
    """float64 [6]: those of _SUMS but the count, and the amax, of some rows of blocks. A zero quantizes to zero."""
    size, nonzero = x.abs(), torch.count_nonzero(x)
    blocks = torch.nn.functional.pad(size, (0, -x.shape[1] % across, 0, -len(x) % down))
    blocks = blocks.view(-1, down, limits.shape[1], across)
    limits = limits[: len(blocks)]
    numbers = (
        nonzero,
        nonzero - torch.count_nonzero(q),
        (blocks > limits[:, None, :, None]).sum(),
        torch.linalg.vector_norm(x).double().square(),
        torch.linalg.vector_norm(q - x).double().square(),
        size.amax(),
    )
    return torch.stack([number.double() for number in numbers])


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
