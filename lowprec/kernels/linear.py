"""A low-precision linear as one differentiable operator, for CPUs that multiply in FP32.

What lowprec/linear.py does step by step, with the same quantizers, random bits and factors. The copies of a matrix for
two GEMMs are made in one go, and no Python runs between GEMMs, where it finds the caches cold. Where GEMMs are small,
threads take some rows after the others through quantizers and GEMM (cpu/product.h); sums may be added in another order
then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
SLOTS = ("fprop.a", "wgrad.b", "dgrad.a", "wgrad.a")
WEIGHTS = ("fprop.b", "dgrad.b")
NOTHING, CODES, VALUES = range(3)  # `Saves`


class _Slots:
    """Some slots as an operator takes them. packed: of which codes are wanted."""

    def __init__(self, specs: Mapping[str, QuantSpec], slots: Sequence[str], packed: str | None = None) -> None:
        uses: dict[str, Use] = {slot: "save" if slot == packed else "operand" for slot in slots}
        self.calls = [(slot, specs[slot], _call(specs[slot], SLOT_AXES[slot][1], use)) for slot, use in uses.items()]
        self.integers = tuple(chain.from_iterable(call.integers for _, _, call in self.calls))

    def inputs(self, key: Callable[[str], RandomKey]) -> list[Tensor | None]:
        """Signs and words of random bits of each."""
        return [*chain.from_iterable(call.drawn(s, key(slot) if s.draws else None) for slot, s, call in self.calls)]


class Stream:
    """The operator for one linear.

    specs: of its slots, for matrices that this rank has whole, with no amax history; kernels support them
    packs: the input is saved as codes and scales, else decoded
    ran:   int64 [3], fprop, dgrad and wgrad GEMMs so far
    """

    def __init__(self, specs: Mapping[str, QuantSpec], *, packs: bool = True) -> None:
        self._slots, self._weights = _Slots(specs, SLOTS, "wgrad.b" if packs else None), _Slots(specs, WEIGHTS)
        pairs = [(specs["fprop.a"], specs["wgrad.b"]), (specs["dgrad.a"], specs["wgrad.a"])]
        self._shares = [share(*pair) for pair in pairs for share in (same_amax, same_both_ways)]
        self._saves = CODES if packs else VALUES
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
            self._saves if torch.is_grad_enabled() else NOTHING,
            wgrad_dtype,
            self.ran,
        )
