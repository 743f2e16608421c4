"""The Triton kernels of the AdamW step (lowprec/adamw.py): SPAN elements a program.

`state` is a tuple of pointers, None where a store (lowprec/codecs.py) has no such thing:

    payload, scale     numbers or codes; of blocks, or of the whole tensor as it was
    next_scale         of the whole tensor, as it will be
    rows, columns      maxima of rank-1 scales, as they were;  next_rows, next_columns: as they will be
    values, limits     codebook and the midpoints between its neighbours, with Inf after them

`span` is (start, at, place, mask, width): the span's first element in the fragment, all of them in the fragment, in the
tensor, whether they exist, and the tensor's columns. BF16 numbers are read and written as their 16 bits: see
gpu/elements.py. What lies past the fragment's end is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowprec.kernels.gpu.elements import code_of, counted, decoded, from_bf16, magnitude, to_bf16, value_of
from lowprec.kernels.gpu.tile import philox

SPAN = tl.constexpr(1024)  # of whole blocks and rows of random bits, of which 256 is the longest
_RAW = ("count", "offset", "key", "row", "step")  # not compiled anew because one is 1 or a multiple of 16


@triton.jit
def bf16(v):
    """FP32 rounded to BF16: after an operation of BF16 numbers, BF16 arithmetic."""
    return from_bf16(to_bf16(v))


@triton.jit
def span_of(program, count, offset, width):
    start = program * SPAN
    at = start + tl.arange(0, SPAN)
    return start, at, at + offset, at < count, width


@triton.jit
def rank1_scale(rows, columns, span):
    _, _, place, mask, width = span
    row = tl.load(rows + place // width, mask=mask, other=0.0)
    return tl.minimum(row, tl.load(columns + place % width, mask=mask, other=0.0))


@triton.jit
def decode(state, span, store: tl.constexpr, plan: tl.constexpr):
    """FP32 values of the span."""
    e4m3: tl.constexpr = plan.e4m3
    _, at, _, mask, _ = span
    payload, scale, _, rows, columns, _, _, values, _ = state
    if store == "fp32":
        value = tl.load(payload + at, mask=mask, other=0.0)
    elif store == "bf16":
        value = from_bf16(tl.load(payload + at, mask=mask, other=0))
    elif store == "fp16_scaled":
        value = tl.load(payload + at, mask=mask, other=0.0).to(tl.float32)
    elif store == "fp8_e4m3" or store == "fp8_e4m3_b256":
        value = decoded(tl.load(payload + at, mask=mask, other=0).to(tl.int32), e4m3)
    elif store == "dynamic8_b256":
        value = tl.load(values + tl.load(payload + at, mask=mask, other=0).to(tl.int32))
    else:
        both = tl.load(payload + at // 2, mask=mask, other=0).to(tl.int32)
        value = tl.load(values + ((both >> ((at % 2) * 4).to(tl.int32)) & 15))
    if store == "fp16_scaled" or store == "fp8_e4m3":
        value = value * tl.load(scale)
    elif store == "linear4_rank1":
        value = value * rank1_scale(rows, columns, span)
    elif store != "fp32" and store != "bf16":
        block: tl.constexpr = 256 if store == "fp8_e4m3_b256" or store == "dynamic8_b256" else 128
        value = value * tl.load(scale + at // block, mask=mask, other=0.0)
    return value


@triton.jit
def block_scales(x, scale, start, count, block: tl.constexpr, fp8: tl.constexpr):
    """Writes the scales of the span's blocks; returns them, one an element."""
    amax = tl.max(tl.reshape(tl.abs(x), [SPAN // block, block]), axis=1)
    if fp8:
        amax = tl.div_rn(tl.maximum(amax, 1e-12), 448.0)
    index = start // block + tl.arange(0, SPAN // block)
    tl.store(scale + index, amax, mask=index * block < count)
    return tl.reshape(tl.broadcast_to(amax[:, None], [SPAN // block, block]), [SPAN])


@triton.jit
def nearest_code(ratio, limits, bits: tl.constexpr):
    """How many limits lie below each number; a number on a limit takes the lower code."""
    code = tl.zeros([SPAN], tl.int32)
    for power in tl.static_range(bits):
        above = tl.load(limits + code + ((1 << (bits - 1 - power)) - 1))
        code = tl.where(ratio > above, code + (1 << (bits - 1 - power)), code)
    return code


@triton.jit
def encode(x, state, span, count, store: tl.constexpr, plan: tl.constexpr):
    """Store FP32 x, rounded to nearest. Returns what is then held, for the stores that a weight can have."""
    half: tl.constexpr = plan.half
    e4m3: tl.constexpr = plan.e4m3
    start, at, _, mask, _ = span
    payload, scale, next_scale, _, _, next_rows, next_columns, _, limits = state
    if store == "fp32":
        tl.store(payload + at, x, mask=mask)
        return x
    elif store == "bf16":
        tl.store(payload + at, to_bf16(x), mask=mask)
        return bf16(x)
    elif store == "fp16_scaled":
        whole = tl.load(next_scale)
        ratio = x * tl.div_rn(1.0, whole)
        number, exponent = counted(ratio, ratio, half, "nearest")
        value = value_of(number, exponent, ratio, half)
        tl.store(payload + at, value.to(tl.float16), mask=mask)
        return value * whole
    elif store == "fp8_e4m3" or store == "fp8_e4m3_b256":
        scales = tl.load(next_scale) if store == "fp8_e4m3" else block_scales(x, scale, start, count, 256, True)
        ratio = x * tl.div_rn(1.0, scales)
        number, exponent = counted(ratio, ratio, e4m3, "nearest")
        tl.store(payload + at, code_of(number, exponent, ratio, e4m3).to(tl.uint8), mask=mask)
        return x
    elif store == "dynamic8_b256":
        scales = block_scales(x, scale, start, count, 256, False)
        code = nearest_code(x * tl.div_rn(1.0, tl.maximum(scales, 2.0**-126)), limits, 8)
        tl.store(payload + at, code.to(tl.uint8), mask=mask)
        return x
    else:
        if store == "linear4_rank1":
            scales = rank1_scale(next_rows, next_columns, span)
        else:
            scales = block_scales(x, scale, start, count, 128, False)
        code = nearest_code(x * tl.div_rn(1.0, tl.maximum(scales, 2.0**-126)), limits, 4)
        even, odd = tl.split(tl.reshape(tl.where(mask, code, 0), [SPAN // 2, 2]))
        pair = start // 2 + tl.arange(0, SPAN // 2)
        tl.store(payload + pair, (even | (odd << 4)).to(tl.uint8), mask=pair * 2 < count)
        return x


@triton.jit
def change_of(m, v, numbers):
    _, _, _, _, minus_step, root_correction, eps, _, _, _, _, _ = numbers
    return tl.div_rn(m * minus_step, tl.sqrt_rn(v) * root_correction + eps)


@triton.jit
def moved(g, m, v, w, numbers):
    """New moments, the new weight before it is rounded, and the intended change."""
    _, one_minus_beta1, beta2, one_minus_beta2, _, _, _, keep, decay, _, _, _ = numbers
    m = m + (g - m) * one_minus_beta1
    v = v * beta2 + g * one_minus_beta2 * g
    change = change_of(m, v, numbers)
    return m, v, w * keep + change, change - w * decay


@triton.jit
def two_sum(a, b):
    total = bf16(a + b)
    b_part = bf16(total - a)
    a_part = bf16(total - b_part)
    return total, bf16(bf16(a - a_part) + bf16(b - b_part))


@triton.jit
def fast_two_sum(a, b):
    total = bf16(a + b)
    return total, bf16(b - bf16(total - a))


@triton.jit
def grow(high, low, value):
    total, error = two_sum(high, value)
    return fast_two_sum(total, bf16(low + error))


@triton.jit
def scaled_pair(high, low, factor_high, factor_low):
    exact = high * factor_high
    product = bf16(exact)
    error = bf16(exact - product)
    return fast_two_sum(product, bf16(bf16(error + bf16(high * factor_low)) + bf16(low * factor_high)))


@triton.jit
def stochastic_bf16(x, start, key, row, step):
    """The 16 bits of FP32 x rounded with 16 random bits, those of lowprec/codecs.py: Extent.uniform, round_bf16."""
    run = start // 8 + tl.arange(0, SPAN // 8)
    line, zero = row + run // 32, run * 0
    w0, w1, w2, w3 = philox(
        (run % 32).to(tl.uint32),
        line.to(tl.uint32),
        (line >> 32).to(tl.uint32),
        (zero + step).to(tl.uint32),
        (zero + key).to(tl.uint32),
        ((zero + key) >> 32).to(tl.uint32),
    )
    # the last two axes of `four` are words 0 .. 3 in order: join counts its second argument by the last axis
    four = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [SPAN // 8, 4, 1])
    noise = tl.reshape((four >> (tl.arange(0, 2) * 16).to(tl.uint32)[None, None, :]) & 0xFFFF, [SPAN]).to(tl.int32)
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum((magnitude(x) + noise) & -0x10000, 0x7F7F0000)
    rounded = ((size | (bits & -0x80000000)) >> 16).to(tl.int16)
    return tl.where(magnitude(x) < 0x7F800000, rounded, to_bf16(x))


@triton.jit
def collage_moments(g, m, v, squares_low, span, numbers, plan: tl.constexpr):
    _, at, _, mask, _ = span
    _, one_minus_beta1, beta2, one_minus_beta2, _, _, _, _, _, beta1, beta2_high, beta2_low = numbers
    m = bf16(bf16(m * beta1) + bf16(g * one_minus_beta1))
    added = bf16(bf16(g * g) * one_minus_beta2)
    if plan.rule == "collage_plus":
        low = from_bf16(tl.load(squares_low + at, mask=mask, other=0))
        high, low = scaled_pair(v, low, beta2_high, beta2_low)
        v, low = grow(high, low, added)
        tl.store(squares_low + at, to_bf16(low), mask=mask)
    else:
        v = bf16(bf16(v * beta2) + added)
    return m, v


@triton.jit
def load_all(grad, m_state, v_state, w_state, span, grad_scale, plan: tl.constexpr):
    """Gradient, moments and weight before the step, FP32."""
    exp_avg: tl.constexpr = plan.exp_avg
    exp_avg_sq: tl.constexpr = plan.exp_avg_sq
    weight: tl.constexpr = plan.weight
    _, at, _, mask, _ = span
    g = tl.load(grad + at, mask=mask, other=0)
    g = (from_bf16(g) if plan.bf16_grad else g) * grad_scale
    m = decode(m_state, span, exp_avg, plan)
    v = decode(v_state, span, exp_avg_sq, plan)
    return g, m, v, decode(w_state, span, weight, plan)


@triton.jit(do_not_specialize=_RAW)
def adamw_kernel(  # noqa: PLR0913
    grad,
    m_state,
    v_state,
    w_state,
    low,
    squares_low,
    tally,
    width,
    numbers,
    count: tl.int64,
    offset: tl.int64,
    key: tl.int64,
    row: tl.int64,
    step: tl.int64,
    plan: tl.constexpr,
):
    """One step, in place. low: Kahan's compensation, Collage's low part; tally: float64 [programs, 3], or None."""
    exp_avg: tl.constexpr = plan.exp_avg
    exp_avg_sq: tl.constexpr = plan.exp_avg_sq
    weight: tl.constexpr = plan.weight
    zero = tl.full([], 0, tl.int64)  # the interpreter takes an integer's type from its value
    span = span_of(zero + tl.program_id(0), count, offset, width)
    at, mask = span[1], span[3]
    g, m, v, w = load_all(grad, m_state, v_state, w_state, span, numbers[0], plan)
    before, low_after = w, w
    if plan.rule == "collage_light" or plan.rule == "collage_plus":
        m, v = collage_moments(g, m, v, squares_low, span, numbers, plan)
        wanted = change_of(m, v, numbers) - w * numbers[8]
        next_w = w
    else:
        m, v, next_w, wanted = moved(g, m, v, w, numbers)
    if plan.rule == "nearest":
        after = encode(next_w, w_state, span, count, weight, plan)
    elif plan.rule == "stochastic":
        written = stochastic_bf16(next_w, span[0], zero + key, zero + row, zero + step)
        tl.store(w_state[0] + at, written, mask=mask)
        after = from_bf16(written)
    else:
        old = from_bf16(tl.load(low + at, mask=mask, other=0))
        if plan.rule == "kahan":
            intended = bf16(bf16(wanted) - old)
            after = bf16(w + intended)
            low_after = bf16(bf16(after - w) - intended)
        else:
            after, low_after = grow(w, old, bf16(wanted))
        tl.store(low + at, to_bf16(low_after), mask=mask)
        tl.store(w_state[0] + at, to_bf16(after), mask=mask)
    encode(m, m_state, span, count, exp_avg, plan)
    encode(v, v_state, span, count, exp_avg_sq, plan)
    if tally is not None:
        applied = after.to(tl.float64) - before.to(tl.float64)
        if plan.rule == "kahan":
            applied -= low_after.to(tl.float64) - old.to(tl.float64)
        elif plan.rule == "collage_light" or plan.rule == "collage_plus":
            applied += low_after.to(tl.float64) - old.to(tl.float64)
        intent = tl.where(mask, wanted, 0.0).to(tl.float64)
        sums = tally + 3 * tl.program_id(0)
        tl.store(sums, tl.sum(intent * tl.where(mask, applied, 0.0)))
        tl.store(sums + 1, tl.sum(intent * intent))
        tl.store(sums + 2, tl.sum(((applied == 0.0) & (intent != 0.0)).to(tl.float64)))


@triton.jit
def raise_maxima(x, found, span, count, offset, height, store: tl.constexpr):
    """Raise the int32 bits at `found` to the magnitudes of x: non-negative FP32 numbers order as their bits do."""
    start, _, place, mask, width = span
    bits = tl.where(mask, magnitude(x), 0)
    if store == "fp16_scaled" or store == "fp8_e4m3":
        tl.atomic_max(found, tl.max(bits))
    elif store == "linear4_rank1":
        rows = place // width
        last = tl.minimum(start + SPAN, count) - 1 + offset
        for row in range((start + offset) // width, last // width + 1):
            tl.atomic_max(found + row, tl.max(tl.where(rows == row, bits, 0)))
        tl.atomic_max(found + height + place % width, bits, mask=mask)


@triton.jit(do_not_specialize=_RAW)
def maxima_kernel(  # noqa: PLR0913
    grad,
    m_state,
    v_state,
    w_state,
    founds,
    width,
    height,
    numbers,
    count: tl.int64,
    offset: tl.int64,
    plan: tl.constexpr,
):
    """The first stage: the same numbers, of which only maxima are kept; founds: of the three states, zero before."""
    exp_avg: tl.constexpr = plan.exp_avg
    exp_avg_sq: tl.constexpr = plan.exp_avg_sq
    weight: tl.constexpr = plan.weight
    zero = tl.full([], 0, tl.int64)
    span = span_of(zero + tl.program_id(0), count, offset, width)
    g, m, v, w = load_all(grad, m_state, v_state, w_state, span, numbers[0], plan)
    m, v, next_w, _ = moved(g, m, v, w, numbers)
    raise_maxima(m, founds[0], span, count, offset, height, exp_avg)
    raise_maxima(v, founds[1], span, count, offset, height, exp_avg_sq)
    raise_maxima(next_w, founds[2], span, count, offset, height, weight)
