"""Block scales on the GPU: from the bits of a block's amax to (multiplier, decode scale, scale as stored).

The formulas, and where their exceptions come from, stand in lowprec/scales.py. Divisions are correctly rounded
(div_rn), powers of two are put together from their bits, and NaN is kept by comparisons that it fails.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowprec.kernels.gpu.elements import FLT_MAX, capped, code_of, counted, value_of


@triton.jit
def round_up(t):
    """Biased exponent of the smallest power of two >= t >= 0; see `scales._round_up`."""
    bits = t.to(tl.int32, bitcast=True)
    field = bits >> 23
    fraction = bits & 0x7FFFFF
    return field + tl.where(fraction > tl.where(field == 0, 0x400000, 0), 1, 0)


@triton.jit
def power_of_code(code):
    """2^(code - 127), int32 codes 0 .. 254; NaN for 255."""
    bits = tl.where(code == 0, 0x00400000, code << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_scales(amax, job: tl.constexpr):
    """Multiplier, decode scale and code of E8M0, from FP32 amax."""
    form: tl.constexpr = job.element
    bits = amax.to(tl.int32, bitcast=True)
    if job.spec.scale_rule == "rceil":
        code = round_up(amax * (1.0 / form.max))
    elif job.spec.scale_rule == "ceil":
        code = round_up(amax) - form.emax
    elif job.spec.scale_rule == "even":
        code = ((bits + (1 << (22 - form.mantissa))) >> 23) - form.emax
    else:
        code = (bits >> 23) - form.emax
    code = tl.minimum(tl.maximum(code, 0), 254)
    if form.nan is None:
        code = tl.where(bits >= 0x7F800000, 255, code)
    else:
        code = tl.where(bits == 0x7F800000, 254, code)
        code = tl.where(amax == amax, code, 255)
    inverse = power_of_code(tl.where(code == 255, 255, 254 - code))
    return inverse, power_of_code(code), code


@triton.jit
def floor_power(scale):
    """Largest power of two <= scale, subnormal ones included; 0, Inf and NaN stay."""
    small = scale < 5.421010862427522e-20  # 2^-64
    lifted = tl.where(small, scale * 18446744073709551616.0, scale)
    bits = lifted.to(tl.int32, bitcast=True) & 0x7F800000
    found = bits.to(tl.float32, bitcast=True)
    found = tl.where(scale == scale, found, scale)
    return tl.where(small, found * 5.421010862427522e-20, found)


@triton.jit
def encode_scale(amax, job: tl.constexpr):
    """max / amax of FP32 and power-of-two scales, with its exceptions."""
    scale = tl.div_rn(job.element.max, amax)
    scale = tl.where(scale == float("inf"), job.fp32_max, scale)
    if job.spec.scale == "pow2":
        scale = floor_power(scale)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def tensor_encode_scale(amax, job: tl.constexpr):
    """S of two-level scaling from the tensor's amax."""
    aim: tl.constexpr = job.spec.scale_max * job.element.max
    encode = capped(tl.div_rn(aim, amax), FLT_MAX)
    return tl.where(encode == 0.0, 1.0, encode)


@triton.jit
def tensor_decode_scale(amax, job: tl.constexpr):
    """What two-level scaling leaves to the GEMM's epilogue."""
    aim: tl.constexpr = job.spec.scale_max * job.element.max
    return tl.div_rn(amax, aim)


@triton.jit
def small_float_scales(amax, encode, job: tl.constexpr):
    """Multiplier, decode scale and code of E4M3 and UE5M3; `encode` is S of two levels."""
    form: tl.constexpr = job.scale
    if job.spec.two_level:
        wanted = capped(amax * (encode * (1.0 / job.element.max)), FLT_MAX)
    else:
        wanted = tl.div_rn(amax, job.element.max)
    count, exponent = counted(wanted, wanted, form, "nearest")
    scale = value_of(count, exponent, wanted, form)
    if job.spec.two_level:
        multiplier = capped(tl.div_rn(1.0, scale * tl.div_rn(1.0, encode)), FLT_MAX)
    else:
        wanted = tl.where(scale == 0.0, 1.0, scale)
        scale = wanted
        count, exponent = counted(wanted, wanted, form, "nearest")
        multiplier = tl.div_rn(1.0, scale)
    return multiplier, scale, code_of(count, exponent, wanted, form)


@triton.jit
def block_scales(bits, encode, job: tl.constexpr):
    """Multiplier, decode scale (FP32) and stored scale (int32 code, or FP32) of blocks.

    bits:    of each block's amax; -1 for a block of which nothing counts: it holds NaN and padding alone
    encode:  FP32 scalar, S of two levels
    """
    amax = tl.where(bits < 0, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    if job.spec.scale == "e8m0":
        return e8m0_scales(amax, job)
    elif job.spec.scale == "fp32" or job.spec.scale == "pow2":
        multiplier = encode_scale(amax, job)
        scale = tl.div_rn(1.0, multiplier)
        return multiplier, scale, scale
    else:
        return small_float_scales(amax, encode, job)
