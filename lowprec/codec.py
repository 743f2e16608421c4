"""Elements: rounding FP32 numbers to a format's grid, grid values to codes, codes to values.

With e = max(floor(log2 |v|), emin) taken from the exponent bits, step = 2^(e - mantissa) and n = |v| / step (exact):

    nearest        round(n), ties to even n
    nearest_away   round(n), ties away from zero
    toward_zero    floor(n)
    stochastic     floor(n + u / 2^bits), in FP32 for 8 random bits and in FP64 for 32; at 8 bits the chance to round up
                   is floor(256 frac(n)) / 256, as on Blackwell (cvt.rs) and in Transformer Engine's software path

and value = sign * n * step; |v| is clamped to the format's max before, so that nothing overflows and Inf saturates.
Times 2^(bias - 127) such a value has its code in the top bits of FP32. The code of NaN is +NaN, or +max in formats
without one (as cvt.satfinite does).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowprec.formats import ElementFormat, Rounding

# mantissa bits, exponent bias and integer type of what rounding computes in
_LAYOUT = {torch.float32: (23, 127, torch.int32), torch.float64: (52, 1023, torch.int64)}


def _working(values: Tensor, form: ElementFormat) -> Tensor:
    """FP32, or FP64 where the steps of a format with 8 exponent bits leave FP32's normal range."""
    return values.double() if form.exponent == 8 else values


def _exponents(values: Tensor, form: ElementFormat) -> Tensor:
    """max(floor(log2 |v|), emin) in the place of the exponent field, the other bits zero; a new tensor."""
    mantissa, bias, integer = _LAYOUT[values.dtype]
    field = ((1 << values.element_size() * 8 - 1 - mantissa) - 1) << mantissa
    return (values.view(integer) & field).clamp_(min=(form.emin + bias) << mantissa)


def _per_step(exponents: Tensor, form: ElementFormat, dtype: torch.dtype) -> Tensor:
    """1 / step, exact."""
    mantissa, bias, _ = _LAYOUT[dtype]
    return (((2 * bias + form.mantissa) << mantissa) - exponents).view(dtype)


def round_to(values: Tensor, form: ElementFormat, rounding: Rounding, random: Tensor | None = None) -> Tensor:
    """FP32 `values` rounded to numbers of `form`, FP32, same shape; keeps NaN and, but for int8, the sign of zero.

    random: for "stochastic", uint8 (8 bits) or int64 (32 bits) of the same shape.
    """
    assert values.dtype == torch.float32, values.dtype
    work = _working(values, form).clamp(-form.max, form.max)
    if form.twos_complement:
        return _round_magnitude(work, form, rounding, random).add_(0.0)  # it has no -0
    return _round_magnitude(work, form, rounding, random)


def _round_magnitude(work: Tensor, form: ElementFormat, rounding: Rounding, random: Tensor | None) -> Tensor:
    """Round clamped numbers and give them their signs back, FP32."""
    mantissa, _, _ = _LAYOUT[work.dtype]
    exponents = _exponents(work, form)
    if rounding == "nearest":
        # 1.5 * 2^mantissa steps: adding and subtracting them lets the processor round to a whole step, ties to even
        exponents += ((mantissa - form.mantissa) << mantissa) + (1 << (mantissa - 1))
        shifter = exponents.view(work.dtype)
        return (work + shifter).sub_(shifter).copysign_(work).float()
    count = work.abs().mul_(_per_step(exponents, form, work.dtype))
    if rounding == "toward_zero":
        count.floor_()
    elif rounding == "nearest_away":
        whole = count.floor()
        count = whole.add_((count - whole) >= 0.5)  # floor(n + 1/2) could round the sum itself
    else:
        assert random is not None and random.shape == work.shape
        if random.dtype == torch.uint8:
            count.add_(random, alpha=2.0**-8).floor_()
        else:
            count = count.double().add_(random, alpha=2.0**-32).floor_().to(work.dtype)
    step = exponents.sub_(form.mantissa << mantissa).view(work.dtype)
    return count.mul_(step).copysign_(work).float()


def encode(values: Tensor, form: ElementFormat) -> Tensor:
    """Codes of FP32 numbers that are already on the grid of `form`: uint8, or int32 above 8 bits; same shape."""
    # times 2^(bias - 127) the exponent fields agree, and the format's subnormals are FP32's
    bits = (values * 2.0 ** (form.bias - 127)).view(torch.int32)
    largest = (1 << (form.exponent + form.mantissa)) - 1  # NaN, or max where there is none; what NaN is cut to
    code = (bits & 0x7FFFFFFF).bitwise_right_shift_(23 - form.mantissa).clamp_(max=largest)
    if form.exponent == 8:
        code.masked_fill_(values.isnan(), largest)  # FP32's own exponents: a cut NaN could become Inf
    negative = bits <= -0x800000  # down from -Inf: a NaN has no sign
    if form.twos_complement:
        code = torch.where(negative, -code, code).bitwise_and_(255)
    elif form.signed:
        code.add_(negative, alpha=1 << (form.bits - 1))
    return code.to(torch.uint8) if form.bits <= 8 else code


@cache
def decode_table(form: ElementFormat) -> Tensor:
    """Value of each of the 2^bits codes, FP32. Do not write to it."""
    code = torch.arange(1 << form.bits, dtype=torch.int64)
    if form.twos_complement:
        return torch.where(code < 128, code, code - 256).float() * 2.0 ** (form.emin - form.mantissa)
    fraction = code & ((1 << form.mantissa) - 1)
    field = (code >> form.mantissa) & ((1 << form.exponent) - 1)
    power = ((field - form.bias - form.mantissa + 1023) << 52).view(torch.float64)
    normal = (fraction + (1 << form.mantissa)) * power
    value = torch.where(field > 0, normal, fraction.double() * 2.0 ** (form.emin - form.mantissa))
    top = (1 << form.exponent) - 1
    if form.special == "ieee":
        value = torch.where(field == top, torch.where(fraction == 0, torch.inf, torch.nan), value)
    elif form.special == "nan":
        value = torch.where((field == top) & (fraction == (1 << form.mantissa) - 1), torch.nan, value)
    if form.signed:
        value = torch.where(code >> (form.bits - 1) == 1, -value, value)
    return value.float()


def decode(codes: Tensor, form: ElementFormat) -> Tensor:
    """FP32 values of `codes` (any integer dtype), same shape."""
    return decode_table(form).to(codes.device)[codes.to(torch.int32)]


def pack4(codes: Tensor) -> Tensor:
    """[rows, cols] of 4-bit codes -> [rows, ceil(cols / 2)] bytes, the even column in the low nibble."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack4(packed: Tensor, cols: int) -> Tensor:
    """The inverse of `pack4`; cols is the unpacked width."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :cols]
