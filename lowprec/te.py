"""Policies as Transformer Engine's recipes; only this file and lowprec/te_layers.py import it.

The slots of a layer become one of three kinds of recipe:

- its own (lowprec/native.py), where the six slots are what one of them multiplies: native FP8 or FP4 GEMMs;
- for delayed scaling a `CustomRecipe` of its native quantizers over *our* amax histories: those of its `DelayedScaling`
  are rolled at every exit of `autocast`, and lie in an `_extra_state` that no checkpoint of ours holds;
- a `CustomRecipe` otherwise. `Factory` answers each `QuantizerRole` with two quantizers, one for each direction in
  which a matrix is reduced, that quantize and dequantize as our linear does; Transformer Engine then runs its BF16
  GEMM. Nothing is faster than with our own linear; it lets any policy run inside Transformer Engine's layers.

      matrix        row (forward y, dgrad's dy)   column (wgrad, dgrad's w)
      input         fprop.a                       wgrad.b
      weight        fprop.b                       dgrad.b
      grad_output   dgrad.a                       wgrad.a

Dequantized numbers are rounded to the compute dtype, BF16: exact where scales are powers of two, within 2^-9 where a
tensor has one FP32 scale (NVFP4, FP8 with current scaling).

Its reference quantizers with `qgemm` are not used: they lose the weight gradient that is added to main_grad, and
LayerNormMLP's backward fails with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from transformer_engine.common import recipe as recipes  # pyright: ignore[reportMissingImports]

from errors import UsageError
from lowprec.linear import LowPrecisionLinear, Shared
from lowprec.native import DELAYED, Native, native
from lowprec.policy import Slots
from lowprec.slots import SLOT_AXES, Place

# tensor of a QuantizerRole -> the slots that its rows and its columns are quantized for
SLOTS = {
    "input": ("fprop.a", "wgrad.b"),
    "weight": ("fprop.b", "dgrad.b"),
    "grad_output": ("dgrad.a", "wgrad.a"),
}
# 4/3 x 4/3 as two factors that keep E2M1's two significant bits within BF16's eight: too small by 2^-12.
SIXTEEN_NINTHS = {"a": 13 / 8, "b": 35 / 32}
FP8 = {"e4m3": te.DType.kFloat8E4M3, "e5m2": te.DType.kFloat8E5M2}
AVAILABLE: Mapping[str, Callable[..., Any]] = {
    DELAYED: te.is_fp8_available,
    "Float8CurrentScaling": te.is_fp8_available,
    "Float8BlockScaling": te.is_fp8_block_scaling_available,
    "MXFP8BlockScaling": te.is_mxfp8_available,
    "NVFP4BlockScaling": te.is_nvfp4_available,
    "CustomRecipe": te.is_fp8_available,  # `autocast` asks for FP8, whatever its recipe
}


class Part(LowPrecisionLinear):
    """One linear of the policy inside a layer of Transformer Engine.

    owner:                  that layer
    position, training_now: of the forward or backward that runs
    quantized:              slots whose matrix has gone through our quantizer since the recipe was made
    """

    communicates = True

    def __init__(self, linear: nn.Linear, name: str, slots: Slots, shared: Shared, place: Place | None = None) -> None:
        vars(self)["owner"] = None  # not a child of its part
        super().__init__(linear, name, slots, shared, place)
        self.position, self.training_now = shared.position, True
        self.quantized: set[str] = set()

    def use(self, slots: Slots) -> None:
        super().use(slots)
        if (owner := vars(self)["owner"]) is not None:
            owner.renew()

    def prepare(self) -> None:
        """The weight has changed: its copies are made anew in the next forward that trains."""
        vars(self)["owner"].forget_copies()

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"{self.name} is a part of {type(vars(self)['owner']).__name__}, which is called instead")


def why_not(recipe: str) -> str:
    """Transformer Engine's own reason why `recipe` cannot run on the current GPU; empty if it can."""
    try:
        able, reason = AVAILABLE[recipe](return_reason=True)
    except (RuntimeError, AssertionError) as error:  # no driver, no GPU
        return str(error).splitlines()[0]
    return "" if able else reason


def recipe_of(linears: Mapping[str, Part]) -> recipes.Recipe:
    """A new recipe object for one layer. linears: name of a `QuantizerRole` -> the part that it is.

    Its own only if it is that of all of them.
    """
    first, *others = {native(linear.slots) for linear in linears.values()}
    if first is None or others:
        return recipes.CustomRecipe(qfactory=Factory(linears), backward_override=None)
    if first.recipe == DELAYED:
        return recipes.CustomRecipe(qfactory=Histories(linears), backward_override=None)
    return native_recipe(first)


