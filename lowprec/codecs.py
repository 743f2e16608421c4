"""Codecs: how one optimizer state, or a master weight, is stored. The plain torch truth; adamw.py uses it.

    name            stored as                          of FP32 values x
    fp32, bf16      themselves                         BF16: to nearest even
    fp16_scaled     FP16, one FP32 scale               2^k x, 2^k the largest power with 2^k amax <= 65504 (FP8-LM)
    fp8_e4m3        a byte, one FP32 scale             2^k x to E4M3, 2^k amax <= 448 (FP8-LM)
    fp8_e4m3_b256   a byte, FP32 scale of 256          E4M3(x / s), s = max(amax, 1e-12) / 448 (torchao)
    dynamic8_b256   a byte, FP32 scale of 256          nearest code of x / s, s = the block's amax (torchao)
    dynamic4_b128   half a byte, FP32 scale of 128     as above (lpmm)
    linear4_b128    half a byte, FP32 scale of 128     as above, linear codebook (torchao's second moment)
    linear4_rank1   half a byte, FP32 maxima of rows   nearest code of x / s, s_ij = min(max of row i, max of column j)
                    and columns                        (lpmm's second moment)

x / s is computed as x times the FP32 number 1 / s. A name with "_sr" at its end is encoded with stochastic rounding:
x between two codes goes up if fraction + u / 2^16 >= 1, u 16 random bits that depend on (seed, tensor, slot, step,
index in the logical tensor) alone. Nearest: E4M3, BF16 and FP16 to even; in a codebook a tie goes to the lower code,
as lpmm's strict comparison does (`ties="up"`: as torchao's). Scales are decode scales: x = value * scale. A block of
zeros has scale 0 and decodes to 0; torchao's floor of 1e-12 is kept for FP8 only: as the scale of a second moment it
would be larger than the moments of small gradients. When amax is 0, or not finite, a tensor's power-of-two scale
stays what it was (MS-AMP).

A state belongs to a fragment: the elements [offset, offset + count) of the row-major flattened logical tensor. Codecs
of blocks want it aligned: offset and end multiples of 256 (or the tensor's end), so that no block, counted from the
tensor's start, is cut. The first nibble of a byte is the low one. Rows and columns are those of the matrix of the last
dimension. What a scale needs of the whole tensor is `statistics`, MAX-reduced over its holders before `encode`. Values
must be finite: the caller skips other steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from errors import UsageError
from lowprec.codebooks import codebook, thresholds
from lowprec.codec import decode_table, encode, round_to
from lowprec.formats import element_format
from lowprec.philox import RandomKey, random_bits

UNIT = 256  # fragments start at multiples of it: the largest block, and a row of random bits
SMALL = 4096  # tensors of so many elements or fewer stay FP32

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Extent:
    """The elements [offset, offset + count) of the flattened logical tensor of `shape`."""

    shape: tuple[int, ...]
    offset: int
    count: int

    def __post_init__(self) -> None:
        end = self.offset + self.count
        assert 0 <= self.offset < end <= self.numel, self

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Extent:
        return cls(tuple(shape), 0, math.prod(shape))

    @property
    def aligned(self) -> bool:
        """Whether it begins and ends on units, or with the tensor."""
        end = self.offset + self.count
        return self.offset % UNIT == 0 and (end % UNIT == 0 or end == self.numel)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> slice:
        """The rows of the matrix [numel / columns, columns] that the fragment touches."""
        return slice(self.offset // self.columns, -(-(self.offset + self.count) // self.columns))

    def matrix(self, values: Tensor) -> Tensor:
        """Values [count] in their places of the rows they touch; 0 where those rows are not the fragment's."""
        lead = self.offset % self.columns
        return pad(values, (lead, -(lead + self.count) % self.columns)).view(-1, self.columns)

    def flat(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        lead = self.offset % self.columns
        return matrix.reshape(-1)[lead : lead + self.count]

    def uniform(self, key: RandomKey) -> Tensor:
        """16 random bits of each element, int32 [count] on the CPU; a function of the key and the global index."""
        assert key.row == 0 and key.column == 0, key
        first, lead = divmod(self.offset, UNIT)
        rows = -(-(lead + self.count) // UNIT)
        return random_bits(replace(key, row=first), rows, UNIT, 16).reshape(-1)[lead : lead + self.count]


@dataclass(frozen=True)
class Part:
    """One tensor of a state.

    per:    logical elements for each stored item (2: a byte of two nibbles); 0: a statistic of the whole tensor, which
            every holder of a fragment keeps in full
    length: of the tensor if `per` is 0
    """

    dtype: torch.dtype
    per: int
    length: int = 0

    def size(self, count: int) -> int:
        return -(-count // self.per) if self.per else self.length


def round_bf16(values: Tensor, uniform: Tensor | None) -> Tensor:
    """FP32 to BF16, to nearest even, or with 16 random bits an element: add them below BF16's last bit and cut.

    Finite numbers stay finite, Inf and NaN themselves.
    """
    if uniform is None:
        return values.bfloat16()
    largest = 0x7F7F0000
    bits = values.view(torch.int32)
    magnitude = ((bits & 0x7FFFFFFF) + uniform).bitwise_and_(~0xFFFF).clamp_(max=largest)
    rounded = (magnitude | (bits & ~0x7FFFFFFF)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def power_of_two_scale(amax: Tensor, largest: float, previous: Tensor) -> Tensor:
    """Decode scale 2^-k, 2^k the largest power of two with 2^k amax <= largest; `previous` if amax is 0 or not finite.

    amax below 2^-110 counts as that, so that both 2^k and 2^-k are normal numbers. All FP32 [1].
    """
    exponent = torch.frexp(largest / amax.clamp(min=2.0**-110)).exponent - 1
    scale = ((127 - exponent.clamp(-126, 126)) << 23).to(torch.int32).view(torch.float32)
    return torch.where((amax > 0) & amax.isfinite(), scale, previous)


@dataclass(frozen=True)
class Codec:
    """How a state is stored: see the page above. `choose` makes one.

    signed:     whether values can be negative (the first moment) or not (the second)
    stochastic: encode with random bits
    ties:       where a codebook's nearest encode sends a tie: "down" or "up"
    """

    name: str
    signed: bool
    stochastic: bool = False
    ties: str = "down"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """Suffix -> what is stored; the suffix of a state that is one tensor is ""."""
        return {"": Part({"fp32": torch.float32, "bf16": torch.bfloat16}[self.name], 1)}

    def allocate(self, extent: Extent, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """A state of zeros."""
        return {
            suffix: torch.zeros(part.size(extent.count), dtype=part.dtype, device=device)
            for suffix, part in self.parts(extent.shape).items()
        }

    def decode(self, state: State, extent: Extent) -> Tensor:
        """float32 [count]."""
        return state[""].float()

    def statistics_length(self, shape: tuple[int, ...]) -> int:
        """Length of what `statistics` returns for a tensor of `shape`; 0: nothing."""
        return sum(part.length for part in self.parts(shape).values() if part.per == 0)

    def statistics(self, values: Tensor, extent: Extent) -> Tensor | None:
        """What `encode` needs to know of the whole tensor, of this fragment: FP32, 1-D, to be MAX-reduced; or None."""
        return None

    def encode(
        self, values: Tensor, extent: Extent, state: State, statistics: Tensor | None, random: RandomKey | None
    ) -> None:
        """Write FP32 values [count] into `state`. random: for stochastic rounding, with row and column 0."""
        uniform = self._uniform(extent, random, values.device)
        state[""].copy_(values if self.name == "fp32" else round_bf16(values, uniform))

    def _uniform(self, extent: Extent, random: RandomKey | None, device: torch.device) -> Tensor | None:
        if not self.stochastic:
            return None
        assert random is not None, f"{self.name} is rounded stochastically and needs a key"
        return extent.uniform(random).to(device)


def _to_grid(values: Tensor, element: str, uniform: Tensor | None) -> Tensor:
    """FP32 numbers rounded to a floating-point format, saturating; FP32."""
    if uniform is None:
        return round_to(values, element_format(element), "nearest")
    wide = uniform.to(torch.int64) << 16  # round_to wants 32 bits
    return round_to(values, element_format(element), "stochastic", wide)


@dataclass(frozen=True)
class Scaled(Codec):
    """One power-of-two scale for the tensor: fp16_scaled, fp8_e4m3."""

    @property
    def _element(self) -> str:
        return "e5m10" if self.name == "fp16_scaled" else "e4m3"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        payload = {"": Part(torch.float16, 1)} if self.name == "fp16_scaled" else {"codes": Part(torch.uint8, 1)}
        return payload | {"scale": Part(torch.float32, 0, 1)}

    def allocate(self, extent: Extent, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        state = super().allocate(extent, device)
        state["scale"].fill_(1.0)
        return state

    def decode(self, state: State, extent: Extent) -> Tensor:
        if self.name == "fp16_scaled":
            return state[""].float() * state["scale"]
        return _table(self).to(state["codes"].device)[state["codes"].int()] * state["scale"]

    def statistics(self, values: Tensor, extent: Extent) -> Tensor | None:
        return values.abs().amax().view(1)

    def next_scale(self, statistics: Tensor, previous: Tensor) -> Tensor:
        """Decode scale FP32 [1] of a tensor with these statistics, whose scale was `previous`."""
        return power_of_two_scale(statistics, element_format(self._element).max, previous)

    def encode(
        self, values: Tensor, extent: Extent, state: State, statistics: Tensor | None, random: RandomKey | None
    ) -> None:
        assert statistics is not None, f"{self.name} needs the tensor's amax"
        form = element_format(self._element)
        state["scale"].copy_(self.next_scale(statistics, state["scale"]))
        uniform = self._uniform(extent, random, values.device)
        rounded = _to_grid(values * (1.0 / state["scale"]), self._element, uniform)
        if self.name == "fp16_scaled":
            state[""].copy_(rounded)
        else:
            state["codes"].copy_(encode(rounded, form))


@dataclass(frozen=True)
class Coded(Codec):
    """Codes relative to a scale that neighbours share: fp8_e4m3_b256, dynamic8_b256, dynamic4_b128, linear4_*."""

    @property
    def bits(self) -> int:
        return 4 if self.name.startswith(("dynamic4", "linear4")) else 8

    @property
    def block(self) -> int:
        return 128 if self.bits == 4 else 256

    @property
    def kind(self) -> str:
        """ "dynamic", "linear" or "fp8"."""
        return "fp8" if self.name.startswith("fp8") else self.name.split("_")[0].rstrip("48")

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"codes": Part(torch.uint8, 8 // self.bits)} | self._scale_parts(shape)

    def allocate(self, extent: Extent, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        if not extent.aligned:
            raise UsageError(
                f"{self.name} keeps blocks of {self.block}, but a rank holds elements {extent.offset} to "
                f"{extent.offset + extent.count} of a tensor of shape {list(extent.shape)}, which cut one (ZeRO stage "
                f"3 cuts into equal slices); use zero.stage 1 or 2, another number of ranks, or fp32"
            )
        return super().allocate(extent, device)

    def _scale_parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"scale": Part(torch.float32, self.block)}

    def _scales(self, state: State, extent: Extent) -> Tensor:
        """FP32 [count]: the scale of each element."""
        return state["scale"].repeat_interleave(self.block)[: extent.count]

    def _write_scales(self, values: Tensor, extent: Extent, state: State, statistics: Tensor | None) -> None:
        blocks = pad(values, (0, -extent.count % self.block)).view(-1, self.block)
        amax = blocks.abs().amax(dim=1)
        state["scale"].copy_(amax.clamp(min=1e-12) / 448.0 if self.kind == "fp8" else amax)

    def decode(self, state: State, extent: Extent) -> Tensor:
        codes = state["codes"]
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).view(-1)[: extent.count]
        return _table(self).to(codes.device)[codes.int()] * self._scales(state, extent)

    def encode(
        self, values: Tensor, extent: Extent, state: State, statistics: Tensor | None, random: RandomKey | None
    ) -> None:
        self._write_scales(values, extent, state, statistics)
        inverse = 1.0 / self._scales(state, extent).clamp(min=2.0**-126)  # finite, whatever the scale
        codes = self._codes(values * inverse, self._uniform(extent, random, values.device))
        if self.bits == 4:
            codes = pad(codes, (0, extent.count % 2))
            codes = codes[::2] | (codes[1::2] << 4)
        state["codes"].copy_(codes)

    def _codes(self, ratio: Tensor, uniform: Tensor | None) -> Tensor:
        """uint8 codes, one an element, of values divided by their scales."""
        if self.kind == "fp8":
            return encode(_to_grid(ratio, "e4m3", uniform), element_format("e4m3"))
        if uniform is None:
            limits = thresholds(self.kind, self.bits, self.signed).to(ratio.device)
            return torch.bucketize(ratio, limits, right=self.ties == "up").to(torch.uint8)
        values = _table(self).to(ratio.device)
        below = (torch.bucketize(ratio, values, right=True) - 1).clamp_(0, len(values) - 2)
        fraction = (ratio - values[below]) / (values[below + 1] - values[below])
        return (below + (fraction >= (65536 - uniform) * 2.0**-16)).to(torch.uint8)


@dataclass(frozen=True)
class Rank1(Coded):
    """The scale of an element is the smaller of its row's and its column's largest magnitude: linear4_rank1."""

    def _scale_parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        columns = shape[-1]
        rows = math.prod(shape[:-1])
        return {"rows": Part(torch.float32, 0, rows), "columns": Part(torch.float32, 0, columns)}

    def _scales(self, state: State, extent: Extent) -> Tensor:
        return extent.flat(torch.minimum(state["rows"][extent.rows, None], state["columns"]))

    def statistics(self, values: Tensor, extent: Extent) -> Tensor | None:
        matrix = extent.matrix(values.abs())
        rows = values.new_zeros(extent.numel // extent.columns)
        rows[extent.rows] = matrix.amax(dim=1)
        return torch.cat((rows, matrix.amax(dim=0)))

    def _write_scales(self, values: Tensor, extent: Extent, state: State, statistics: Tensor | None) -> None:
        assert statistics is not None, f"{self.name} needs the maxima of the tensor's rows and columns"
        rows = len(state["rows"])
        state["rows"].copy_(statistics[:rows])
        state["columns"].copy_(statistics[rows:])


_CLASSES: dict[str, type[Codec]] = {
    "fp32": Codec,
    "bf16": Codec,
    "fp16_scaled": Scaled,
    "fp8_e4m3": Scaled,
    "fp8_e4m3_b256": Coded,
    "dynamic8_b256": Coded,
    "dynamic4_b128": Coded,
    "linear4_b128": Coded,
    "linear4_rank1": Rank1,
}
NAMES = (*_CLASSES, *(f"{name}_sr" for name in _CLASSES if name != "fp32"))


@cache
def _table(codec: Codec) -> Tensor:
    if isinstance(codec, Coded) and codec.kind != "fp8":
        return codebook(codec.kind, codec.bits, codec.signed)
    return decode_table(element_format("e4m3"))


def codec(name: str, signed: bool, ties: str = "down") -> Codec:
    """The codec `name`, one of NAMES, whatever the tensor. Raises UsageError for another name."""
    if name not in NAMES:
        raise UsageError(f"state codec {name!r} is unknown; use one of {', '.join(NAMES)}")
    base = name.removesuffix("_sr")
    return _CLASSES[base](base, signed, base != name, ties)


def choose(name: str, shape: tuple[int, ...], signed: bool) -> Codec:
    """The codec of a state of a tensor of `shape`: small ones are FP32, and vectors have no rank-1 scales."""
    wanted = codec(name, signed)
    if math.prod(shape) <= SMALL:
        return codec("fp32", signed)
    if wanted.name == "linear4_rank1" and len(shape) < 2:
        return codec(name.replace("rank1", "b128"), signed)
    return wanted
