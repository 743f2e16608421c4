"""Transformer Engine's own layers on the CPU (tests/te_cpu), beside what our linear multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowprec.linear import LowPrecisionLinear, Place
from lowprec.policy import Slots
from tests import te_cpu
from tests.linear_truth import EXACT, INPUTS, NAME, OUTPUTS, distance, draw, one_ulp, shared

te_cpu.require()
te = te_cpu.install()
from transformer_engine.common import recipe as recipes  # noqa: E402

from lowprec import te as ours  # noqa: E402
from lowprec import te_layers as te_layers  # noqa: E402

ACTIVATIONS = {
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "srelu": lambda x: F.relu(x).square(),
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


def close(value: Tensor, truth: Tensor, policy: str) -> bool:
    """One ulp; or two operands and the result rounded to BF16: 3e-3, 3.1e-3 for the worst mantissa of a scale."""
    return one_ulp(value, truth) if policy in EXACT else distance(value, truth) < 3.2e-3


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
