"""Elements on the GPU: FP32 numbers to counts of steps, to codes, to values; lowprec/codec.py has the formulas.

A number is held as (count, exponent): |v| is count steps of 2^(exponent - mantissa), count a whole FP32 number up to
2^(mantissa + 1). Then value = count * step, and the code without its sign is

    (exponent - emin) * 2^mantissa + count,

for subnormals (exponent = emin, count < 2^mantissa) and for a count rounded up to the next power of two alike.

BF16 is read and written as its 16 bits, rounded here in integers: Triton's interpreter truncates in its own casts, and
what a GPU runs must be what the interpreter has tested.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The largest FP32 number; a float64 that FP32 holds.
FLT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def to_bf16(v):
    """FP32 -> the 16 bits of the nearest BF16, ties to even; every NaN becomes 0x7FC0."""
    bits = v.to(tl.uint32, bitcast=True)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return tl.where(v == v, rounded, 0x7FC0).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def from_bf16(bits):
    """16 bits of BF16 -> FP32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def magnitude(v):
    """The bits of |v|, int32: they order as the magnitudes do, NaN above Inf."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def with_sign(magnitudes, v):
    """`magnitudes` with the signs of v."""
    sign = v.to(tl.int32, bitcast=True) & -0x80000000
    return (magnitudes.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def capped(v, largest: tl.constexpr):
    """min(v, largest), keeping NaN."""
    return tl.where(v > largest, largest, v)


@triton.jit
def power(exponent):
    """2^exponent for int32 -126 .. 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def counted(v, noise, form: tl.constexpr, rounding: tl.constexpr):
    """(count, exponent) of FP32 v, saturated at the format's max; the count of NaN is NaN.

    noise:  for "stochastic", FP32 0 .. 255 / 256
    """
    v = tl.where(v > form.max, form.max, tl.where(v < -form.max, -form.max, v))
    bits = magnitude(v)
    exponent = tl.maximum((bits >> 23) - 127, form.emin)
    # a product by a power of two, exact: count is at least |v| where |v| is below the normal numbers
    count = bits.to(tl.float32, bitcast=True) * power(tl.where(v == v, form.mantissa - exponent, 0))
    if rounding == "nearest":
        count = (count + 8388608.0) - 8388608.0  # 2^23: the processor rounds to a whole number, ties to even
    elif rounding == "nearest_away":
        whole = tl.floor(count)
        count = tl.where(count - whole >= 0.5, whole + 1.0, whole)
    elif rounding == "toward_zero":
        count = tl.floor(count)
    else:
        count = tl.floor(count + noise)  # floor may flush subnormal numbers, which have the same floor
    return count, exponent


@triton.jit
def value_of(count, exponent, v, form: tl.constexpr):
    """FP32 value of a count with the sign of v; int8 has no -0."""
    step = power(tl.where(v == v, exponent - form.mantissa, 0))
    value = with_sign(count * step, v)
    if form.twos_complement:
        value = tl.where(value == 0.0, 0.0, value)
    return value


@triton.jit
def code_of(count, exponent, v, form: tl.constexpr):
    """Code, int32, of a count with the sign of v. NaN is the largest code without a sign: NaN, or max."""
    is_number = v == v
    code = ((exponent - form.emin) << form.mantissa) + tl.where(is_number, count, 0.0).to(tl.int32)
    negative = v.to(tl.int32, bitcast=True) < 0
    if form.twos_complement:
        code = tl.where(negative, -code, code) & 255
    elif form.signed:
        code = code | tl.where(negative, 1 << (form.bits - 1), 0)
    return tl.where(is_number, code, (1 << (form.exponent + form.mantissa)) - 1)


@triton.jit
def decoded(code, form: tl.constexpr):
    """FP32 value of int32 codes."""
    smallest: tl.constexpr = 2.0 ** (form.emin - form.mantissa)
    if form.twos_complement:
        return (((code & 255) << 24) >> 24).to(tl.float32) * smallest
    size = code & ((1 << (form.exponent + form.mantissa)) - 1)
    field = size >> form.mantissa
    fraction = size & ((1 << form.mantissa) - 1)
    normal = ((field + (127 - form.bias)) << 23) | (fraction << (23 - form.mantissa))
    value = tl.where(field > 0, normal.to(tl.float32, bitcast=True), fraction.to(tl.float32) * smallest)
    top: tl.constexpr = (1 << form.exponent) - 1
    if form.special == "ieee":
        value = tl.where(field == top, tl.where(fraction == 0, float("inf"), float("nan")), value)
    elif form.special == "nan":
        value = tl.where(size == (1 << (form.exponent + form.mantissa)) - 1, float("nan"), value)
    if form.signed:  # by its bit: Triton 3.6 takes -v for 0 - v, which is +0 of +0
        negative = ((code >> (form.bits - 1)) & 1) << 31
        value = (value.to(tl.int32, bitcast=True) | negative).to(tl.float32, bitcast=True)
    return value
