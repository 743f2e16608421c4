"""Payloads: how a flat gradient or weight travels between ranks, as bytes. Pure functions of tensors; no ranks here.

    name            element        scale                                            bytes a number  source
    fp32, bf16      plain          none                                             4, 2
    fp8_e4m3        E4M3           FP32, one a logical tensor, shared by all ranks  1               TE, current scaling
    fp8_e5m2        E5M2           the same                                         1
    fp8_lm          E4M3           2^k mu, one a logical tensor, shared             1               arXiv 2310.18313
    fp8_e4m3_b128   E4M3           2^k in FP32, sent along, one in 128              1.03125         arXiv 2412.19437
    fp8_e5m2_b128   E5M2           the same                                         1.03125
    mxfp8_e4m3      E4M3           E8M0, sent along, one in 32, rceil               1.03125         arXiv 2506.08027
    mxfp8_e5m2      E5M2           the same                                         1.03125
    mxint8          INT8           E8M0, sent along, one in 32, floor               1.03125         OCP MX 1.0
    int8_b128       -127 .. 127    FP32, sent along, one in 128                     1.03125         ours
    int4_b32        -7 .. 7        FP32, sent along, one in 32                      0.625           ours

Block sizes are ours where no source fixes them: 128 is the largest that the fused kernels know; 4 bits have only seven
magnitudes, so fewer numbers share a scale.

A part is what one rank sends to another: pieces of logical tensors, one after the other. Its message is

    codes (4 bits: two a byte, the first in the low nibble; pieces end on whole bytes), then scales, FP32 little endian
    or one byte each; shared scales are not in it, all ranks know them

A shared scale is that of the largest magnitude of the tensor on all ranks: the minimum of the ranks' scales, but that a
rank whose part is zero does not count. Blocks are counted from the start of a part and do not stop at logical tensors.

FP8-LM. The paper multiplies gradients by mu before their FP8 cast and halves it when more than 1e-5 of the values are
at the FP8 maximum; if they stay below, mu doubles over 1000 steps. With a scale found just in time from mu g, mu would
cancel; we assume that it multiplies the shared power-of-two scale 2^floor(log2(448 / amax)) of g, as the public code's
1 / sqrt(N) does: mu > 1 lets the largest numbers saturate for the sake of the small ones. Sums are FP32, not FP8.

What is not finite arrives so: Inf and NaN make a shared scale 0, whose tensor decodes to NaN on every rank; a block of
FP8 or integers with an FP32 scale decodes to NaN, as does one of MXINT8; MXFP8 keeps each NaN, and Inf as Inf.

Stochastic rounding takes 8 random bits a number: those of (row e // 1024, column e % 1024) for element e of a piece
under the key's slot with the piece's place appended, or of a part where blocks are its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

from errors import UsageError
from lowprec import dispatch
from lowprec.codec import encode
from lowprec.formats import SPECS, ElementFormat, QuantSpec, Scale
from lowprec.philox import RandomKey
from lowprec.quantized import QuantizedTensor
from lowprec.scales import FLT_MAX, amax_scale, divide

Pieces = tuple[tuple[int, int], ...]  # of a part, in order: (index of the logical tensor, elements)

WIDTH = 1024  # flat numbers are quantized as rows of so many, so that threads have rows to share
_NO_KEY = RandomKey(seed=0)


@dataclass(frozen=True)
class Payload:
    """A row of the table above; `parse_payload` gives one by name.

    dtype:      of plain numbers, float32 or bfloat16; uint8 where there is a spec
    spec:       how numbers are quantized; block "tensor" is a shared scale
    automatic:  whether the scale is multiplied by FP8-LM's mu
    """

    name: str
    dtype: torch.dtype = torch.uint8
    spec: QuantSpec | None = None
    automatic: bool = False

    @property
    def shared(self) -> bool:
        """Whether all ranks share one scale for each logical tensor."""
        return self.spec is not None and self.spec.block == "tensor"

    @property
    def block(self) -> int:
        """Numbers under one scale of a message; 0 where it holds none."""
        return 0 if self.spec is None or isinstance(self.spec.block, str) else self.spec.block[1]

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.uint8 if self.spec is not None and self.spec.scale == "e8m0" else torch.float32

    def code_bytes(self, pieces: Pieces) -> int:
        """Bytes of a message before its scales."""
        bits = self.spec.format.bits if self.spec else 8 * self.dtype.itemsize
        return sum(-(-bits * length // 8) for _, length in self.units(pieces))

    def message_bytes(self, pieces: Pieces) -> int:
        """Bytes of a message."""
        scales = -(-elements(pieces) // self.block) if self.block else 0
        return self.code_bytes(pieces) + scales * self.scale_dtype.itemsize

    def units(self, pieces: Pieces) -> Pieces:
        """What is quantized in one go: pieces under shared scales, else the whole part."""
        return pieces if self.shared else ((0, elements(pieces)),)


def _shared(element: str, scale: Scale) -> QuantSpec:
    return QuantSpec(element=element, scale=scale, block="tensor", amax_history=1)  # 1: the scale is given


def _blocks(element: str, scale: Scale, size: int) -> QuantSpec:
    return QuantSpec(element=element, scale=scale, block=(1, size))


PAYLOADS: Mapping[str, Payload] = MappingProxyType(
    {
        made.name: made
        for made in (
            Payload("fp32", torch.float32),
            Payload("bf16", torch.bfloat16),
            Payload("fp8_e4m3", spec=_shared("e4m3", "fp32")),
            Payload("fp8_e5m2", spec=_shared("e5m2", "fp32")),
            Payload("fp8_lm", spec=_shared("e4m3", "pow2"), automatic=True),
            Payload("fp8_e4m3_b128", spec=_blocks("e4m3", "pow2", 128)),
            Payload("fp8_e5m2_b128", spec=_blocks("e5m2", "pow2", 128)),
            Payload("mxfp8_e4m3", spec=SPECS["mxfp8_e4m3"]),
            Payload("mxfp8_e5m2", spec=SPECS["mxfp8_e5m2"]),
            Payload("mxint8", spec=SPECS["mxint8"]),
            Payload("int8_b128", spec=_blocks("int8", "fp32", 128)),
            Payload("int4_b32", spec=_blocks("e0m3", "fp32", 32)),  # sign and 3 bits: -7 .. 7 quarters
        )
    }
)


def parse_payload(name: str) -> Payload:
    """The payload called `name`; raises UsageError, with the nearest name, for an unknown one."""
    if name in PAYLOADS:
        return PAYLOADS[name]
    close = difflib.get_close_matches(name, PAYLOADS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(f"payload {name!r} is unknown; {hint}use one of {', '.join(PAYLOADS)}")


def next_mu(mu: float, saturated_fraction: float) -> float:
    """FP8-LM's automatic scaling factor for the next step.

    mu / 2 if more than 1e-5 of the values were at the FP8 maximum, else mu 2^(1/1000). A step that overflowed says
    nothing about it (its codes are NaN): keep mu then.
    """
    return mu / 2 if saturated_fraction > 1e-5 else mu * 2.0 ** (1 / 1000)


def elements(pieces: Pieces) -> int:
    """Numbers in a part."""
    return sum(length for _, length in pieces)


def cut(splits: Sequence[int], segments: Sequence[int] | None) -> list[Pieces]:
    """The pieces of each part of a flat tensor.

    splits:    elements of each part, in order
    segments:  elements of each logical tensor, in order and of the same sum; None: all is one tensor
    """
    segments = [sum(splits)] if segments is None else segments
    assert sum(segments) == sum(splits), f"segments hold {sum(segments)} elements, parts {sum(splits)}"
    parts, index, left = [], 0, (segments[0] if segments else 0)
    for wanted in splits:
        pieces = []
        while wanted:
            while not left:
                index += 1
                left = segments[index]
            length = min(wanted, left)
            pieces.append((index, length))
            wanted, left = wanted - length, left - length
        parts.append(tuple(pieces))
    return parts


def piece_amaxes(x: Tensor, pieces: Pieces, count: int) -> Tensor:
    """Largest magnitude of each logical tensor in the flat `x`, FP32 [count]; Inf for a tensor that is not finite."""
    found = torch.zeros(count, device=x.device)
    if not pieces:
        return found
    lows, highs = zip(*(torch.aminmax(piece) for piece in x.split([n for _, n in pieces])), strict=True)
    # NaN would be lost in a MAX reduction, whose comparisons it fails
    amaxes = torch.maximum(-torch.stack(lows), torch.stack(highs)).float().nan_to_num_(torch.inf, torch.inf)
    where = torch.tensor([index for index, _ in pieces], device=x.device)
    return found.scatter_reduce_(0, where, amaxes, "amax")


@dataclass(frozen=True)
class Cast:
    """Everything that turns numbers into a message and back.

    scales:  encode scales, FP32 [logical tensors], where the payload shares them
    key:     of stochastic rounding; None rounds to nearest
    """

    payload: Payload
    scales: Tensor | None = None
    key: RandomKey | None = None

    @property
    def spec(self) -> QuantSpec:
        assert self.payload.spec is not None
        return self.payload.spec if self.key is None else replace(self.payload.spec, rounding="stochastic")

    def for_part(self, place: str) -> Cast:
        """The same with random bits of its own."""
        return self if self.key is None else replace(self, key=_below(self.key, place))


def _below(key: RandomKey, place: str) -> RandomKey:
    return replace(key, slot=f"{key.slot}/{place}")


def shared_scales(amaxes: Tensor, payload: Payload, mu: float) -> Tensor:
    """Encode scales, FP32, of amaxes that are reduced over ranks; a non-finite one gives 0."""
    assert payload.spec is not None
    scales = amax_scale(amaxes, payload.spec.format.max, torch.float32, pow2=payload.spec.scale == "pow2")
    return (scales * mu).clamp_(max=FLT_MAX) if payload.automatic else scales


def pack(x: Tensor, pieces: Pieces, cast: Cast) -> list[Tensor]:
    """The message of a part, uint8 tensors to be strung together.

    x: flat float32 or bfloat16, the part's numbers
    """
    if cast.payload.spec is None:
        return [x.to(cast.payload.dtype).contiguous().view(torch.uint8)]
    codes, scales, offset = [], [], 0
    for place, (index, length) in enumerate(cast.payload.units(pieces)):
        given = None if cast.scales is None else cast.scales[index]
        base = _NO_KEY if cast.key is None else _below(cast.key, str(place))
        for rows, width, start in _matrices(length, x.device):
            matrix = x[offset + start :][: rows * width].view(rows, width)
            found = dispatch.quantize(matrix, cast.spec, -1, replace(base, row=base.row + start // WIDTH), given)
            codes.append(found.codes.flatten())
            if cast.payload.block:
                scales.append(found.scales.flatten().view(torch.uint8))
        offset += length
    return codes + scales


def unpack(message: Tensor, pieces: Pieces, cast: Cast) -> Iterator[Tensor]:
    """The numbers of a message, flat FP32 (or as they came, if plain), in consecutive chunks that stay in cache.

    message: uint8 [payload.message_bytes(pieces)]
    """
    payload, end = cast.payload, cast.payload.code_bytes(pieces)
    if payload.spec is None:
        yield _aligned(message, payload.dtype)
        return
    decode_scales = divide(1.0, cast.scales) if cast.scales is not None else None
    scales = _aligned(message[end:], payload.scale_dtype)
    place, block = 0, 0
    for index, length in payload.units(pieces):
        for rows, width, _ in _matrices(length, message.device):
            stored = -(-width * payload.spec.format.bits // 8)
            codes = message[place : place + rows * stored].view(rows, stored)
            place += rows * stored
            if decode_scales is not None:
                here = decode_scales[index].view(1, 1)
            else:
                blocks = -(-width // payload.block)
                here = scales[block : block + rows * blocks].view(rows, blocks)
                block += rows * blocks
            packed = QuantizedTensor(codes, here, None, payload.spec, -1, (rows, width))
            values, scale, _ = dispatch.decode(packed, torch.float32, torch.float32)
            yield (values if scale is None else values.mul_(scale)).flatten()


def saturated(codes: Sequence[Tensor], payload: Payload) -> Tensor:
    """How many codes stand for the largest magnitude of an 8-bit float, int64 scalar."""
    assert payload.spec is not None
    largest = _largest_code(payload.spec.format)
    # counting what is not zero is four times faster on a CPU than comparing and adding up
    others = [torch.count_nonzero((part & 127).sub_(largest)) for part in codes if part.numel()]
    if not others:
        return torch.zeros((), dtype=torch.int64)
    return sum(part.numel() for part in codes) - torch.stack(others).sum()


@cache
def _largest_code(form: ElementFormat) -> int:
    return int(encode(torch.tensor([form.max]), form))


def _aligned(message: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers of `dtype`; copied where they start between two of them."""
    return (message.clone() if message.storage_offset() % dtype.itemsize else message).view(dtype)


def _matrices(length: int, device: torch.device) -> Iterator[tuple[int, int, int]]:
    """(rows, columns, start) of the matrices as which so many flat numbers are quantized; the last may be narrow."""
    most = 256 if device.type == "cpu" else 1 << 14  # rows: temporaries fit a processor's cache; a GPU wants few calls
    whole = length // WIDTH
    for row in range(0, whole, most):
        yield min(most, whole - row), WIDTH, row * WIDTH
    if length % WIDTH:
        yield 1, length % WIDTH, whole * WIDTH
