"""State codecs on fragments, stochastic encoding, what parts there are, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from errors import UsageError
from lowprec.codecs import NAMES, Codec, Extent, choose, codec, round_bf16
from lowprec.philox import RandomKey

KEY = RandomKey(seed=5, tensor="layers.0.mlp.down", slot="exp_avg", step=3)
SHAPES = [(37, 200), (3, 7, 330), (5001,)]


def cut(shape: tuple[int, ...], *places: int) -> list[Extent]:
    ends = [0, *(256 * p for p in places), math.prod(shape)]
    return [Extent(shape, low, high - low) for low, high in zip(ends[:-1], ends[1:], strict=True)]


def values_of(shape: tuple[int, ...], signed: bool) -> Tensor:
    made = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(len(shape)))
    made *= torch.logspace(-4, 0, len(made))
    return made if signed else made.square()


def encoded(how: Codec, values: Tensor, extents: list[Extent], key: RandomKey | None) -> list[dict[str, Tensor]]:
    pieces = [values[e.offset : e.offset + e.count] for e in extents]
    found = [how.statistics(piece, e) for piece, e in zip(pieces, extents, strict=True)]
    combined = None if found[0] is None else torch.stack(found).amax(dim=0)  # pyright: ignore[reportArgumentType]
    states = [how.allocate(e) for e in extents]
    for piece, extent, state in zip(pieces, extents, states, strict=True):
        how.encode(piece, extent, state, combined, key)
    return states


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fragments_are_the_tensor(shape: tuple[int, ...], name: str, signed: bool) -> None:
    how = choose(name, shape, signed)
    values = values_of(shape, signed)
    (whole,) = encoded(how, values, [Extent.whole(shape)], KEY)
    decoded = how.decode(whole, Extent.whole(shape))
    error = (decoded - values).abs().max() / values.abs().max()
    assert error < {"fp32": 1e-9, "bf16": 2**-7, "fp16": 2**-9, "fp8": 2**-3}.get(how.name.split("_")[0], 0.24)
    extents = cut(shape, 3, 4, 11)
    pieces = encoded(how, values, extents, KEY)
    for suffix, part in how.parts(shape).items():
        if part.per:
            assert torch.equal(torch.cat([piece[suffix] for piece in pieces]), whole[suffix])
        for extent, piece in zip(extents, pieces, strict=True):
            assert piece[suffix].dtype == part.dtype and len(piece[suffix]) == part.size(extent.count)
            assert part.per or torch.equal(piece[suffix], whole[suffix])
    again = torch.cat([how.decode(piece, e) for piece, e in zip(pieces, extents, strict=True)])
    assert torch.equal(again, decoded)


@pytest.mark.parametrize("name", NAMES)
def test_zero_states_decode_to_zero(name: str) -> None:
    extent = Extent.whole((70, 70))
    for signed in (True, False):
        how = codec(name, signed)
        state = how.allocate(extent)
        assert not how.decode(state, extent).any()
        zeros = torch.zeros(extent.count)
        how.encode(zeros, extent, state, how.statistics(zeros, extent), KEY)
        assert not how.decode(state, extent).any()


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_sr")])
def test_stochastic_encoding_is_unbiased(name: str) -> None:
    """Over 5,120 draws (256 rows of the same numbers, 20 steps) the mean of what is decoded is the value."""
    how, steps = codec(name, signed=True), 20
    row = torch.zeros(256)
    row[:8] = torch.tensor([1.0, 0.3, -0.3, 0.0123, -0.2, 0.7777, 0.5, -0.43])
    values = row.repeat(256)
    extent = Extent.whole((256, 256))
    draws = []
    state = how.allocate(extent)
    for step in range(steps):
        how.encode(values, extent, state, how.statistics(values, extent), RandomKey(seed=1, tensor="x", step=step))
        draws.append(how.decode(state, extent).view(256, 256)[:, :8].double())
    drawn = torch.cat(draws)
    deviation = drawn.std(dim=0) / len(drawn) ** 0.5
    assert ((drawn.mean(dim=0) - row[:8]).abs() <= 5 * deviation + 2e-5).all(), drawn.mean(dim=0)


def test_bf16_stochastic_rounding() -> None:
    key = RandomKey(seed=0, tensor="w", slot="weight")
    extent = Extent((4096, 256), 0, 1 << 20)
    bits = extent.uniform(key)
    assert bits.min() >= 0 and bits.max() == 65535
    rounded = round_bf16(torch.full((1 << 20,), 1.001), bits).float()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert rounded.mean().item() == pytest.approx(1.001, abs=1e-5)  # deviation 2.5e-6
    assert (rounded > 1).float().mean().item() == pytest.approx(0.128, abs=0.002)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4028235e38, -3.4028235e38, 0.0, -0.0, -1.0])
    up = round_bf16(odd, torch.full((8,), 65535, dtype=torch.int32)).float()
    assert up[:2].tolist() == [torch.inf, -torch.inf] and up[2].isnan()
    assert up[3:5].isfinite().all() and up[5:].tolist() == [0, 0, -1]
    assert torch.equal(round_bf16(odd[:2], None).float(), odd[:2])


def test_bits_belong_to_elements() -> None:
    whole = Extent.whole((50, 100))
    part = Extent((50, 100), 1024, 3976)
    assert torch.equal(whole.uniform(KEY)[1024:], part.uniform(KEY))


def test_small_tensors_and_vectors() -> None:
    assert choose("dynamic4_b128", (64, 64), True).name == "fp32"
    assert choose("dynamic4_b128", (64, 65), True).name == "dynamic4_b128"
    assert choose("linear4_rank1", (5000,), False).name == "linear4_b128"
    assert choose("linear4_rank1_sr", (5000,), False) == codec("linear4_b128_sr", False)


def test_bytes_an_element() -> None:
    """numerics.md: one byte and 64 KiB of scales for m and v of 2^20 elements in 4 bits."""
    extent = Extent.whole((1024, 1024))
    sizes = {name: sum(t.nbytes for t in codec(name, True).allocate(extent).values()) for name in NAMES}
    million = 1 << 20
    assert sizes["fp32"] == 4 * million and sizes["bf16"] == 2 * million
    assert sizes["fp16_scaled"] == 2 * million + 4 and sizes["fp8_e4m3"] == million + 4
    assert 2 * sizes["dynamic4_b128"] == million + 64 * 1024
    assert sizes["linear4_rank1"] == million // 2 + 4 * 2048


def test_refusals() -> None:
    with pytest.raises(UsageError, match="'int3' is unknown; use one of fp32"):
        choose("int3", (100, 100), True)
    with pytest.raises(AssertionError):
        Extent((10, 100), 900, 200)
    with pytest.raises(UsageError, match="elements 100 to 5100"):
        choose("linear4_b128", (100, 100), True).allocate(Extent((100, 100), 100, 5000))
