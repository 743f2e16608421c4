"""Initial values: any part is bit-equal to the same part of the whole, and they are what the scheme says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.init import BLOCK, initial_range, initial_values, initialize
from model.transformer import Transformer
from model.weights import load_initial_weights

CONFIG = ModelConfig(vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, ffn_size=48, bias=True)
UNIT = replace(CONFIG, init_std=1.0)
SHAPE = (300, 700)  # a little more than three blocks


@pytest.fixture(scope="module")
def whole() -> torch.Tensor:
    return initial_values(CONFIG, 7, "w", SHAPE)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    columns=st.tuples(st.integers(0, 700), st.integers(0, 700)),
)
def test_parts_equal_the_whole(whole, rows, columns):
    rows, columns = slice(*sorted(rows)), slice(*sorted(columns))
    assert torch.equal(initial_values(CONFIG, 7, "w", SHAPE, rows, columns), whole[rows, columns])


@settings(deadline=None, max_examples=25)
@given(ends=st.tuples(st.integers(0, 210000), st.integers(0, 210000)))
def test_flat_ranges_equal_the_whole(whole, ends):
    """A ZeRO partition: a range of the flattened parameter."""
    start, stop = sorted(ends)
    assert torch.equal(initial_range(CONFIG, 7, "w", SHAPE, start, stop), whole.flatten()[start:stop])


def test_values_are_fixed_by_definition():
    """The first pair, from the generator's first word by the documented formula, in Python's arithmetic."""
    import hashlib

    key = int.from_bytes(hashlib.sha256(b"7/w").digest()[:16], "little")
    word = int(np.random.Philox(key=key).random_raw())
    u, v = ((word & 0xFFFFFFFF) + 0.5) / 2**32, ((word >> 32) + 0.5) / 2**32
    pair = [math.sqrt(-2 * math.log(u)) * f(2 * math.pi * v) for f in (math.cos, math.sin)]
    values = initial_range(UNIT, 7, "w", SHAPE, 0, BLOCK)
    torch.testing.assert_close(values[[0, BLOCK // 2]], torch.tensor(pair), rtol=1e-6, atol=0)


def test_distribution():
    """Moments and quantiles of 2^20 values, within five standard errors; neighbours are uncorrelated."""
    n = 1 << 20
    z = initial_range(UNIT, 0, "z", (n,), 0, n).double()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    normal = torch.distributions.Normal(0.0, 1.0)
    for q in (0.001, 0.1, 0.5, 0.9, 0.999):
        share = (z < normal.icdf(torch.tensor(q, dtype=torch.float64))).double().mean()
        assert abs(share - q) < 5 * math.sqrt(q * (1 - q) / n)
    for lag in (1, BLOCK // 2, BLOCK):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(n - lag)


def test_seed_and_name_matter():
    first = initial_range(UNIT, 0, "a", (100,), 0, 100)
    for seed, name in ((1, "a"), (0, "b")):
        assert not torch.isclose(initial_range(UNIT, seed, name, (100,), 0, 100), first).any()


@pytest.mark.parametrize("init", ["normal", "megatron"])
def test_initialize_a_model_made_on_meta(init):
    config = replace(CONFIG, init=init, init_std=0.05, norm="layernorm")
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    initialize(model, 3)
    scale = 1 / math.sqrt(6) if init == "megatron" else 1.0
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        if p.ndim == 2:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            want = 0.05 * (scale if residual else 1.0)
            assert abs(p.float().std() / want - 1) < 5 / math.sqrt(p.numel()), name
            assert torch.equal(p, initial_values(config, 3, name, tuple(p.shape)).bfloat16())
        else:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
    tokens = torch.arange(8)[None]
    assert model(tokens).isfinite().all()


def test_initial_weights_of_another_model_are_refused(tmp_path):
    from safetensors.torch import save_file

    from errors import CheckpointError

    config = replace(CONFIG, dtype="fp32")
    model = Transformer(config)
    initialize(model, 0)
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "model.safetensors")
    loaded = load_initial_weights(tmp_path, config)
    assert all(torch.equal(loaded[n], p) for n, p in model.named_parameters())
    with pytest.raises(CheckpointError, match="layers.3"):
        load_initial_weights(tmp_path, replace(config, num_layers=4))
    with pytest.raises(CheckpointError, match="embedding.weight"):
        load_initial_weights(tmp_path, replace(config, vocab_size=65))
    with pytest.raises(CheckpointError, match="cannot read"):
        load_initial_weights(tmp_path / "absent", config)
