"""What a linear's six operands give when they are multiplied exactly: the truth for every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowprec import StepContext
from lowprec.linear import LowPrecisionLinear, Shared
from lowprec.policy import GEMMS, Slots
from lowprec.slots import SLOT_AXES
from recipe import load_policy

NAME = "layers.0.mlp"
TOKENS, INPUTS, OUTPUTS = 128, 256, 384
EXACT = ("mxfp8", "fp8_block", "fp8_lm", "mxfp4")  # their dequantized operands and factors keep within one ulp
ROUNDED = ("nvfp4", "fp8_current")


def slots_of(policy: str, **changes: Any) -> Slots:
    """The slots of a shipped policy, with `changes` to every spec."""
    slots = load_policy(policy).resolve([NAME], 1)[NAME]
    for gemm in GEMMS:
        sides = {side: replace(spec, **changes) for side in ("a", "b") if (spec := getattr(getattr(slots, gemm), side))}
        slots = replace(slots, **{gemm: replace(getattr(slots, gemm), **sides)})
    return slots


def shared() -> Shared:
    return Shared(position=StepContext(seed=3, step=5, row=64))


def draw(*shape: int, spread: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers times random powers of two, in BF16."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    exponents = torch.randint(-3, 4, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * spread).ldexp(exponents).bfloat16()


def emulated(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    dy: Tensor,
    slots: Slots,
    name: str = NAME,
    *,
    rounded: bool = False,
) -> dict:
    """y, dx, dw and db from the operands of our linear, multiplied in FP64: before anything is rounded to BF16.

    rounded: the operands are, as those are that stand in a BF16 tensor with their scales
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
    linear.weight.data.copy_(weight)
    layer = LowPrecisionLinear(linear, name, slots, shared())
    matrices = {"x": x.detach().reshape(-1, x.shape[-1]), "w": weight.detach(), "dy": dy.reshape(-1, dy.shape[-1])}
    number = {}
    for slot, (kind, _) in SLOT_AXES.items():
        values, scale, _ = layer.operand(slot, matrices[kind], layer.shared.position)
        number[slot] = values.double() * (1.0 if scale is None else scale.double())
        if rounded:
            number[slot] = number[slot].bfloat16().double()
    y = number["fprop.a"] @ number["fprop.b"].T + (0.0 if bias is None else bias.detach().double())
    return {
        "y": y.view(dy.shape),
        "dx": (number["dgrad.a"] @ number["dgrad.b"]).view(x.shape),
        "dw": number["wgrad.a"].T @ number["wgrad.b"],
        "db": matrices["dy"].double().sum(0),
    }


def one_ulp(value: Tensor, truth: Tensor) -> bool:
    """Within one BF16 ulp of the truth, or of FP32 accumulation where terms cancel."""
    ulp = torch.exp2(truth.abs().clamp_min(1e-30).log2().floor() - 7)
    return bool(((value.double() - truth).abs() <= ulp + 1e-6 * truth.abs().max()).all())


def distance(value: Tensor, truth: Tensor) -> float:
    return float((value.detach().double() - truth.detach().double()).norm() / truth.detach().norm())
