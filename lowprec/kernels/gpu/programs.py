"""The three Triton kernels: the largest magnitude, quantization (decoded or packed) and unpacking.

One program reads its tile once and writes it once. Numbers for the whole tensor (amax, encode scale) are read through
pointers, so that nothing waits for the host. All matrices are contiguous; `shape` is (rows, columns) of the input,
`out` those after rotation, whose last group is padded with zeros. What one function hands another at compile time is
bound to a name of type constexpr first, unless it is a number: Triton 3.6 takes it only so.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowprec.kernels.gpu.elements import code_of, counted, decoded, magnitude, to_bf16, value_of
from lowprec.kernels.gpu.scaling import (
    block_scales,
    encode_scale,
    power_of_code,
    tensor_decode_scale,
    tensor_encode_scale,
)
from lowprec.kernels.gpu.tile import load_tile, noise, offsets, tile_start, within

# compiled once, not anew because such a word happens to be 1 or a multiple of 16; int64, even where 32 bits would do
_WORDS = ("key", "row", "place", "signs", "more_signs")


@triton.jit
def store_amax(found, value, inside):
    """Raise the int32 bits at `found` to the tile's amax: non-negative FP32 numbers order as their bits do."""
    tl.atomic_max(found, tl.max(tl.where(inside, magnitude(value), 0)))


@triton.jit
def spread(per_block, job: tl.constexpr):
    """[block rows, block columns] -> [rows, columns] of the tile."""
    down: tl.constexpr = job.tile_rows // job.block_rows
    across: tl.constexpr = job.tile_cols // job.block_cols
    wide = tl.broadcast_to(per_block[:, None, :, None], [down, job.block_rows, across, job.block_cols])
    return tl.reshape(wide, [job.tile_rows, job.tile_cols])


@triton.jit
def block_amax(value, inside, job: tl.constexpr):
    """Bits of the amax of each block of the tile, -1 where nothing counts."""
    bits = magnitude(value)
    if job.spec.scale == "e8m0" and job.element.nan is not None:
        inside = inside & (value == value)  # NaN numbers stay NaN and do not spoil their block
    down: tl.constexpr = job.tile_rows // job.block_rows
    across: tl.constexpr = job.tile_cols // job.block_cols
    blocks = tl.reshape(tl.where(inside, bits, -1), [down, job.block_rows, across, job.block_cols])
    return tl.max(tl.max(blocks, axis=3), axis=1)


@triton.jit
def tensor_scales(amax, scale, job: tl.constexpr):
    """What belongs to the whole tensor: its encode scale, and the factor that is left to the GEMM."""
    if job.per_tensor:
        if job.spec.amax_history > 0:
            encode = tl.load(scale)
        else:
            encode = encode_scale(tl.load(amax), job)
        return encode, tl.div_rn(1.0, encode)
    else:
        whole = tl.load(amax)
        return tensor_encode_scale(whole, job), tensor_decode_scale(whole, job)


@triton.jit
def store_scales(scales, raw, start, out, job: tl.constexpr):
    """Write the block scales of the tile that starts at (row, column) `start`, transposed for axis 0."""
    high, wide = tl.cdiv(out[0], job.block_rows), tl.cdiv(out[1], job.block_cols)
    down: tl.constexpr = job.tile_rows // job.block_rows
    across: tl.constexpr = job.tile_cols // job.block_cols
    i = start[0] // job.block_rows + tl.arange(0, down)
    j = start[1] // job.block_cols + tl.arange(0, across)
    place = i.to(tl.int64)[:, None] + j.to(tl.int64)[None, :] * high if job.columns else offsets(i, j, wide)
    tl.store(scales + place, raw.to(scales.dtype.element_ty), mask=within(i, j, (high, wide)))


