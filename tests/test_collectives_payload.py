"""Payloads in one process: names, pieces, bytes, and the fused path against the plain one."""

from __future__ import annotations

import pytest
import torch

from errors import UsageError
from lowprec import dispatch, kernels, payload
from lowprec.collectives import next_mu, parse_payload, reduce_scatter, reduce_scatter_two_level
from lowprec.payload import PAYLOADS, Cast, cut, pack, unpack
from lowprec.philox import RandomKey

NAMES = tuple(PAYLOADS)
PIECES = ((0, 5), (2, 2049), (1, 20_000), (3, 1), (2, 1024))
COUNT = sum(length for _, length in PIECES)


def _cast(name: str, x: torch.Tensor, key: RandomKey | None = None) -> Cast:
    wanted = parse_payload(name)
    scales = payload.shared_scales(payload.piece_amaxes(x, PIECES, 4), wanted, 1.5) if wanted.shared else None
    return Cast(wanted, scales, key if wanted.spec else None)


def test_an_unknown_name_says_what_was_meant():
    with pytest.raises(UsageError, match="'mxfp8_e4m' is unknown; did you mean mxfp8_e4m3?.*fp8_lm"):
        parse_payload("mxfp8_e4m")
    with pytest.raises(UsageError, match="'zzz' is unknown; use one of fp32, bf16"):
        parse_payload("zzz")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_keys(name):
    assert parse_payload(name).name == name
    assert parse_payload(name) == PAYLOADS[name]


def test_cut_straddles_and_skips_empty_tensors():
    assert cut([4, 0, 3], [0, 3, 2, 0, 2]) == [((1, 3), (2, 1)), (), ((2, 1), (4, 2))]
    assert cut([2, 2], None) == [((0, 2),), ((0, 2),)]
    assert cut([0, 0], [0]) == [(), ()]
    with pytest.raises(AssertionError, match="segments hold 3 elements, parts 4"):
        cut([2, 2], [3])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_fused_and_plain_give_the_same_bytes(name, dtype, rounding, monkeypatch):
    if reason := kernels.unavailable_because():
        pytest.skip(reason)
    x = torch.randn(COUNT, generator=torch.Generator().manual_seed(1)).mul_(1e-3).to(dtype)
    key = RandomKey(seed=1, tensor="grad", step=4) if rounding == "stochastic" else None
    cast = _cast(name, x, key)
    fused = torch.cat(pack(x, PIECES, cast))
    values = torch.cat(list(unpack(fused, PIECES, cast)))
    if cast.payload.spec is not None:
        assert dispatch.path(cast.spec, -1, dtype, "cpu") == dispatch.FUSED
    monkeypatch.setattr(dispatch, "path", lambda *_: dispatch.PLAIN)
    plain = torch.cat(pack(x, PIECES, cast))
    assert torch.equal(fused, plain)
    assert fused.dtype == torch.uint8 and fused.numel() == cast.payload.message_bytes(PIECES)
    assert torch.equal(values.float(), torch.cat(list(unpack(plain, PIECES, cast))).float())
    assert values.shape == (COUNT,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e30, 3e38])
def test_the_ends_of_the_range_stay_finite_and_equal(name, scale, monkeypatch):
    # bf16 rounds what is above its largest number to Inf, as a cast does
    x = torch.linspace(-1, 1, COUNT).mul_(scale)
    cast = _cast(name, x)
    values = torch.cat(list(unpack(torch.cat(pack(x, PIECES, cast)), PIECES, cast)))
    monkeypatch.setattr(dispatch, "path", lambda *_: dispatch.PLAIN)
    plain = torch.cat(list(unpack(torch.cat(pack(x, PIECES, cast)), PIECES, cast)))
    assert torch.equal(values, plain) and values.isfinite().all()
    assert (values.float() - x).abs().max() <= max(0.6 * scale, 2e-38)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name):
    x = torch.zeros(COUNT)
    cast = _cast(name, x)
    assert not torch.cat(list(unpack(torch.cat(pack(x, PIECES, cast)), PIECES, cast))).any()


def test_a_message_may_start_anywhere():
    cast = Cast(parse_payload("int8_b128"))
    x = torch.randn(333)
    message = torch.cat(pack(x, ((0, 333),), cast))
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), message])[3:]
    for values, others in zip(unpack(message, ((0, 333),), cast), unpack(shifted, ((0, 333),), cast), strict=True):
        assert torch.equal(values, others)


def test_mu_halves_when_forced_and_doubles_in_a_thousand_clean_steps():
    assert next_mu(1.0, 2e-5) == 0.5
    assert next_mu(1.0, 1e-5) > 1.0
    mu = 1.0
    for _ in range(1000):
        mu = next_mu(mu, 0.0)
    assert mu == pytest.approx(2.0, rel=1e-12)


def test_options_that_a_payload_does_not_have_are_errors():
    x = torch.zeros(4)
    with pytest.raises(UsageError, match="mu is 2.0, but payload fp8_e4m3 has no automatic scaling"):
        reduce_scatter(x, [4], None, parse_payload("fp8_e4m3"), mu=2.0)
    with pytest.raises(UsageError, match="payload bf16 is rounded to nearest only"):
        reduce_scatter(x, [4], None, parse_payload("bf16"), rounding="stochastic", key=RandomKey(seed=0))
    with pytest.raises(UsageError, match="stochastic rounding needs a key"):
        reduce_scatter(x, [4], None, parse_payload("mxint8"), rounding="stochastic")
    with pytest.raises(UsageError, match="rounding is 'up'; use nearest or stochastic"):
        reduce_scatter(x, [4], None, parse_payload("mxint8"), rounding="up")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="payload inside a node is mxint8; use fp32 or bf16"):
        reduce_scatter_two_level(
            x, [4], parse_payload("mxint8"), inside=None, between=None, inside_payload=parse_payload("mxint8")
        )