def native_recipe(found: Native) -> recipes.Recipe:
    """A new recipe object, as `found` says and not as NVTE_* environment variables do: they are defaults of fields."""
    switches = dict(found.switches)
    options: dict[str, Any] = {key: value for key, value in switches.items() if key != "power_2_scale"}
    if "fp8_format" in options:
        options["fp8_format"] = recipes.Format[options["fp8_format"]]
    if found.recipe == "NVFP4BlockScaling":
        options |= {"row_scaled_activation": False, "nvfp4_4over6": "none"}
    recipe = getattr(recipes, found.recipe)(**options, backward_override=None)
    if "power_2_scale" in switches:  # attributes of the class
        parameters = recipes.QParams(power_2_scale=bool(switches["power_2_scale"]))
        recipe.fp8_quant_fwd_inp = recipe.fp8_quant_fwd_weight = recipe.fp8_quant_bwd_grad = parameters
    return recipe


# Recipes are compared by what they hold and written out as keys: a factory is the same as itself alone, and short.
@dataclass(frozen=True, eq=False, repr=False)
class Factory:
    """Quantizers for every `QuantizerRole` of Transformer Engine's layers: those of `linears`, by the role's name.

    A class at module level: a CustomRecipe is pickled by reference wherever somebody saves `_extra_state`.
    """

    linears: Mapping[str, Part]

    def __call__(self, role: te.QuantizerRole | None) -> te.Quantizer:
        """Outputs, gradients of inputs, attention and unknown linears stay high."""
        if role is None or role.tensor_type not in SLOTS or role.name not in self.linears:
            return te.IdentityQuantizer()
        return self.quantizer(self.linears[role.name], *SLOTS[role.tensor_type])

    def quantizer(self, linear: Part, row: str, column: str) -> te.Quantizer:
        both = GatherFirst if SLOT_AXES[row][0] == "x" else te.HybridQuantizer
        return both(
            rowwise_quantizer=QuantizeDequantize(linear, row), columnwise_quantizer=QuantizeDequantize(linear, column)
        )


@dataclass(frozen=True, eq=False, repr=False)
class Histories(Factory):
    """Transformer Engine's quantizers of delayed scaling over the amax histories of our linears.

    Its kernels raise `amax` to that of what they quantize: the history's open slot.
    """

    def quantizer(self, linear: Part, row: str, column: str) -> te.Quantizer:
        state = linear.delayed[SLOT_AXES[row][0]]
        return te.Float8Quantizer(scale=state.scale, amax=state.history[:1], fp8_dtype=FP8[state.spec.element])


class GatherFirst(te.HybridQuantizer):
    """Of the input of a column-parallel linear, whose parts all ranks gather with sequence parallelism.

    Transformer Engine would quantize a rank's part, dequantize it, gather that and quantize it again: another rounding,
    and a second rotation. What is `custom` it gathers first.
    """

    custom = True


class QuantizeDequantize(te.IdentityQuantizer):
    """Rounds a matrix to the numbers that a slot of `linear` has, and keeps its dtype."""

    def __init__(self, linear: Part, slot: str) -> None:
        super().__init__()
        self.linear, self.slot = linear, slot

    def copy(self) -> QuantizeDequantize:
        twin = QuantizeDequantize(self.linear, self.slot)
        twin.set_usage(rowwise=self.rowwise_usage, columnwise=self.columnwise_usage)
        twin.internal, twin.optimize_for_gemm = self.internal, self.optimize_for_gemm
        return twin

    def _maybe_cast(self, tensor: Tensor) -> Tensor:
        """[..., features] -> the same shape and dtype. Transformer Engine's one hook between a matrix and its copy."""
        linear, (kind, axis), tensor = self.linear, SLOT_AXES[self.slot], tensor.detach()
        spec = linear.specs[self.slot]
        if spec is None:
            return tensor
        matrix = tensor.reshape(-1, tensor.shape[-1])
        if spec.hadamard and matrix.shape[axis] % spec.hadamard:
            raise UsageError(
                f"{linear.name}: {self.slot} rotates groups of {spec.hadamard}, which do not divide the "
                f"{matrix.shape[axis]} numbers along its reduction axis; choose sizes that divide"
            )
        training = kind == "dy" or linear.training_now
        values, scale, _ = linear.operand(self.slot, matrix, linear.position, training=training)
        linear.quantized.add(self.slot)
        other = linear.specs[self.slot[:-1] + ("b" if self.slot[-1] == "a" else "a")]
        both = spec.three_quarters and other is not None and other.three_quarters
        if both and tensor.dtype == torch.bfloat16:
            scale = torch.tensor(SIXTEEN_NINTHS[self.slot[-1]], device=values.device)
        return (values if scale is None else values.float() * scale).to(tensor.dtype).contiguous().view(tensor.shape)
