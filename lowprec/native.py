"""Which of Transformer Engine's own recipes multiplies exactly the operands that six slots name.

    recipe              x, w forward; w backward; x backward       dy                         switches
    DelayedScaling      E4M3, an amax history a tensor             E5M2 or E4M3               history
    Float8CurrentScaling  E4M3, one scale a tensor                 E5M2 or E4M3               power-of-two scales
    Float8BlockScaling  E4M3, x 1x128, w 128x128 or 1x128          E4M3 or E5M2, 1x128        FP32 scales
    MXFP8BlockScaling   E4M3, blocks of 32, exponents rounded up   E4M3 or E5M2, the same
    NVFP4BlockScaling   E2M1, x 1x16, w 16x16 or 1x16              E2M1 1x16                  SR: of dy; RHT: of both
                                                                                              operands of wgrad; 2-D: w
Source: transformer_engine/common/recipe/__init__.py and quantization.py of 2.20.2. Every recipe quantizes each matrix
along its own GEMM's reduction axis from the high-precision matrix, as our linear does. Policies that equal none of them
run through a CustomRecipe (lowprec/te.py) or through our own linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from lowprec.formats import QuantSpec, resolve_spec
from lowprec.policy import Gemm, Slots

DELAYED = "DelayedScaling"


@dataclass(frozen=True)
class Native:
    """A recipe of Transformer Engine: the name of its class, and its switches."""

    recipe: str
    switches: tuple[tuple[str, bool | int | str], ...] = ()

    @property
    def multiple(self) -> int:
        """What features and tokens must be multiples of."""
        return _MULTIPLES[self.recipe]

    def __str__(self) -> str:
        return f"{self.recipe}({', '.join(f'{key}={value}' for key, value in self.switches)})"


# FP8 GEMMs of cuBLASLt take multiples of 16; the others are the blocks that the recipes' quantizers do not pad.
_MULTIPLES = {
    DELAYED: 16,
    "Float8CurrentScaling": 16,
    "Float8BlockScaling": 128,
    "MXFP8BlockScaling": 32,
    "NVFP4BlockScaling": 16,
}


def native(slots: Slots) -> Native | None:
    """The recipe that multiplies what `slots` say; None if none does."""
    wanted = (slots.fprop, slots.dgrad, slots.wgrad)
    history = slots.fprop.a.amax_history if slots.fprop.a is not None else 0
    return next((found for found, gemms in _recipes(history) if gemms == wanted), None)


def _recipes(history: int) -> Iterator[tuple[Native, tuple[Gemm, Gemm, Gemm]]]:
    """Every recipe with every setting of its switches, and what its GEMMs multiply."""
    for gradient, form in (("e5m2", "HYBRID"), ("e4m3", "E4M3")):
        e4m3, other = resolve_spec("fp8_e4m3"), resolve_spec(f"fp8_{gradient}")
        if history:
            delayed = [replace(spec, amax_history=history) for spec in (e4m3, e4m3, other)]
            yield Native(DELAYED, (("fp8_format", form), ("amax_history_len", history))), _same(*delayed)
        for scale in ("fp32", "pow2"):
            current = [replace(spec, scale=scale) for spec in (e4m3, e4m3, other)]
            switches = (("fp8_format", form), ("power_2_scale", scale == "pow2"))
            yield Native("Float8CurrentScaling", switches), _same(*current)
            for square in (True, False):
                one = replace(resolve_spec("fp8_block_1x128"), scale=scale)
                two = replace(one, block=(128, 128) if square else (1, 128))
                switches = (
                    ("fp8_format", form),
                    ("power_2_scale", scale == "pow2"),
                    ("w_block_scaling_dim", 1 + square),
                )
                yield Native("Float8BlockScaling", switches), _same(one, two, replace(one, element=gradient))
        mx = resolve_spec("mxfp8_e4m3")
        yield Native("MXFP8BlockScaling", (("fp8_format", form),)), _same(mx, mx, resolve_spec(f"mxfp8_{gradient}"))
    for rht, sr, square in product((True, False), repeat=3):
        one = resolve_spec("nvfp4")
        weight = resolve_spec("nvfp4_2d") if square else one
        gradient = replace(one, rounding="stochastic" if sr else "nearest")
        turned = 16 if rht else 0
        switches = (
            ("disable_rht", not rht),
            ("disable_stochastic_rounding", not sr),
            ("disable_2d_quantization", not square),
        )
        yield (
            Native("NVFP4BlockScaling", switches),
            (
                Gemm(one, weight),
                Gemm(gradient, weight),
                Gemm(replace(gradient, hadamard=turned), replace(one, hadamard=turned)),
            ),
        )


def _same(x: QuantSpec, w: QuantSpec, dy: QuantSpec) -> tuple[Gemm, Gemm, Gemm]:
    """The three GEMMs of a recipe that quantizes a matrix in one way, whatever it is used for."""
    return Gemm(x, w), Gemm(dy, w), Gemm(dy, x)
