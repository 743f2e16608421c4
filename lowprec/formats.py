"""Formats: element and scale encodings, and `QuantSpec`, which says how one matrix is quantized.

A floating-point element ExMy has a sign, x exponent bits (field f) and y mantissa bits (field m), bias b:

    f > 0:  (-1)^s 2^(f - b) (1 + m / 2^y)          f = 0:  (-1)^s 2^(1 - b) (m / 2^y)          b = 2^(x - 1) - 1

    format  bias      max  smallest  NaN, Inf                                 source
    e4m3       7      448      2^-9  NaN only (S.1111.111)                    OCP OFP8 1.0
    e5m2      15    57344     2^-16  as IEEE 754: the top exponent field      OCP OFP8 1.0
    e3m2       3       28      2^-4  none                                     OCP MX 1.0
    e2m3       1      7.5      2^-3  none                                     OCP MX 1.0
    e2m1       1        6      2^-1  none                                     OCP MX 1.0
    int8       -   127/64      2^-6  none; two's complement, -128 never made  OCP MX 1.0
    eXmY                             X >= 5 as IEEE 754 (Y = 0: one NaN, no   generalises the rows above: e5m10
                                     Inf), X <= 4 none (but e4m3)             is FP16, e8m7 is BF16
                                     X = 0: bias 0, multiples of 2^(1 - Y)

    scale   bytes  value                     limits
    e8m0    uint8  2^(code - 127)            code 255 is NaN; no zero                           OCP MX 1.0
    e4m3    uint8  the element format e4m3   0 .. 448                                           NVFP4, arXiv 2509.25149
    ue5m3   uint8  no sign, 5 + 3 bits       0 .. 61440; field 31 unused (code 255 is NaN)      arXiv 2609.02846
    fp32    f32    any                                                                          Transformer Engine
    pow2    f32    2^k                       the encode scale is rounded down to a power of two  Transformer Engine

`.scales` always holds decode scales: value = element * scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any, Literal, get_args

from errors import UsageError

Scale = Literal["e8m0", "e4m3", "ue5m3", "fp32", "pow2"]
ScaleRule = Literal["rceil", "floor", "ceil", "even", "amax"]
Rounding = Literal["nearest", "nearest_away", "toward_zero", "stochastic"]
Signs = Literal["none", "fixed", "run", "call"]
FourOverSix = Literal["mae", "mse", "mae_fast", "mse_fast"]
Block = Literal["tensor", "row"] | tuple[int, int]

_CHOICES = {"scale": Scale, "scale_rule": ScaleRule, "rounding": Rounding, "signs": Signs}


@dataclass(frozen=True)
class ElementFormat:
    """A small number format.

    exponent, mantissa:  field widths in bits; exponent 0 is fixed point
    bias:                of the exponent field
    max:                 largest finite magnitude
    special:             codes that are no numbers: "none", "nan" (all ones) or "ieee" (top exponent field)
    signed:              False for ue5m3
    twos_complement:     int8 only; the others are sign and magnitude
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    max: float
    special: Literal["none", "nan", "ieee"]
    signed: bool = True
    twos_complement: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code, sign included."""
        return self.signed + self.exponent + self.mantissa

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number, and of every subnormal one."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """floor(log2(max)): what the OCP rules subtract."""
        return math.frexp(self.max)[1] - 1

    @property
    def nan(self) -> int | None:
        """Code of the positive NaN, if there is one."""
        return None if self.special == "none" else (1 << (self.exponent + self.mantissa)) - 1


@cache
def element_format(name: str) -> ElementFormat:
    """The element format `name`: "e4m3", "int8", or any "eXmY" with X 0..8 and Y 0..10.

    Raises UsageError for anything else.
    """
    if name == "int8":
        return ElementFormat("int8", 0, 7, 0, 127 / 64, "none", twos_complement=True)
    found = re.fullmatch(r"e(\d)m(\d+)", name)
    if not found or not (0 <= (e := int(found[1])) <= 8 and 0 <= (m := int(found[2])) <= 10 and e + m >= 1):
        raise UsageError(
            f"element format {name!r} is unknown; use e4m3, e5m2, e3m2, e2m3, e2m1, int8, or eXmY with X 0..8, Y 0..10"
        )
    if e == 0:
        return ElementFormat(name, 0, m, 0, 2.0 - 2.0 ** (1 - m), "none")
    bias = (1 << (e - 1)) - 1
    if name == "e4m3":
        return ElementFormat(name, 4, 3, 7, 448.0, "nan")
    top = (1 << e) - 1 - (e >= 5) - bias
    special = "none" if e < 5 else "ieee" if m else "nan"
    return ElementFormat(name, e, m, bias, 2.0**top * (2.0 - 2.0**-m), special)


UE5M3 = ElementFormat("ue5m3", 5, 3, 15, 61440.0, "ieee", signed=False)


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one 2-D tensor [rows, cols] is quantized along one axis, its reduction axis.

    element:        "e4m3", "e5m2", "e2m1", "e2m3", "e3m2", "int8" or a generic "eXmY"
    scale:          format of the block scale (see the page above)
    block:          what shares a scale: "tensor", "row" (one line along the axis), or (r, c): c numbers along the
                    axis in r neighbouring lines. Ragged ends are padded with zeros
    scale_rule:     e8m0: "rceil" ceil(log2(amax / max)), "floor" floor(log2(amax)) - emax (OCP), "ceil"
                    ceil(log2(amax)) - emax, "even" floor of amax rounded to the element's mantissa. The other
                    scales: "amax", the block's amax maps to the element's max
    two_level:      block scales count in units of one FP32 tensor scale (NVFP4)
    row_amax:       with two_level: one tensor scale for each line instead of one for the tensor
    rounding:       "nearest" (ties to even), "nearest_away", "toward_zero", "stochastic"
    random_bits:    8 (as the hardware) or 32 random bits an element for "stochastic"
    hadamard:       0, or the size 2..128 of the rotation of each group along the axis
    signs:          of the rotation: "none" (all +), "fixed" (NVFP4's vector), "run" (drawn once from the seed),
                    "call" (drawn for each tensor name, GEMM and step)
    four_over_six:  None, or the error that decides whether a block's amax maps to 6 or to 4: "mae", "mse" of the
                    dequantized block, or "mae_fast", "mse_fast" of the block in units of the tensor scale
    four_over_six_max:  largest E4M3 block scale that the tensor scale aims at then (256 leaves room for the 1.5)
    three_quarters: multiply by 3/4 before rounding and by 4/3 after the GEMM, so that stochastic rounding under
                    the "floor" rule never saturates (arXiv 2502.20586)
    amax_history:   0: current scaling; n: delayed scaling from the last n amaxes (see `DelayedScale`);
                    "tensor" blocks only
    """

    element: str
    scale: Scale
    block: Block
    scale_rule: ScaleRule = "amax"
    two_level: bool = False
    row_amax: bool = False
    rounding: Rounding = "nearest"
    random_bits: Literal[8, 32] = 8
    hadamard: int = 0
    signs: Signs = "fixed"
    four_over_six: FourOverSix | None = None
    four_over_six_max: Literal[256, 448] = 256
    three_quarters: bool = False
    amax_history: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.block, list):  # YAML and JSON have no tuples
            object.__setattr__(self, "block", tuple(self.block))
        if found := self.problems():
            raise UsageError(f"cannot quantize to {self.element}: " + "; ".join(found))
        # Found once: a linear looks up what belongs to its specs at each call. Dynamo does not take a cached_property.
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, field.name) for field in fields(self))))

    def __hash__(self) -> int:
        return vars(self)["_hash"]

    def __reduce__(self) -> tuple[Any, ...]:  # made anew: another process hashes strings to other numbers
        return partial(QuantSpec, **{field.name: getattr(self, field.name) for field in fields(self)}), ()

    @property
    def format(self) -> ElementFormat:
        return element_format(self.element)

    @property
    def draws(self) -> bool:
        """Whether the result depends on a random key."""
        return self.rounding == "stochastic" or self.hadamard > 0 and self.signs in ("run", "call")

    @property
    def scale_max(self) -> float:
        """Largest block scale that a two-level tensor scale aims at."""
        if self.four_over_six:
            return float(self.four_over_six_max)
        return UE5M3.max if self.scale == "ue5m3" else 448.0

    @property
    def takes_amax(self) -> bool:
        """Whether one amax of the whole tensor (with row_amax: of each line) decides its scales."""
        return self.two_level or self.block == "tensor" and self.scale != "e8m0"

    @property
    def exact_in_bf16(self) -> bool:
        """Whether element * block scale always fits BF16's 8 significant bits.

        True still leaves values below 2^-126, where BF16 itself loses bits: MX blocks of codes 0..2, whose FP32
        numbers are subnormal; `QuantizedTensor.exact_in` tells for the tensor at hand.
        """
        significant = self.format.mantissa + 1 if self.format.exponent else self.format.mantissa
        if self.scale in ("e4m3", "ue5m3"):
            significant += 4
        # a per-tensor or per-line FP32 scale is applied after the GEMM, a block's cannot be
        inside = self.scale == "fp32" and self.block not in ("tensor", "row")
        return significant <= 8 and self.format.exponent < 8 and not inside

    def problems(self) -> list[str]:
        """What is wrong, in words; empty if nothing is. An unknown element raises UsageError itself."""
        form = self.format
        found = [
            f"{key} is {getattr(self, key)!r}; use one of {', '.join(get_args(choices))}"
            for key, choices in _CHOICES.items()
            if getattr(self, key) not in get_args(choices)
        ]
        found += self._block_problems()
        if (self.scale == "e8m0") != (self.scale_rule != "amax"):
            wanted = "rceil, floor, ceil or even" if self.scale == "e8m0" else "amax"
            found.append(f"scale {self.scale} has no rule {self.scale_rule!r}; use {wanted}")
        if self.scale_rule == "even" and form.exponent == 0:
            found.append("scale_rule even needs a floating-point element; use floor")
        if self.random_bits not in (8, 32):
            found.append(f"random_bits is {self.random_bits}; use 8 or 32")
        if self.hadamard and (not 2 <= self.hadamard <= 128 or self.hadamard & (self.hadamard - 1)):
            found.append(f"hadamard is {self.hadamard}; use 0 or a power of two in 2..128")
        if self.three_quarters and self.scale != "e8m0":
            found.append(f"three_quarters needs scale e8m0, not {self.scale}")
        found += self._two_level_problems()
        if (
            self.amax_history < 0
            or self.amax_history
            and (self.block != "tensor" or self.scale not in ("fp32", "pow2"))
        ):
            found.append(
                f"amax_history is {self.amax_history}; it needs block 'tensor', scale fp32 or pow2, and n >= 0"
            )
        return found

    def _block_problems(self) -> list[str]:
        if self.block in ("tensor", "row"):
            return []
        sides = self.block if isinstance(self.block, tuple) else ()
        if len(sides) == 2 and all(isinstance(n, int) and n >= 1 for n in sides):
            return []
        return [f"block is {self.block!r}; use 'tensor', 'row' or (r, c) with r, c >= 1"]

    def _two_level_problems(self) -> list[str]:
        found = []
        if self.two_level and (self.scale not in ("e4m3", "ue5m3") or isinstance(self.block, str)):
            found.append(f"two_level needs scale e4m3 or ue5m3 and (r, c) blocks, not {self.scale} and {self.block!r}")
        if self.row_amax and (not self.two_level or self.block[0] != 1):
            found.append("row_amax needs two_level and (1, c) blocks")
        if self.four_over_six is None:
            return found
        if self.four_over_six not in get_args(FourOverSix) or self.four_over_six_max not in (256, 448):
            found.append(
                f"four_over_six is {self.four_over_six!r} with maximum {self.four_over_six_max}; "
                f"use one of {', '.join(get_args(FourOverSix))}, with 256 or 448"
            )
        if not self.two_level or self.element != "e2m1" or self.scale != "e4m3" or self.hadamard:
            found.append("four_over_six needs element e2m1, scale e4m3, two_level and no hadamard")
        if not isinstance(self.block, str) and self.block[0] & (self.block[0] - 1):
            found.append(
                f"four_over_six adds errors of lines pairwise; block {self.block} needs a power of two of lines"
            )
        if self.rounding != "nearest":
            found.append(f"four_over_six compares nearest roundings; it cannot go with {self.rounding}")
        return found


