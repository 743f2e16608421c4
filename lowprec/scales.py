"""Block scales: from the largest magnitude of a block to its scale, and the number that elements are multiplied by.

E8M0, from amax a and the element's max and emax; field(t) and m(t) are the exponent and mantissa bits of FP32 t:

    up(t)   field(t) + 1 if t is above 2^(field - 127), else field(t)                (the biased ceil(log2 t))
    rceil   up(a * fp32(1 / max))                                                    arXiv 2506.08027
    floor   field(a) - emax                                                          OCP MX 1.0, 6.3
    ceil    up(a) - emax
    even    field(a rounded to the element's mantissa bits, half up) - emax          torchao
    element = round(x * 2^(127 - code)), value = element * 2^(code - 127); a zero block has code 0

All codes are clamped to 0 .. 254; the multiplier of code 0 is 2^127 (Transformer Engine, newest torchao; torchao 0.18
uses 2^126, or 1 under rceil, for blocks below 2^-126). Blocks that hold Inf or NaN, where the sources part:

    element with NaN (E4M3, E5M2): NaN numbers are ignored by amax and stay NaN; all NaN gives 255; Inf gives 254 and
        saturates, 448 * 2^127 = Inf again (Transformer Engine; torchao gives 255 for both)
    element without (FP6, FP4, INT8): code 255, the whole block is NaN (torchao; microxcaling keeps Inf as it is)

FP32 and power-of-two scales (per tensor, row or block; Transformer Engine's Python references): encode scale
max / a, one FP32 division; Inf becomes the largest number of the input's dtype; pow2 rounds it down to a power of two;
a = 0 gives 1; a = Inf gives 0 and a = NaN gives NaN, so that the whole block decodes to NaN (Transformer Engine's C++
takes 1 instead, which hides the Inf). Decode scale 1 / encode scale.

NVFP4 (Transformer Engine's reference), tensor amax A, block amax a, E = 448 (four_over_six_max with 4-over-6):

    S = min(6 E / A, FLT_MAX), 1 if A = 0 or Inf      s = e4m3(min(a * (S * fp32(1/6)), 448))
    element = round(x * min(1 / (s * (1 / S)), FLT_MAX)), value = element * s * (A / (6 E))

so that a block scale that underflows to 0 multiplies by FLT_MAX (the C++ test reference uses 0: other codes, same
values). With 4-over-6, s = e4m3(min((a / 6) * S, 448)) and e4m3(min((a / 6) * S * 1.5, 448)) are tried.
One-level E4M3 and UE5M3 scales: s = a / max rounded, 0 replaced by 1 (arXiv 2609.02846), element = round(x * (1 / s)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.codec import round_to
from lowprec.formats import UE5M3, ElementFormat, QuantSpec, ScaleRule, element_format

FLT_MAX = torch.finfo(torch.float32).max


def divide(numerator: Tensor | float, denominator: Tensor | float) -> Tensor:
    """Correctly rounded FP32 quotient; torch's own number / tensor multiplies by a rounded reciprocal."""
    like = numerator if isinstance(numerator, Tensor) else denominator
    assert isinstance(like, Tensor)
    parts = [n if isinstance(n, Tensor) else torch.full((), n, device=like.device) for n in (numerator, denominator)]
    return torch.div(*parts)


def _round_up(t: Tensor) -> Tensor:
    """Biased exponent, int32, of the smallest power of two >= t >= 0, down to 2^-127; 255 above 2^127."""
    bits = t.view(torch.int32)
    field, fraction = bits >> 23, bits & 0x7FFFFF
    # code 0 means 2^-127, itself an FP32 subnormal of fraction 0x400000
    up = torch.where(field == 0, fraction > 0x400000, fraction > 0)
    return field + up


def e8m0_codes(amax: Tensor, form: ElementFormat, rule: ScaleRule) -> Tensor:
    """E8M0 codes, int32, of FP32 block maxima."""
    if rule == "rceil":
        code = _round_up(amax * (1.0 / form.max))
    elif rule == "ceil":
        code = _round_up(amax) - form.emax
    else:
        bits = amax.view(torch.int32)
        if rule == "even":
            bits = bits + (1 << (22 - form.mantissa))
        code = (bits >> 23) - form.emax
    code = code.clamp_(0, 254)
    if form.nan is None:
        return torch.where(amax.isfinite(), code, 255)
    code = torch.where(amax.isinf(), 254, code)
    return torch.where(amax.isnan(), 255, code)


def power_of_code(code: Tensor) -> Tensor:
    """2^(code - 127) of int32 codes 0 .. 254, NaN for 255; FP32, never flushed to zero."""
    bits = torch.where(code == 0, 0x00400000, code << 23)
    return torch.where(code == 255, 0x7FC00000, bits).view(torch.float32)


def inverse_power_of_code(code: Tensor) -> Tensor:
    """2^(127 - code), what elements are multiplied by."""
    return power_of_code(torch.where(code == 255, 255, 254 - code))


def floor_power(scale: Tensor) -> Tensor:
    """Largest power of two <= each FP32 number > 0, subnormal ones included; 0, Inf and NaN stay."""
    small = scale < 2.0**-64
    lifted = torch.where(small, scale * 2.0**64, scale)
    power = (lifted.view(torch.int32) & 0x7F800000).view(torch.float32)
    power = torch.where(scale.isnan(), scale, power)
    return torch.where(small, power * 2.0**-64, power)


def amax_scale(amax: Tensor, largest: float, dtype: torch.dtype, *, pow2: bool) -> Tensor:
    """Encode scale largest / amax, FP32, with the exceptions of the page above; dtype is the input's."""
    scale = divide(largest, amax)
    scale = torch.where(scale.isinf(), torch.finfo(dtype).max, scale)
    if pow2:
        scale = floor_power(scale)
    return torch.where(amax == 0, 1.0, scale)


def small_float_scale(amax: Tensor, form: ElementFormat, kind: ElementFormat) -> Tensor:
    """One-level decode scale amax / max rounded to `kind` (e4m3 or ue5m3); 0 becomes 1."""
    scale = round_to(divide(amax, form.max), kind, "nearest")
    return torch.where(scale == 0, 1.0, scale)


def scale_format(spec: QuantSpec) -> ElementFormat:
    """Format of 8-bit floating-point scales."""
    return UE5M3 if spec.scale == "ue5m3" else element_format("e4m3")


def tensor_encode_scale(amax: Tensor, spec: QuantSpec) -> Tensor:
    """S of two-level scaling, from the tensor's (or the lines') amax; FP32, same shape."""
    encode = divide(spec.scale_max * spec.format.max, amax).clamp(max=FLT_MAX)
    return torch.where(encode == 0, 1.0, encode)


def tensor_decode_scale(amax: Tensor, spec: QuantSpec) -> Tensor:
    """A / (E max) of two-level scaling: FP32, the factor that is left to the GEMM's epilogue."""
    return divide(amax, spec.scale_max * spec.format.max)


def two_level_scales(amax: Tensor, encode: Tensor, spec: QuantSpec) -> Tensor:
    """Block scales in units of the tensor scale, rounded; FP32."""
    reciprocal = torch.tensor(1.0 / spec.format.max, dtype=torch.float32, device=amax.device)
    return round_to((amax * (encode * reciprocal)).clamp(max=FLT_MAX), scale_format(spec), "nearest")


def two_level_multiplier(scales: Tensor, encode: Tensor) -> Tensor:
    """What elements are multiplied by, FLT_MAX for a zero scale."""
    return divide(1.0, scales * divide(1.0, encode)).clamp(max=FLT_MAX)
