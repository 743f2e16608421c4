"""A low-precision linear as one differentiable operator, for CPUs that multiply in FP32.

What lowprec/linear.py does step by step, with the same quantizers, random bits and factors. The copies of a matrix for
two GEMMs are made in one go, and no Python runs between GEMMs, where it finds the caches cold. Where GEMMs are small,
threads take some rows after the others through quantizers and GEMM (cpu/product.h); sums may be added in another order
then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor

from lowprec.formats import QuantSpec
from lowprec.kernels import _call
from lowprec.kernels.support import Use
from lowprec.philox import RandomKey
from lowprec.quantized import Operand
from lowprec.slots import SLOT_AXES, same_amax, same_both_ways

# in the order of `Slot` in cpu/linear_ops.cpp
SLOTS: dict[str, Use] = {"fprop.a": "operand", "wgrad.b": "save", "dgrad.a": "operand", "wgrad.a": "operand"}
WEIGHTS: dict[str, Use] = {"fprop.b": "operand", "dgrad.b": "operand"}


class _Slots:
    """Some slots as an operator takes them."""

    def __init__(self, specs: Mapping[str, QuantSpec], uses: Mapping[str, Use]) -> None:
        self.calls = [(slot, specs[slot], _call(specs[slot], SLOT_AXES[slot][1], use)) for slot, use in uses.items()]
        self.integers = tuple(chain.from_iterable(call.integers for _, _, call in self.calls))

    def inputs(self, key: Callable[[str], RandomKey]) -> list[Tensor | None]:
        """Signs and words of random bits of each."""
        return [*chain.from_iterable(call.drawn(s, key(slot) if s.draws else None) for slot, s, call in self.calls)]


class Stream:
    """The operator for one linear.

    specs: of its slots, for matrices that this rank has whole, with no amax history; kernels support them
    ran:   int64 [3], fprop, dgrad and wgrad GEMMs so far
    """

    def __init__(self, specs: Mapping[str, QuantSpec]) -> None:
        self._slots, self._weights = _Slots(specs, SLOTS), _Slots(specs, WEIGHTS)
        dy = specs["dgrad.a"], specs["wgrad.a"]
        self._shares = [same_amax(specs["fprop.a"], specs["wgrad.b"]), same_amax(*dy), same_both_ways(*dy)]
        self.ran = torch.zeros(3, dtype=torch.int64)

    def weights(self, weight: Tensor, key: Callable[[str], RandomKey]) -> tuple[Operand, Operand]:
        """A bfloat16 weight as fprop and dgrad multiply it: float32 values."""
        found = torch.ops.lowprec_cpu.weights.default(weight, self._weights.inputs(key), self._weights.integers)
        scaled = [call.has_scale for _, _, call in self._weights.calls]
        fprop, dgrad = (Operand(found[2 * i], found[2 * i + 1] if scaled[i] else None, None) for i in range(2))
        return fprop, dgrad

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: tuple[Operand, Operand],
        key: Callable[[str], RandomKey],
        wgrad_dtype: torch.dtype,
    ) -> Tensor:
        """y [..., out] in x's dtype; differentiable in x, weight and bias.

        x:           [..., in], bfloat16; weight [out, in] and bias [out] likewise
        weights:     the weight for fprop and for dgrad: float32 values, a scalar or no scale
        key:         of the random bits of a slot
        wgrad_dtype: of the weight's gradient
        """
        fprop, dgrad = weights
        return torch.ops.lowprec_cpu.linear.default(
            x,
            weight,
            bias,
            fprop.values,
            fprop.scale,
            dgrad.values,
            dgrad.scale,
            self._slots.inputs(key),
            self._slots.integers,
            self._shares,
            wgrad_dtype,
            torch.is_grad_enabled(),
            self.ran,
        )