def _mx(element: str, rule: ScaleRule) -> QuantSpec:
    return QuantSpec(element=element, scale="e8m0", block=(1, 32), scale_rule=rule)


_NVFP4 = QuantSpec(element="e2m1", scale="e4m3", block=(1, 16), two_level=True)
_BLOCK128 = QuantSpec(element="e4m3", scale="pow2", block=(1, 128))

SPECS: Mapping[str, QuantSpec] = MappingProxyType(
    {
        "mxfp8_e4m3": _mx("e4m3", "rceil"),  # arXiv 2506.08027, Transformer Engine
        "mxfp8_e5m2": _mx("e5m2", "rceil"),
        "mxfp6_e2m3": _mx("e2m3", "floor"),  # OCP MX 1.0
        "mxfp6_e3m2": _mx("e3m2", "floor"),
        "mxfp4": _mx("e2m1", "floor"),
        "mxint8": _mx("int8", "floor"),
        "nvfp4": _NVFP4,  # arXiv 2509.25149, Transformer Engine
        "nvfp4_2d": replace(_NVFP4, block=(16, 16)),
        "fp8_e4m3": QuantSpec(element="e4m3", scale="fp32", block="tensor"),  # Transformer Engine, current scaling
        "fp8_e5m2": QuantSpec(element="e5m2", scale="fp32", block="tensor"),
        "fp8_block_1x128": _BLOCK128,  # DeepSeek-V3, arXiv 2412.19437; Transformer Engine's power-of-two scales
        "fp8_block_128x128": replace(_BLOCK128, block=(128, 128)),
    }
)


