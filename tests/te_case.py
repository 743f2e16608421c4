"""Transformer Engine's own layers on the CPU (tests/te_cpu), and what our emulated linear multiplies beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowprec import StepContext
from lowprec.linear import SLOT_AXES, LowPrecisionLinear, Place, Shared
from lowprec.policy import GEMMS, Slots
from recipe import load_policy
from tests import te_cpu

te = te_cpu.install()
from transformer_engine.common import recipe as recipes  # noqa: E402

from lowprec import te as ours  # noqa: E402
from lowprec import te_layers as te_layers  # noqa: E402

NAME = "layers.0.mlp"
TOKENS, INPUTS, OUTPUTS = 128, 256, 384
EXACT = ("mxfp8", "fp8_block", "fp8_lm", "mxfp4")  # their dequantized operands and factors keep within one ulp
ROUNDED = ("nvfp4", "fp8_current")

ACTIVATIONS = {
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "srelu": lambda x: F.relu(x).square(),
}


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


def emulated(weight: Tensor, bias: Tensor | None, x: Tensor, dy: Tensor, slots: Slots, name: str = NAME) -> dict:
    """y, dx, dw and db from the operands of our linear, multiplied in FP64: before anything is rounded to BF16."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    layer = LowPrecisionLinear(linear, name, slots, shared())
    matrices = {"x": x.detach().reshape(-1, x.shape[-1]), "w": weight.detach(), "dy": dy.reshape(-1, dy.shape[-1])}
    number = {}
    for slot, (kind, _) in SLOT_AXES.items():
        values, scale, _ = layer.operand(slot, matrices[kind], layer.shared.position)
        number[slot] = values.double() * (1.0 if scale is None else scale.double())
    y = number["fprop.a"] @ number["fprop.b"].T + (0.0 if bias is None else bias.detach().double())
    return {
        "y": y.view(dy.shape),
        "dx": (number["dgrad.a"] @ number["dgrad.b"]).view(x.shape),
        "dw": number["wgrad.a"].T @ number["wgrad.b"],
        "db": matrices["dy"].double().sum(0),
    }


def linears(table: Mapping[str, Slots], places: Mapping[str, Place] = MappingProxyType({})) -> dict:
    """Our linears, which say what their operands are; of any size."""
    small = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    return {name: LowPrecisionLinear(small, name, slots, shared(), places.get(name)) for name, slots in table.items()}


def custom_recipe(table: Mapping[str, Slots], places: Mapping[str, Place] = MappingProxyType({})) -> Any:
    """A custom recipe for linears of these names, even if one of Transformer Engine's own would do."""
    return recipes.CustomRecipe(qfactory=ours.Factory(linears(table, places)))


def run(layer: nn.Module, table: Mapping[str, Slots], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx of a layer of Transformer Engine under a custom recipe for the linears of `table`."""
    x = x.clone().requires_grad_()
    with te.autocast(recipe=custom_recipe(table)):
        y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad


def one_ulp(value: Tensor, truth: Tensor) -> bool:
    """Within one BF16 ulp of the truth, or of FP32 accumulation where terms cancel."""
    ulp = torch.exp2(truth.abs().clamp_min(1e-30).log2().floor() - 7)
    return bool(((value.double() - truth).abs() <= ulp + 1e-6 * truth.abs().max()).all())


def distance(value: Tensor, truth: Tensor) -> float:
    return float((value.detach().double() - truth.detach().double()).norm() / truth.detach().norm())


def close(value: Tensor, truth: Tensor, policy: str) -> bool:
    """One ulp; or the rounding of two operands and the result to BF16, of which a scale's mantissa decides how much."""
    return one_ulp(value, truth) if policy in EXACT else distance(value, truth) < 3.5e-3


def te_linear(bias: bool, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    layer = te.Linear(INPUTS, OUTPUTS, bias=bias, params_dtype=dtype, device="cpu", name=NAME)
    with torch.no_grad():
        layer.weight.copy_(draw(OUTPUTS, INPUTS, spread=0.05))
        if bias:
            layer.bias.copy_(draw(OUTPUTS))
    return layer


def outcome(layer: nn.Module, slots: Slots, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    y, dx = run(layer, {NAME: slots}, x, dy)
    found = {"y": y, "dx": dx, "dw": layer.weight.grad}
    return found | {"db": layer.bias.grad} if layer.use_bias else found
