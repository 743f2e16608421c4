"""A tile of the matrix on the GPU: loading, rotating (lowprec/hadamard.py) and random bits (lowprec/philox.py).

Tiles hold whole rotation groups and whole runs of 16 columns; what lies outside the matrix is zero.
`words` is a tuple of five int64, unsigned numbers by their bits:

    0     Philox key, k1 in the high half             1  global row of row 0
    2     column / 16 of column 0 in the high half, step in the low one
    3, 4  signs of the rotation: bit j of these 128 is set where number j of a group is multiplied by -1
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowprec.kernels.gpu.elements import from_bf16, to_bf16


@triton.jit
def offsets(lines, positions, width):
    """int64 offsets [lines, positions] into a contiguous matrix of `width` columns."""
    return lines.to(tl.int64)[:, None] * width + positions[None, :]


@triton.jit
def tile_start(out_cols, job: tl.constexpr):
    """Row and column, int32, where this program's tile of a matrix with `out_cols` columns starts."""
    across = tl.cdiv(out_cols, job.tile_cols)
    program = tl.program_id(0)
    return (program // across) * job.tile_rows, (program % across) * job.tile_cols


@triton.jit
def within(rows, cols, shape):
    """Mask [rows, cols] of what lies inside of the matrix."""
    return (rows < shape[0])[:, None] & (cols < shape[1])[None, :]


@triton.jit
def stage(y, distance: tl.constexpr, size: tl.constexpr, columns: tl.constexpr):
    """One stage of the butterfly: numbers `distance` apart become their sum and their difference."""
    rows: tl.constexpr = y.shape[0]
    cols: tl.constexpr = y.shape[1]
    if columns:
        pairs = tl.permute(tl.reshape(y, [rows // (2 * distance), 2, distance, cols]), [0, 2, 3, 1])
        a, b = tl.split(pairs)
        return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 3, 1, 2]), [rows, cols])
    else:
        pairs = tl.permute(tl.reshape(y, [rows, cols // (2 * distance), 2, distance]), [0, 1, 3, 2])
        a, b = tl.split(pairs)
        return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [rows, cols])


@triton.jit
def rotated(x, words, job: tl.constexpr):
    """x with each group along the axis rotated, rounded once to the matrix's dtype, as FP32."""
    size: tl.constexpr = job.spec.hadamard
    length: tl.constexpr = job.tile_rows if job.columns else job.tile_cols
    j = tl.arange(0, length) % size
    negative = (tl.where(j < 64, words[3], words[4]) >> (j % 64)) & 1
    factor = tl.where(negative == 1, -(size**-0.5), size**-0.5)
    y = x * (factor[:, None] if job.columns else factor[None, :])
    for power in tl.static_range(7):
        if (1 << power) < size:
            y = stage(y, 1 << power, size, job.columns)
    return from_bf16(to_bf16(y)) if job.bf16_in else y


@triton.jit
def load_tile(x, rows, cols, shape, words, job: tl.constexpr):
    """The tile as FP32, rotated if the spec says so. shape: (rows, columns) of the matrix."""
    loaded = tl.load(x + offsets(rows, cols, shape[1]), mask=within(rows, cols, shape), other=0)
    value = from_bf16(loaded) if job.bf16_in else loaded
    if job.spec.hadamard > 0:
        value = rotated(value, words, job)
    return value


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 tensors of one shape."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def noise(rows, col, words, job: tl.constexpr):
    """FP32 random byte / 256 of every number of the tile of these rows whose first column is `col`."""
    lines: tl.constexpr = job.tile_rows
    runs: tl.constexpr = job.tile_cols // 16
    zero = tl.zeros([lines, runs], tl.int64)
    line = zero + (words[1] + rows.to(tl.int64))[:, None]
    run = zero + ((words[2] >> 32) + col // 16 + tl.arange(0, runs))[None, :]
    w0, w1, w2, w3 = philox(
        run.to(tl.uint32),
        line.to(tl.uint32),
        (line >> 32).to(tl.uint32),
        (zero + words[2]).to(tl.uint32),
        (zero + words[0]).to(tl.uint32),
        (zero + (words[0] >> 32)).to(tl.uint32),
    )
    # the last two axes of `four` are words 0 .. 3 in order: join counts its second argument by the last axis
    four = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [lines, runs, 4, 1])
    shifts = (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, None, :]
    bytes16 = tl.reshape((four >> shifts) & 255, [lines, job.tile_cols])
    return bytes16.to(tl.float32) * 0.00390625
