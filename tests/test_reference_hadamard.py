"""The random Hadamard rotation: worked values, orthogonality, and its place before quantization."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lowprec
from lowprec.hadamard import NVFP4_SIGNS, rotate, sign_vector
from lowprec.philox import RandomKey, random_signs

SIZES = [2, 4, 8, 16, 32, 64, 128]


def sylvester(size: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h


def test_sign_vector():
    assert sum(1 << i for i, sign in enumerate(NVFP4_SIGNS) if sign < 0) == 0xD7E8
    assert sign_vector(32, "fixed").tolist() == [*NVFP4_SIGNS, *NVFP4_SIGNS]
    assert sign_vector(4, "fixed").tolist() == [1, 1, 1, -1]
    assert sign_vector(8, "none").tolist() == [1] * 8
    key = RandomKey(seed=2, tensor="m", slot="wgrad.a", step=1)
    assert torch.equal(sign_vector(64, "run", key), random_signs(key, 64, fresh=False))
    assert torch.equal(sign_vector(64, "call", key), random_signs(key, 64, fresh=True))


def test_worked_values():
    signs = sign_vector(16, "fixed")
    e3 = torch.zeros(1, 16)
    e3[0, 3] = 1
    assert (rotate(e3, signs) * 4)[0].tolist() == [-1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1]
    count = torch.arange(1.0, 17)[None, :]
    expected = [-62, -30, 30, -2, 30, -2, -62, 34, 34, 66, 6, 6, 6, -10, 42, -70]
    assert (rotate(count, signs) * 4)[0].tolist() == expected


def test_worked_bf16_column():
    def bf16(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.bfloat16)

    x = bf16("06c0ee3f04c03540de3f8fbf0fbc0fc066c03d405fc02dc074bc943f34c03140")
    expected = bf16("273f4640c83f04c020c0d73f323ff7bd2bbfb0c0893f8f3f27c01ec0aa3f6ac0")
    assert torch.equal(rotate(x[:, None], sign_vector(16, "fixed"), 0)[:, 0], expected)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("size", SIZES)
def test_against_the_matrix(size, axis):
    rng = np.random.default_rng(size)
    x = rng.standard_normal((2 * size, 2 * size)).astype(np.float32)
    signs = np.sign(rng.standard_normal(size)).astype(np.float32)
    r = np.diag(signs) @ sylvester(size) / np.sqrt(size)
    np.testing.assert_allclose(r @ r.T, np.eye(size), atol=1e-14)
    big = np.kron(np.eye(2), r)
    exact = x @ big if axis == -1 else big.T @ x
    ours = rotate(torch.from_numpy(x), torch.from_numpy(signs), axis)
    np.testing.assert_allclose(ours, exact, atol=5e-6)
    back = rotate(ours, torch.from_numpy(signs), axis, inverse=True)
    np.testing.assert_allclose(back, x, atol=5e-6)
    assert rotate(torch.from_numpy(x).bfloat16(), torch.from_numpy(signs), axis).dtype == torch.bfloat16


@pytest.mark.parametrize("size", SIZES)
def test_a_product_does_not_change(size):
    """(A R)(B R)^T = A B^T, also when the reduction axis is ragged: both operands are padded alike."""
    rng = np.random.default_rng(size)
    tokens = 3 * size - 1
    dy, x = (torch.from_numpy(rng.integers(-8, 8, (tokens, n)).astype(np.float32)) for n in (5, 7))
    signs = sign_vector(size, "fixed")
    rotated = rotate(dy, signs, 0).T @ rotate(x, signs, 0)
    assert rotate(x, signs, 0).shape == (3 * size, 7)
    torch.testing.assert_close(rotated, dy.T @ x, rtol=1e-5, atol=1e-3)


def test_quantization_is_of_the_rotated_matrix():
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((50, 24)).astype(np.float32)).bfloat16()
    rotated = rotate(x, sign_vector(16, "fixed"), 0)
    assert rotated.shape == (64, 24)
    for name in ("nvfp4", "mxfp4", "fp8_e4m3"):
        q = lowprec.quantize(x, name, axis=0, hadamard=16)
        plain = lowprec.quantize(rotated, name, axis=0)
        assert q.shape == (50, 24) and torch.equal(q.codes, plain.codes) and torch.equal(q.scales, plain.scales)
        assert torch.equal(q.dequantize(), plain.dequantize())
        assert torch.equal(lowprec.fake_quantize(x, name, axis=0, hadamard=16, dtype=torch.float32), q.dequantize())


def test_signs_of_a_call_are_shared_by_both_operands():
    rng = np.random.default_rng(9)
    dy, x = (torch.from_numpy(rng.standard_normal((64, n)).astype(np.float32)) for n in (8, 8))
    outputs = []
    for step in (0, 1):
        context = lowprec.StepContext(seed=1, step=step)
        a, b = (
            lowprec.fake_quantize(
                t, "mxint8", axis=0, hadamard=32, signs="call", seed=context.key("m", slot), dtype=torch.float32
            )
            for t, slot in ((dy, "wgrad.a"), (x, "wgrad.b"))
        )
        torch.testing.assert_close(a.T @ b, dy.T @ x, rtol=0.05, atol=0.6)
        outputs.append(a)
    assert not torch.equal(*outputs)