def resolve_spec(spec: str | QuantSpec, **options: Any) -> QuantSpec:
    """The named or given spec with `options` replacing its fields.

    Raises UsageError for an unknown name, an unknown option, or a combination that means nothing.
    """
    if isinstance(spec, str):
        if spec not in SPECS:
            raise UsageError(f"quantization {spec!r} is unknown; use one of {', '.join(SPECS)}, or a QuantSpec")
        spec = SPECS[spec]
    if unknown := options.keys() - {field.name for field in fields(QuantSpec)}:
        raise UsageError(
            f"unknown option {', '.join(sorted(unknown))}; use {', '.join(field.name for field in fields(QuantSpec))}"
        )
    for key, value in options.items():
        wanted = _OPTION_TYPES.get(key)
        if wanted and (not isinstance(value, wanted) or isinstance(value, bool) and bool not in wanted):
            raise UsageError(f"option {key} is {value!r}; it must be {' or '.join(kind.__name__ for kind in wanted)}")
    return replace(spec, **options) if options else spec


# The options whose values are not names, which QuantSpec.problems checks against their lists.
_OPTION_TYPES: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "element": (str,),
        "block": (str, tuple, list),
        "two_level": (bool,),
        "row_amax": (bool,),
        "random_bits": (int,),
        "hadamard": (int,),
        "four_over_six_max": (int,),
        "three_quarters": (bool,),
        "amax_history": (int,),
    }
)
