"""Counts of ModelConfig against the built model and torch's own FLOP counter; refusals of invalid values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.init import initialize
from model.transformer import Transformer
from model.weights import logical_shape, parameter_shapes

CONFIG = ModelConfig(
    dtype="fp32", vocab_size=50, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40
)


@settings(deadline=None, max_examples=40)
@given(
    kv_heads=st.sampled_from([None, 1, 2, 4]),
    head_dim=st.sampled_from([None, 8]),
    activation=st.sampled_from(["swiglu", "relu2", "gelu"]),
    norm=st.sampled_from(["rmsnorm", "layernorm"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_parameter_count(kv_heads, head_dim, activation, norm, flags):
    config = replace(
        CONFIG,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        activation=activation,
        norm=norm,
        bias=flags[0],
        tied_embeddings=flags[1],
        qk_norm=flags[2],
    )
    assert config.problems() == []
    with torch.device("meta"):
        model = Transformer(config)
    assert config.parameter_count() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_gemms(activation, tied):
    """torch counts the matrix products; attention is added by hand, as causal: half of 2 products of S x S x q."""
    config, batch, seq_len = replace(CONFIG, activation=activation, tied_embeddings=tied), 3, 10
    model = Transformer(config)
    initialize(model, 0)
    tokens = torch.randint(config.vocab_size, (batch, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    gemms = sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    attention = 3 * config.num_layers * 2 * (2 * seq_len * config.q_size) // 2
    assert config.flops_per_token(seq_len) * batch * seq_len == gemms + attention * batch * seq_len


def test_flops_of_a_known_model():
    """Llama 3 8B at sequence length 8192: 6 N without the embedding's N, plus 6 L h S."""
    llama = ModelConfig(
        vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_size=14336
    )
    assert llama.parameter_count() == 8_030_261_248
    matrices = llama.parameter_count() - 128256 * 4096 - 65 * 4096
    assert llama.flops_per_token(8192) == 6 * matrices + 6 * 32 * 4096 * 8192


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_kv_heads": 3}, "divisible by num_kv_heads 3"),
        ({"head_dim": None, "num_heads": 5, "num_kv_heads": 5}, "set head_dim"),
        ({"head_dim": 7}, "odd"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"head_dim": None, "hidden_size": 3}, "set head_dim"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_problems(change, word):
    [message] = replace(CONFIG, **change).problems()
    assert word in message


def test_logical_shapes():
    config = replace(CONFIG, bias=True)
    shapes = {n: logical_shape(config, n, s) for n, s in parameter_shapes(config).items()}
    assert shapes["layers.1.attention.qkv.weight"] == (2, 4, 8, 24)
    assert shapes["layers.1.attention.qkv.bias"] == (64,)
    assert shapes["layers.0.mlp.gate_up.weight"] == (2, 40, 24)
    assert shapes["layers.0.mlp.gate_up.bias"] == (80,)
    assert shapes["layers.0.attention.out.weight"] == (24, 32)
