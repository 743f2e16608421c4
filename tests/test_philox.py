"""Philox4x32-10 against published answers and a scalar oracle; numbering of the bits."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.philox import RandomKey, StepContext, philox, random_bits, random_signs

MASK = 0xFFFFFFFF


def oracle(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers."""
    c, (k0, k1) = list(counter), key
    for i in range(10):
        if i:
            k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
        high0, low0 = divmod(c[0] * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(c[2] * 0xCD9E8D57, 1 << 32)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
    return tuple(c)


def key_of(text: str) -> tuple[int, int]:
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return number & MASK, number >> 32


# Random123's kat_vectors, philox4x32 10 rounds
ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(int(word) for word in words) == expected == oracle(counter, key)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    step=st.integers(0, MASK),
    row=st.integers(0, 2**40),
    column=st.integers(0, 1000),
    bits=st.sampled_from([8, 32]),
)
def test_each_element_has_its_own_bits(seed, step, row, column, bits):
    key = RandomKey(seed=seed, tensor="layers.1.mlp.up", slot="wgrad.a", step=step, row=row, column=column)
    found = random_bits(key, 2, 19, bits)
    words = key_of(f"{seed}/layers.1.mlp.up/wgrad.a")
    for r in range(2):
        for c in (0, 1, 15, 16, 18):
            g, h = row + r, column + c
            if bits == 8:
                out = oracle((h // 16, g & MASK, g >> 32, step), words)
                expected = out[h % 16 // 4].to_bytes(4, "little")[h % 4]
            else:
                expected = oracle((h // 4, g & MASK, g >> 32, step), words)[h % 4]
            assert int(found[r, c]) == expected


@pytest.mark.parametrize("bits", [8, 32])
def test_a_slice_has_the_bits_of_its_place(bits):
    key = RandomKey(seed=3, tensor="w", slot="dgrad.a", step=5)
    whole = random_bits(key, 12, 100, bits)
    assert torch.equal(random_bits(replace(key, row=7), 5, 100, bits), whole[7:])
    assert torch.equal(random_bits(replace(key, column=37), 12, 50, bits), whole[:, 37:87])


def test_seed_tensor_slot_and_step_all_matter():
    key = RandomKey(seed=1, tensor="a", slot="dgrad.a", step=1)
    others = [replace(key, seed=2), replace(key, tensor="b"), replace(key, slot="wgrad.a"), replace(key, step=2)]
    mine = random_bits(key, 8, 64)
    for other in others:
        same = (random_bits(other, 8, 64) == mine).float().mean()
        assert same < 0.05  # 1 in 256 by chance
    assert torch.equal(random_bits(key, 8, 64), mine)


def test_bytes_are_uniform():
    counts = torch.bincount(random_bits(RandomKey(seed=11), 512, 512).flatten().long(), minlength=256).double()
    expected = 512 * 512 / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * (2 * 255) ** 0.5


def test_step_context_numbers_tokens_but_not_weights():
    context = StepContext(seed=9, step=4, row=4096)
    assert context.key("m", "dgrad.a") == RandomKey(seed=9, tensor="m", slot="dgrad.a", step=4, row=4096)
    assert context.key("m", "dgrad.b", tokens=False, column=8).row == 0


def test_signs():
    key = RandomKey(seed=5, tensor="m", slot="wgrad.a", step=3, row=64)
    run, call = random_signs(key, 128, fresh=False), random_signs(key, 128, fresh=True)
    assert run.abs().eq(1).all() and 32 < (run == 1).sum() < 96 and not torch.equal(run, call)
    other = replace(key, slot="wgrad.b", row=0)  # the other operand of the same GEMM
    assert torch.equal(random_signs(other, 128, fresh=True), call)
    assert torch.equal(random_signs(replace(other, tensor="n", step=9), 128, fresh=False), run)
    assert not torch.equal(random_signs(replace(key, step=4), 128, fresh=True), call)
    assert torch.equal(random_signs(key, 16, fresh=False), run[:16])
    word = oracle((0, 0, 0, 0), key_of("5//signs"))[0]
    assert run[:32].tolist() == [-1.0 if word >> j & 1 else 1.0 for j in range(32)]
