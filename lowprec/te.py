"""Transformer Engine's linears under our policies; the only file that imports it (lowprec/backend.py asks before).

A policy becomes one of two kinds of recipe:

- its own (lowprec/native.py), where the six slots are what one of them multiplies: native FP8 or FP4 GEMMs;
- a `CustomRecipe` otherwise. `Factory` answers each `QuantizerRole` with two quantizers, one for each direction in
  which a matrix is reduced, that quantize and dequantize with our kernels; Transformer Engine then runs its BF16 GEMM.
  Nothing is faster than with our own linear; it lets any policy run inside Transformer Engine's layers, fused ones,
  too.

      matrix        row (forward y, dgrad's dy)   column (wgrad, dgrad's w)
      input         fprop.a                       wgrad.b
      weight        fprop.b                       dgrad.b
      grad_output   dgrad.a                       wgrad.a

Dequantized numbers are rounded to the compute dtype, BF16: exact where scales are powers of two; within 2^-9 where a
tensor has one FP32 scale (NVFP4, FP8 with current scaling), or where a stochastically rounded MXFP4 GEMM is multiplied
by 16/9.

Transformer Engine (2.20.2) rebuilds its quantizers for a new recipe *object* only, never because one has changed: each
phase of a schedule has its own. It pickles a CustomRecipe by reference into `_extra_state`, hence a class at module
level. Its reference quantizers with `qgemm` (custom == True) are not used: they lose the weight gradient that is added
to main_grad, and LayerNormMLP's backward fails with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from torch import Tensor, nn
from transformer_engine.common import recipe as recipes

from errors import UsageError
from lowprec import dispatch
from lowprec.formats import QuantSpec
from lowprec.linear import SLOT_AXES, Place, Shared, specs_of
from lowprec.native import Native, native
from lowprec.policy import Slots

# tensor of a QuantizerRole -> the slots that its rows and its columns are quantized for
SLOTS = {
    "input": ("fprop.a", "wgrad.b"),
    "weight": ("fprop.b", "dgrad.b"),
    "grad_output": ("dgrad.a", "wgrad.a"),
}
AVAILABLE: Mapping[str, Callable[..., Any]] = {
    "DelayedScaling": te.is_fp8_available,
    "Float8CurrentScaling": te.is_fp8_available,
    "Float8BlockScaling": te.is_fp8_block_scaling_available,
    "MXFP8BlockScaling": te.is_mxfp8_available,
    "NVFP4BlockScaling": te.is_nvfp4_available,
    "CustomRecipe": te.is_fp8_available,  # `autocast` asks for FP8, whatever its recipe
}


def why_not(recipe: str) -> str:
    """Transformer Engine's own reason why `recipe` cannot run on the current GPU; empty if it can."""
    try:
        able, reason = AVAILABLE[recipe](return_reason=True)
    except (RuntimeError, AssertionError) as error:  # no driver, no GPU
        return str(error).splitlines()[0]
    return "" if able else reason


def native_recipe(found: Native) -> recipes.Recipe:
    """A new recipe object."""
    switches = dict(found.switches)
    options: dict[str, Any] = {key: value for key, value in switches.items() if key != "power_2_scale"}
    if "fp8_format" in options:
        options["fp8_format"] = recipes.Format[options["fp8_format"]]
    recipe = getattr(recipes, found.recipe)(**options)
    if "power_2_scale" in switches:  # class attributes, which an environment variable may have changed
        parameters = recipes.QParams(power_2_scale=bool(switches["power_2_scale"]))
        recipe.fp8_quant_fwd_inp = recipe.fp8_quant_fwd_weight = recipe.fp8_quant_bwd_grad = parameters
    return recipe


def custom_recipe(table: Mapping[str, Slots], shared: Shared) -> recipes.CustomRecipe:
    """A new recipe that quantizes the linears of `table` by their names, and no others."""
    for name, slots in table.items():
        if delayed := [slot for slot, spec in specs_of(slots).items() if spec is not None and spec.amax_history]:
            raise UsageError(f"{name}: {delayed[0]} has delayed scaling, which a custom recipe has no histories for")
    return recipes.CustomRecipe(qfactory=Factory(table, shared))


@dataclass(frozen=True)
class Factory:
    """Quantizers for every `QuantizerRole` of Transformer Engine's layers.

    table:   name of a linear (of LayerNormMLP: NAME.fc1 and NAME.fc2) -> its slots
    shared:  says where the micro-batch is, for random bits
    """

    table: Mapping[str, Slots]
    shared: Shared

    def __call__(self, role: te.QuantizerRole | None) -> te.Quantizer:
        """Outputs, gradients of inputs, attention and unknown linears stay high."""
        if role is None or role.tensor_type not in SLOTS or role.name not in self.table:
            return te.IdentityQuantizer()
        specs = specs_of(self.table[role.name])
        row, column = (
            QuantizeDequantize(role.name, slot, specs[slot], self.shared) for slot in SLOTS[role.tensor_type]
        )
        return te.HybridQuantizer(rowwise_quantizer=row, columnwise_quantizer=column)


