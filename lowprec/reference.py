"""Quantization in plain torch FP32 operations: the truth that every fused kernel must equal, bit for bit.

    x -> rotate (hadamard.py) -> amax of each block -> scales (scales.py) -> x * multiplier, one FP32 product
      -> round to the element's grid (codec.py), random bits from philox.py -> values or codes

A block is a rectangle of the matrix in its own orientation ((r, c) for axis -1, its transpose for axis 0), so nothing
is transposed on the way; ragged matrices are padded with zeros up to whole blocks and cut again. It is also the path of
machines without a compiler: there are no loops over elements or blocks, only over large parts of a tensor.

The sign of zero. With two_level (NVFP4) x * multiplier = -0 gives code 0, as Transformer Engine's reference does, while
a negative number that rounds to zero gives code 8; all other formats but int8 keep the sign of every zero, as torch's
and torchao's casts do (Transformer Engine's unused MXFP4 path drops it there, too).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errors import UsageError
from lowprec import scales
from lowprec.codec import encode, round_to
from lowprec.formats import QuantSpec, resolve_spec
from lowprec.hadamard import rotate, sign_vector
from lowprec.philox import RandomKey, random_bits
from lowprec.quantized import (
    Axis,
    Operand,
    QuantizedTensor,
    block_of,
    check_operand_dtype,
    in_epilogue,
    pack,
    post_scale,
)


class Inputs(NamedTuple):
    """What quantization takes beside the matrix and its spec.

    key:    of the random bits and signs, or None
    amax:   FP32 amax to use instead of the tensor's own (already reduced over ranks), or None
    encode_scale:  FP32 encode scale of delayed scaling, or None
    """

    key: RandomKey | None = None
    amax: Tensor | None = None
    encode_scale: Tensor | None = None


_PART = 1 << 18  # elements
Finish = Callable[[Tensor, Tensor], Tensor]  # (elements on their grid in blocks, scales) -> what is wanted of them


class _Rounded(NamedTuple):
    """What became of the elements, blocked and padded, and what belongs to them."""

    blocks: Tensor  # [row blocks, r, column blocks, c]
    raw: Tensor  # stored scales [row blocks, column blocks]
    decode: Tensor  # their FP32 values
    amax: Tensor | None
    shape: tuple[int, int]  # of the matrix after rotation


def _to_blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[rows, cols] -> [row blocks, r, column blocks, c], padded with zeros."""
    (rows, cols), (r, c) = x.shape, block
    if rows % r or cols % c:
        x = torch.nn.functional.pad(x, (0, -cols % c, 0, -rows % r))
    return x.reshape(-(-rows // r), r, -(-cols // c), c)


def _from_blocks(blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    rows, cols = blocks.shape[0] * blocks.shape[1], blocks.shape[2] * blocks.shape[3]
    return blocks.reshape(rows, cols)[: shape[0], : shape[1]]


def _largest(blocks: Tensor) -> Tensor:
    """Largest number of each block, [row blocks, column blocks]; axes of length 1 cost nothing."""
    lines = blocks.amax(dim=3) if blocks.shape[3] > 1 else blocks.squeeze(3)
    return lines.amax(dim=1) if lines.shape[1] > 1 else lines.squeeze(1)


def _block_amax(x: Tensor, block: tuple[int, int], *, ignore_nan: bool) -> Tensor:
    """FP32 largest magnitude [row blocks, column blocks]; NaN if the block holds one (ignore_nan: nothing else)."""
    # without their signs, numbers order as their bits do, NaN above Inf, and integers compare faster than BF16
    bits = x.view(torch.int16) & 0x7FFF if x.element_size() == 2 else x.view(torch.int32) & 0x7FFFFFFF
    amax = _largest(_to_blocks(bits, block)).view(x.dtype).float()
    if ignore_nan and bool(amax.isnan().any()):
        # ranks one higher than the numbers, so that a block of NaN and padding alone stays 0
        ranks = _largest(_to_blocks(torch.where(x.isnan(), 0, bits.to(torch.int64) + 1), block))
        amax = torch.where(ranks == 0, torch.nan, (ranks - 1).to(bits.dtype).view(x.dtype).float())
    return amax


def _spread(block_values: Tensor) -> Tensor:
    """[row blocks, column blocks] -> broadcastable to blocks."""
    return block_values[:, None, :, None]


def _tensor_amax(amax: Tensor, spec: QuantSpec, axis: Axis, given: Tensor | None) -> Tensor:
    """FP32 amax of the tensor (scalar) or of its lines (row_amax: [rows, 1] or [1, cols]), unless given."""
    if given is None:
        return amax.amax(dim=axis, keepdim=True) if spec.row_amax else amax.amax()
    if not spec.row_amax:
        return given.float().reshape(())
    return given.float().unsqueeze(axis)


def _four_over_six(view: Tensor, amax: Tensor, whole: Tensor, spec: QuantSpec, axis: Axis) -> tuple[Tensor, Tensor]:
    """Elements and block scales of the better of two candidates: the block's amax at 6, or at 4 (1.5 times the scale).

    The errors are added in the order of Transformer Engine's reference: one number after the other along the axis, then
    lines in a tree of halves. A tie takes 6.
    """
    along, lines = (3, 1) if axis == -1 else (1, 3)
    encode_scale = scales.tensor_encode_scale(whole, spec)
    base = scales.divide(amax, spec.format.max) * encode_scale
    x = view.float()
    exact = not str(spec.four_over_six).endswith("_fast")
    target = x if exact else x * _spread(encode_scale.expand_as(amax))
    candidates = []
    for factor in (1.0, 1.5):
        scale = round_to(base * factor, scales.scale_format(spec), "nearest")
        y = _round(x * _spread(scales.two_level_multiplier(scale, encode_scale)), spec, None)
        value = y * _spread(scale)
        if exact:
            value = scales.divide(value * _spread(whole.expand_as(amax)), spec.scale_max * spec.format.max)
        error = (value - target).square() if "mse" in str(spec.four_over_six) else (value - target).abs()
        first, *others = error.unbind(along)
        for other in others:
            first = first + other
        total = first.movedim(lines if lines < along else lines - 1, 0)
        while len(total) > 1:
            total = total[: len(total) // 2] + total[len(total) // 2 :]
        candidates.append((y, scale, total[0]))
    (six, scale6, error6), (four, scale4, error4) = candidates
    pick = error4 < error6
    return torch.where(_spread(pick), four, six), torch.where(pick, scale4, scale6)


def _round(scaled: Tensor, spec: QuantSpec, random: Tensor | None) -> Tensor:
    """Round multiplied blocks to the element's grid; overwrites them."""
    if spec.three_quarters:
        scaled *= 0.75
    if spec.two_level:
        scaled += 0.0  # -0 becomes +0
    return round_to(scaled, spec.format, spec.rounding, random)


def _multipliers(
    amax: Tensor, whole: Tensor | None, spec: QuantSpec, dtype: torch.dtype, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What elements are multiplied by, the scales' values, and the scales as stored, [row blocks, column blocks]."""
    if spec.scale == "e8m0":
        codes = scales.e8m0_codes(amax, spec.format, spec.scale_rule)
        return scales.inverse_power_of_code(codes), scales.power_of_code(codes), codes.to(torch.uint8)
    if spec.two_level:
        assert whole is not None
        encode_scale = scales.tensor_encode_scale(whole, spec)
        decode = scales.two_level_scales(amax, encode_scale, spec)
        return scales.two_level_multiplier(decode, encode_scale), decode, encode(decode, scales.scale_format(spec))
    if spec.scale in ("e4m3", "ue5m3"):
        decode = scales.small_float_scale(amax, spec.format, scales.scale_format(spec))
        return scales.divide(1.0, decode), decode, encode(decode, scales.scale_format(spec))
    if given is None:
        source = amax if whole is None else whole.expand_as(amax)
        given = scales.amax_scale(source, spec.format.max, dtype, pow2=spec.scale == "pow2")
    multiplier = given.float().expand_as(amax)
    decode = scales.divide(1.0, multiplier)
    return multiplier, decode, decode


def _quantized(x: Tensor, spec: QuantSpec, axis: Axis, inputs: Inputs, finish: Finish) -> _Rounded:
    if spec.hadamard:
        x = rotate(x, sign_vector(spec.hadamard, spec.signs, inputs.key, x.device), axis)
    rows, cols = x.shape
    block = block_of(spec, axis, rows, cols)
    amax = _block_amax(x, block, ignore_nan=spec.scale == "e8m0" and spec.format.nan is not None)
    view = _to_blocks(x, block)
    whole = None
    if spec.takes_amax:
        whole = _tensor_amax(amax, spec, axis, inputs.amax)
    if spec.four_over_six:
        assert whole is not None
        blocks, decode = _four_over_six(view, amax, whole, spec, axis)
        raw = encode(decode, scales.scale_format(spec))
        return _Rounded(finish(blocks, decode), raw, decode, whole, (rows, cols))
    multiplier, decode, raw = _multipliers(amax, whole, spec, x.dtype, inputs.encode_scale)
    unusual = spec.format.nan is None and not bool((amax.isfinite() & (multiplier > 0)).all())
    lines, factors, found = block[0], multiplier, decode
    if lines == rows:  # one block from top to bottom: parts of it are single lines
        lines, view = 1, view.transpose(0, 1)
        factors, found = multiplier.expand(rows, -1), decode.expand(rows, -1)

    def part(start: int, stop: int) -> Tensor:
        scaled = view[start:stop].to(torch.float32, copy=True).mul_(_spread(factors[start:stop]))
        if unusual:
            scaled.masked_fill_(scaled.isnan(), torch.inf)  # saturates to +max, as in `encode`
        random = None
        if spec.rounding == "stochastic":
            assert inputs.key is not None
            first, last = start * lines, min(stop * lines, rows)
            here = replace(inputs.key, row=inputs.key.row + first)
            random = random_bits(here, last - first, cols, spec.random_bits, x.device)
            random = _to_blocks(random, (lines, block[1]))
        return finish(_round(scaled, spec, random), found[start:stop])

    # parts of so many row blocks keep the temporaries in the processor's cache; the values do not depend on it
    each = max(1, _PART * len(view) // view.numel())
    blocks = torch.cat([part(start, min(start + each, len(view))) for start in range(0, len(view), each)])
    return _Rounded(blocks, raw, decode, whole, (rows, cols))


def amax(x: Tensor, spec: QuantSpec, *, axis: Axis = -1, seed: RandomKey | None = None) -> Tensor:
    """FP32 scalar: the largest magnitude of a matrix after the spec's rotation; NaN if it holds one."""
    x = x.detach()
    if spec.hadamard:
        x = rotate(x, sign_vector(spec.hadamard, spec.signs, seed, x.device), axis)
    return _block_amax(x, (max(x.shape[0], 1), max(x.shape[1], 1)), ignore_nan=False).reshape(())


def checked(
    x: Tensor,
    spec: str | QuantSpec,
    axis: int,
    seed: int | RandomKey | None,
    amax: Tensor | None,
    encode_scale: Tensor | None,
    options: dict[str, Any],
) -> tuple[QuantSpec, Axis, Inputs]:
    """Resolve and check what the user gave; raises UsageError."""
    resolved = resolve_spec(spec, **options)
    if x.ndim != 2 or x.numel() == 0 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(
            f"cannot quantize {x.dtype} of shape {tuple(x.shape)}; give a matrix [rows, cols] of float32, bfloat16 or "
            "float16 with at least one element"
        )
    if axis not in (0, 1, -1):
        raise UsageError(f"axis is {axis}; use -1 (along rows) or 0 (along columns)")
    if resolved.draws and seed is None:
        raise UsageError("stochastic rounding and random signs need a seed: pass seed=<int> or a RandomKey")
    if amax is not None and not resolved.takes_amax:
        raise UsageError(f"amax is given, but {resolved.scale} scales of block {resolved.block!r} take none")
    if (encode_scale is not None) != (resolved.amax_history > 0):
        raise UsageError(
            "encode_scale goes with delayed scaling (amax_history > 0), and only with it: see DelayedScale"
        )
    key = RandomKey(seed=seed) if isinstance(seed, int) else seed
    return resolved, 0 if axis == 0 else -1, Inputs(key, amax, encode_scale)


def quantize(
    x: Tensor,
    spec: str | QuantSpec,
    *,
    axis: int = -1,
    seed: int | RandomKey | None = None,
    amax: Tensor | None = None,
    encode_scale: Tensor | None = None,
    **options: Any,
) -> QuantizedTensor:
    """Quantize a matrix into packed codes and scales.

    x:        [rows, cols] float32, bfloat16 or float16
    spec:     a name (`lowprec.SPECS`) or a QuantSpec; `options` replace its fields
    axis:     the reduction axis that blocks lie along: -1, or 0 (codes and scales are then those of x.T)
    seed:     for stochastic rounding and random signs: an int, or the RandomKey that says where in a run x is
    amax:     FP32 amax instead of x's own, e.g. reduced over ranks: scalar, or one a line (row_amax)
    encode_scale:  FP32 encode scale of delayed scaling

    Raises UsageError for a wrong spec, shape, dtype or missing seed.
    """
    resolved, along, inputs = checked(x, spec, axis, seed, amax, encode_scale, options)
    rounded = _quantized(x.detach(), resolved, along, inputs, lambda y, _: encode(y, resolved.format))
    codes = _from_blocks(rounded.blocks, rounded.shape)
    raw, whole = rounded.raw, rounded.amax
    if along == 0:
        codes, raw = codes.T, raw.T
    if resolved.row_amax and whole is not None:
        whole = whole.flatten()
    shape = (x.shape[0], x.shape[1])
    return QuantizedTensor(pack(codes.contiguous(), resolved), raw.contiguous(), whole, resolved, along, shape)


def operand(
    x: Tensor,
    spec: str | QuantSpec,
    *,
    axis: int = -1,
    seed: int | RandomKey | None = None,
    amax: Tensor | None = None,
    encode_scale: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Operand:
    """Quantize and decode a matrix for a GEMM: exact values in `dtype`, and the FP32 scale for the epilogue.

    Arguments as `quantize`. BF16 holds element * block scale exactly (QuantSpec.exact_in_bf16) but for magnitudes below
    2^-126, where BF16 rounds to multiples of 2^-133 (and BF16 GEMMs may flush to zero): MX blocks whose amax is below
    about 2^-110. At the other end BF16 reaches as far as FP32. Specs that BF16 cannot hold need dtype=torch.float32.

    Raises UsageError as `quantize`, and where `dtype` cannot hold the values.
    """
    resolved, along, inputs = checked(x, spec, axis, seed, amax, encode_scale, options)
    check_operand_dtype(resolved, dtype)
    scaled = not in_epilogue(resolved)

    def decoded(y: Tensor, scale: Tensor) -> Tensor:
        return (y.mul_(_spread(scale)) if scaled else y).to(dtype)

    rounded = _quantized(x.detach(), resolved, along, inputs, decoded)
    post = post_scale(resolved, rounded.amax, x.device)
    if not scaled:
        post = rounded.decode.reshape(()) if resolved.block == "tensor" else rounded.decode
    values = _from_blocks(rounded.blocks, rounded.shape)
    whole = rounded.amax.flatten() if resolved.row_amax and rounded.amax is not None else rounded.amax
    return Operand(values, post, whole)


def fake_quantize(
    x: Tensor,
    spec: str | QuantSpec,
    *,
    axis: int = -1,
    seed: int | RandomKey | None = None,
    amax: Tensor | None = None,
    encode_scale: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Tensor:
    """Quantize and dequantize: values * scale of `operand` in FP32, rounded once to `dtype`, in x's orientation.

    Bit-equal to quantize(...).dequantize(dtype). Arguments as `quantize`. With a Hadamard rotation the result is in
    rotated coordinates, padded to whole groups. For NVFP4 and FP8 the tensor scale makes the last rounding inexact in
    BF16: a GEMM takes `operand` instead.
    """
    found = operand(x, spec, axis=axis, seed=seed, amax=amax, encode_scale=encode_scale, dtype=torch.float32, **options)
    return (found.values if found.scale is None else found.values * found.scale).to(dtype)