@triton.jit
def store_codes(codes, code, start, out, job: tl.constexpr):
    """Write the codes of the tile that starts at `start`, transposed for axis 0, formats of 4 bits two a byte."""
    line, position = (start[1], start[0]) if job.columns else (start[0], start[1])
    height, width = (out[1], out[0]) if job.columns else (out[0], out[1])
    if job.columns:
        code = tl.trans(code)
    length: tl.constexpr = code.shape[1]
    if job.element.bits == 4:
        # the odd last nibble is 0, whatever a number outside of the matrix came to
        code = tl.where((position + tl.arange(0, length) < width)[None, :], code, 0)
        even, odd = tl.split(tl.reshape(code, [code.shape[0], length // 2, 2]))
        code = even | (odd << 4)
        position, width = position // 2, width - width // 2  # not cdiv, which hides what the width is a multiple of
    lines = line + tl.arange(0, code.shape[0])
    positions = position + tl.arange(0, code.shape[1])
    inside = within(lines, positions, (height, width))
    tl.store(codes + offsets(lines, positions, width), code.to(tl.uint8), mask=inside)


@triton.jit
def wide_words(key, row, place, signs, more_signs):
    """The words as a tuple of int64, which they are already but in the interpreter: it takes types from values."""
    zero = tl.full([], 0, tl.int64)
    return zero + key, zero + row, zero + place, zero + signs, zero + more_signs


@triton.jit(do_not_specialize=_WORDS)
def amax_kernel(  # noqa: PLR0913
    x,
    found,
    shape,
    out,
    key: tl.int64,
    row: tl.int64,
    place: tl.int64,
    signs: tl.int64,
    more_signs: tl.int64,
    job: tl.constexpr,
):
    """found: int32 bits, zero before, of the amax of x after its rotation. The int64 words are those of gpu/tile.py."""
    start = tile_start(out[1], job)
    rows, cols = start[0] + tl.arange(0, job.tile_rows), start[1] + tl.arange(0, job.tile_cols)
    value = load_tile(x, rows, cols, shape, wide_words(key, row, place, signs, more_signs), job)
    store_amax(found, value, within(rows, cols, out))


@triton.jit(do_not_specialize=_WORDS)
def quantize_kernel(  # noqa: PLR0913
    x,
    target,
    scales,
    whole,
    shape,
    out,
    key: tl.int64,
    row: tl.int64,
    place: tl.int64,
    signs: tl.int64,
    more_signs: tl.int64,
    job: tl.constexpr,
):
    """Quantize the tile; scales None: decode it into `target` at once, else write codes there.

    whole:  pointers to FP32 scalars of the tensor: amax (read), encode scale (read, delayed scaling), the factor
            left to the GEMM (written), amax found in passing (written, its int32 bits); None where not used
    """
    form: tl.constexpr = job.element
    rounding: tl.constexpr = job.spec.rounding
    amax, scale, after, found = whole
    words = wide_words(key, row, place, signs, more_signs)
    start = tile_start(out[1], job)
    rows, cols = start[0] + tl.arange(0, job.tile_rows), start[1] + tl.arange(0, job.tile_cols)
    inside = within(rows, cols, out)
    value = load_tile(x, rows, cols, shape, words, job)
    if found is not None:
        store_amax(found, value, inside)
    encode = 1.0
    if job.per_tensor or job.spec.two_level:
        encode, factor = tensor_scales(amax, scale, job)
        if tl.program_id(0) == 0:
            tl.store(after, factor)
    if job.per_tensor:
        scaled = value * encode
    else:
        multiplier, decode, raw = block_scales(block_amax(value, inside, job), encode, job)
        scaled = value * spread(multiplier, job)
    if job.element.nan is None:
        scaled = tl.where(scaled == scaled, scaled, float("inf"))
    if job.spec.three_quarters:
        scaled = scaled * 0.75
    if job.spec.two_level:
        scaled = tl.where(scaled == 0.0, 0.0, scaled)  # -0 becomes +0
    drawn = noise(rows, start[1], words, job) if rounding == "stochastic" else scaled
    count, exponent = counted(scaled, drawn, form, rounding)
    if scales is None:
        result = value_of(count, exponent, scaled, form)
        if not job.per_tensor:
            result = result * spread(decode, job)
        tl.store(target + offsets(rows, cols, out[1]), to_bf16(result) if job.bf16_out else result, mask=inside)
    else:
        store_codes(target, code_of(count, exponent, scaled, form), start, out, job)
        if not job.per_tensor:
            store_scales(scales, raw, start, out, job)


@triton.jit
def unpack_kernel(codes, scales, target, out, job: tl.constexpr):
    """Decode packed codes; `out` is (lines, length) in their own layout, whose blocks lie along the last axis."""
    form: tl.constexpr = job.element
    scale_form: tl.constexpr = job.scale
    start = tile_start(out[1], job)
    rows, cols = start[0] + tl.arange(0, job.tile_rows), start[1] + tl.arange(0, job.tile_cols)
    inside = within(rows, cols, out)
    if job.element.bits == 4:
        both = tl.load(codes + offsets(rows, cols // 2, out[1] - out[1] // 2), mask=inside, other=0).to(tl.int32)
        code = (both >> ((cols % 2) * 4)[None, :]) & 15
    else:
        code = tl.load(codes + offsets(rows, cols, out[1]), mask=inside, other=0).to(tl.int32)
    value = decoded(code, form)
    if not job.per_tensor:
        wide = tl.cdiv(out[1], job.block_cols)
        place = offsets(rows // job.block_rows, cols // job.block_cols, wide)
        raw = tl.load(scales + place, mask=inside, other=0)
        if job.spec.scale == "e8m0":
            value = value * power_of_code(raw.to(tl.int32))
        elif job.spec.scale == "e4m3" or job.spec.scale == "ue5m3":
            value = value * decoded(raw.to(tl.int32), scale_form)
        else:
            value = value * raw
    tl.store(target + offsets(rows, cols, out[1]), to_bf16(value) if job.bf16_out else value, mask=inside)
