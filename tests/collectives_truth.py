"""What a payload makes of numbers, written anew with torch's own FP8 casts and FP64: the truth for test_collectives_*.

Only finite numbers. A flat tensor is given with the lengths of its parts (blocks start anew in each) and of its logical
tensors (which have the shared scales, from the largest magnitudes on all ranks).
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
SHARED = ("fp8_e4m3", "fp8_e5m2", "fp8_lm")


def _floor_power(x: Tensor) -> Tensor:
    """2^floor(log2 x), exactly."""
    _, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - 1).float()


def _fp8(x: Tensor, scale: Tensor, element: str) -> Tensor:
    dtype, largest = FP8[element]
    return (x * scale).clamp(-largest, largest).to(dtype).float() * torch.div(torch.ones_like(scale), scale)


def _integers(x: Tensor, scale: Tensor, largest: int, unit: int) -> Tensor:
    """Integers of 1 / unit; scale maps numbers to multiples of it."""
    whole = (x * scale).double().mul(unit).round().clamp(-largest, largest)
    return (whole / unit).float() * torch.div(torch.ones_like(scale), scale)


def _blocks(x: Tensor, name: str) -> Tensor:
    """A block payload of [blocks, size]."""
    amax = x.abs().amax(1, keepdim=True)
    one = torch.ones_like(amax)
    if name.startswith("mx"):
        if name == "mxint8":
            decode = _floor_power(amax)
        else:
            target = amax * torch.tensor(1 / FP8[name[-4:]][1])
            low = _floor_power(target)
            decode = torch.where(target > low, 2 * low, low)
        decode = torch.where(amax == 0, 2.0**-127, decode)
        scale = torch.div(one, decode)
        return _integers(x, scale, 127, 64) if name == "mxint8" else _fp8(x, scale, name[-4:])
    if name.startswith("int"):
        largest, unit = (127, 64) if name == "int8_b128" else (7, 4)
        scale = torch.where(amax == 0, one, torch.div(torch.full_like(amax, largest / unit), amax))
        return _integers(x, scale, largest, unit)
    element = name[4:8]
    scale = torch.where(amax == 0, one, _floor_power(torch.div(torch.full_like(amax, FP8[element][1]), amax)))
    return _fp8(x, scale, element)


def shared_scales(xs: list[Tensor], segments: list[int], name: str, mu: float = 1.0) -> Tensor:
    """Encode scale of each logical tensor of the ranks' flat tensors."""
    element = "e5m2" if name == "fp8_e5m2" else "e4m3"
    largest = torch.tensor(FP8[element][1])
    scales = []
    for tensor in zip(*(x.float().split(segments) for x in xs), strict=True):
        amax = torch.stack([t.abs().amax() if t.numel() else torch.zeros(()) for t in tensor]).amax()
        scale = torch.div(largest, amax) if amax else torch.ones(())
        scales.append(_floor_power(scale) if name == "fp8_lm" and amax else scale)
    return torch.stack(scales) * mu


def quantized(x: Tensor, splits: list[int], segments: list[int], name: str, scales: Tensor | None = None) -> Tensor:
    """x, float32, after its trip as payload `name`."""
    if name == "fp32":
        return x
    if name == "bf16":
        return x.bfloat16().float()
    if name in SHARED:
        assert scales is not None
        element = "e5m2" if name == "fp8_e5m2" else "e4m3"
        return _fp8(x, scales.repeat_interleave(torch.tensor(segments)), element)
    size = 128 if name.endswith("b128") else 32
    parts = []
    for part in x.split(splits):
        padded = torch.nn.functional.pad(part, (0, -part.numel() % size)).view(-1, size)
        parts.append(_blocks(padded, name).flatten()[: part.numel()] if part.numel() else part)
    return torch.cat(parts)


def reduced(xs: list[Tensor], splits: list[int], segments: list[int], name: str, mu: float = 1.0) -> list[Tensor]:
    """Each rank's part of the sum over ranks, first rank first."""
    scales = shared_scales(xs, segments, name, mu) if name in SHARED else None
    total: Tensor | None = None
    for x in xs:
        here = quantized(x.float(), splits, segments, name, scales)
        total = here if total is None else total + here
    assert total is not None
    return list(total.split(splits))
