"""Transformer Engine's own layers on the CPU (tests/te_cpu), beside what our linear multiplies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowprec.linear import LowPrecisionLinear
from lowprec.philox import StepContext
from lowprec.policy import Slots
from lowprec.slots import Place
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
    return {name: ours.Part(small, name, slots, shared(), places.get(name)) for name, slots in table.items()}


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


class Product(NamedTuple):
    """One GEMM that Transformer Engine ran over our quantizers, and the matrices that it gave to them.

    given: slots "a" and "b" of the GEMM -> the matrix before it was quantized, [rows, columns]
    value: what the GEMM gave, bias included
    """

    name: str
    gemm: str
    slots: Slots
    place: Place | None
    position: StepContext
    given: dict[str, Tensor]
    bias: Tensor | None
    value: Tensor

    def exact(self, *, rounded: bool = False) -> Tensor:
        """Of our linear's operands for the same matrices, multiplied in FP64. rounded: operands to BF16 before."""
        small = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        layer, number = LowPrecisionLinear(small, self.name, self.slots, shared(), self.place), {}
        for side, matrix in self.given.items():
            values, scale, _ = layer.operand(f"{self.gemm}.{side}", matrix, self.position)
            whole = values.double() * (1.0 if scale is None else scale.double())
            number[side] = whole.bfloat16().double() if rounded else whole
        a, b = number["a"], number["b"]
        left, right = a.T if self.gemm == "wgrad" else a, b.T if self.gemm == "fprop" else b
        product = left @ right + (0.0 if self.bias is None else self.bias.double())
        return product.view(self.value.shape)

    def check(self, policy: str) -> float:
        """Assert one ulp; returns the relative Frobenius distance to the product of our unrounded operands.

        Where a tensor has one FP32 scale, operands are rounded to BF16 before they are multiplied: the ulp is that of
        the rounded ones.
        """
        truth = self.exact()
        nearest = truth if policy in EXACT else self.exact(rounded=True)
        assert one_ulp(self.value, nearest), (policy, self.name, self.gemm)
        return distance(self.value, truth)


def check_all(found: list[Product], policy: str) -> None:
    """One ulp each; and within 3e-3 of our linear, which single products with one FP32 scale a tensor may miss.

    Such a product is off by what BF16 takes from two operands and from itself. The last is 1.7e-3, the others depend on
    the mantissa of the scale, which all numbers of an operand share: 1.6e-3 on average, 2.5e-3 for the worst. So 3e-3
    is what products have root mean square, and sqrt(1.7^2 + 2 x 2.5^2) = 3.9e-3 is the limit of one.
    """
    far = torch.tensor([each.check(policy) for each in found])
    assert far.square().mean().sqrt() < 3e-3 and far.max() < 3.9e-3, (policy, far)


@contextmanager
def products() -> Iterator[list[Product]]:
    """Every GEMM of two operands that our quantizers made, in order, for as long as this lasts."""
    found: list[Product] = []
    made: dict[int, tuple[Any, Tensor, Tensor]] = {}  # address of an operand -> quantizer, matrix before, operand
    cast, multiply = ours.QuantizeDequantize._maybe_cast, te_cpu.tex.generic_gemm

    def note(quantizer: Any, tensor: Tensor) -> Tensor:
        operand = cast(quantizer, tensor)
        made[operand.data_ptr()] = quantizer, tensor.detach().reshape(-1, tensor.shape[-1]).clone(), operand
        return operand

    def watched(A: Tensor, *rest: Any, **options: Any) -> Any:
        result, b = multiply(A, *rest, **options), rest[1]
        if A.data_ptr() in made and b.data_ptr() in made:
            pair = {
                quantizer.slot: (quantizer, matrix) for quantizer, matrix, _ in (made[x.data_ptr()] for x in (A, b))
            }
            linear = next(quantizer.linear for quantizer, _ in pair.values())
            (gemm,) = {slot.partition(".")[0] for slot in pair}
            given = {slot[-1]: matrix for slot, (_, matrix) in pair.items()}
            bias = rest[6] if gemm == "fprop" and rest[6] is not None and rest[6].numel() else None
            where = linear.name, gemm, linear.slots, linear.place, linear.position
            found.append(Product(*where, given, bias, result[0].clone()))
        return result

    ours.QuantizeDequantize._maybe_cast, te_cpu.tex.generic_gemm = note, watched
    try:
        yield found
    finally:
        ours.QuantizeDequantize._maybe_cast, te_cpu.tex.generic_gemm = cast, multiply


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