class QuantizeDequantize(te.IdentityQuantizer):
    """Rounds a matrix to the numbers that a slot's format has, and keeps its dtype.

    Transformer Engine sets `with_amax_reduction` and `amax_reduction_group` where a matrix is one part of a sequence.
    """

    def __init__(self, name: str, slot: str, spec: QuantSpec | None, shared: Shared) -> None:
        super().__init__()
        self.name, self.slot, self.spec, self.shared = name, slot, spec, shared
        self.with_amax_reduction = False
        self.amax_reduction_group: dist.ProcessGroup | None = None

    def copy(self) -> QuantizeDequantize:
        twin = QuantizeDequantize(self.name, self.slot, self.spec, self.shared)
        twin.set_usage(rowwise=self.rowwise_usage, columnwise=self.columnwise_usage)
        twin.internal, twin.optimize_for_gemm = self.internal, self.optimize_for_gemm
        twin.with_amax_reduction, twin.amax_reduction_group = self.with_amax_reduction, self.amax_reduction_group
        return twin

    def _maybe_cast(self, tensor: Tensor) -> Tensor:
        """[..., features] -> the same shape and dtype. Transformer Engine's one hook between a matrix and its copy."""
        tensor, spec = tensor.detach(), self.spec
        if spec is None:
            return tensor
        kind, axis = SLOT_AXES[self.slot]
        matrix = tensor.reshape(-1, tensor.shape[-1])
        if spec.hadamard and matrix.shape[axis] % spec.hadamard:
            raise UsageError(
                f"{self.name}: {self.slot} rotates groups of {spec.hadamard}, which do not divide the "
                f"{matrix.shape[axis]} numbers along its reduction axis; choose sizes that divide"
            )
        key = self.shared.position.key(self.name, self.slot, tokens=kind != "w")
        amax = None
        if self.with_amax_reduction and spec.takes_amax:
            amax = dispatch.amax(matrix, spec, axis, key)
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.amax_reduction_group)
        direct = tensor.dtype == torch.bfloat16 and spec.exact_in_bf16
        dtype = torch.bfloat16 if direct and not spec.takes_amax and not spec.three_quarters else torch.float32
        values, scale, _ = dispatch.operand(matrix, spec, axis, key, None, dtype, amax)
        if spec.three_quarters:  # 4/3 x 4/3 = 2 x 8/9: one operand exact, the other too large by 2^-9 throughout
            scale = torch.tensor(2.0 if self.slot.endswith("a") else 8 / 9, device=values.device)
        return (values if scale is None else values * scale).to(tensor.dtype).contiguous().view(tensor.shape)


class TeLinear(te.Linear):
    """Drop-in for an nn.Linear, as lowprec.linear.LowPrecisionLinear: same parameters under the same names.

    The module belongs to one rank: under tensor parallelism its matrices are the rank's parts, and so are amaxes.
    """

    def __init__(self, linear: nn.Linear, name: str, slots: Slots, shared: Shared, place: Place | None = None) -> None:
        bias, dtype = linear.bias is not None, linear.weight.dtype
        super().__init__(
            linear.in_features, linear.out_features, bias=bias, params_dtype=dtype, device="meta", name=name
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.logical_name, self.shared, self.place = name, shared, place
        self.skip_bias = False  # whoever uses the output adds the bias
        self.delayed: dict[str, Any] = {}
        self.ran: set[str] = set()
        self.use(slots)

    def use(self, slots: Slots) -> None:
        """Take other slots from now on: a new recipe object, without which nothing would change."""
        self.slots, self.specs = slots, specs_of(slots)
        found = native(slots)
        self.recipe = native_recipe(found) if found else custom_recipe({self.logical_name: slots}, self.shared)
        self._fresh = True

    def prepare(self) -> None:
        """The weight has changed: its copies are made anew in the next forward that trains."""
        self._fresh = True

    @torch.compiler.disable  # as our own linear: the rest of a block is compiled around it
    def forward(self, inp: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        keep = self.shared.keep_weights and torch.is_grad_enabled()
        first, self._fresh = (self._fresh if keep else None), self._fresh and not keep
        self.apply_bias = self.use_bias and not self.skip_bias
        with te.autocast(enabled=self.slots.quantized, recipe=self.recipe):
            y = super().forward(inp, is_first_microbatch=first)
        assert isinstance(y, Tensor)
        self._note("fprop")
        if y.requires_grad:
            y.register_hook(partial(self._backward, inp.requires_grad))
        return y

    def _backward(self, input_too: bool, _: Tensor) -> None:
        for gemm in ("dgrad", "wgrad") if input_too else ("wgrad",):
            self._note(gemm)

    def _note(self, gemm: str) -> None:
        """One GEMM for the receipt."""
        elements = (self.specs[f"{gemm}.{side}"] for side in ("a", "b"))
        words = ["high" if spec is None else f"{spec.element} ({type(self.recipe).__name__})" for spec in elements]
        self.shared.counts[gemm, words[0], words[1], "transformer_engine"] += 1
        self.ran.add(gemm)
