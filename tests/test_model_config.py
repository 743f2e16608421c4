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
from model.mamba import MambaConfig
from model.transformer import Transformer
from model.weights import logical_shape, parameter_shapes

CONFIG = ModelConfig(
    dtype="fp32", vocab_size=50, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40
)

MAMBA = MambaConfig(state=6, groups=2, head_dim=8, conv=3)


@settings(deadline=None, max_examples=40)
@given(
    kv_heads=st.sampled_from([None, 1, 2, 4]),
    head_dim=st.sampled_from([None, 8]),
    activation=st.sampled_from(["swiglu", "relu2", "gelu"]),
    norm=st.sampled_from(["rmsnorm", "layernorm"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    pattern=st.sampled_from([None, "M-", "M*", "MM"]),
)
def test_parameter_count(kv_heads, head_dim, activation, norm, flags, pattern):
    config = replace(
        CONFIG,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        activation=activation,
        norm=norm,
        bias=flags[0],
        tied_embeddings=flags[1],
        qk_norm=flags[2],
        pattern=pattern,
        mamba=MAMBA if pattern else MambaConfig(),
    )
    assert config.problems() == []
    with torch.device("meta"):
        model = Transformer(config)
    assert config.parameter_count() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pattern", [None, "M*M-"])
def test_flops_of_gemms(activation, tied, pattern):
    """torch counts the products of linears; attention is added by hand, as causal: half of 2 products of S x S x q, and
    scans by Megatron-LM's formula, thrice 7 x inner width x state.
    """
    hybrid = {"pattern": pattern, "num_layers": 4, "mamba": MAMBA} if pattern else {}
    config, batch, seq_len = replace(CONFIG, activation=activation, tied_embeddings=tied, **hybrid), 3, 10
    model = Transformer(config)
    initialize(model, 0)
    tokens = torch.randint(config.vocab_size, (batch, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    gemms = sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    kinds = "".join(config.blocks)
    attention = 3 * kinds.count("*") * 2 * (2 * seq_len * config.q_size) // 2
    scans = 3 * kinds.count("M") * 7 * 48 * 6
    assert config.flops_per_token(seq_len) * batch * seq_len == gemms + (attention + scans) * batch * seq_len
    assert sum(config.block_flops(seq_len)) == config.flops_per_token(seq_len) - 6 * 24 * 50


def test_flops_of_a_known_model():
    """Llama 3 8B at sequence length 8192: 6 N without the embedding's N, plus 6 L h S."""
    llama = ModelConfig(
        vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_size=14336
    )
    assert llama.parameter_count() == 8_030_261_248
    matrices = llama.parameter_count() - 128256 * 4096 - 65 * 4096
    assert llama.flops_per_token(8192) == 6 * matrices + 6 * 32 * 4096 * 8192


def test_parameters_of_the_hybrids_of_the_nvfp4_paper():
    """12B and 8B, arXiv:2509.25149, with a vocabulary of 131,072: their names say how many."""
    common = {"vocab_size": 131072, "head_dim": 128, "activation": "relu2", "position": "none"}
    large = ModelConfig(
        hidden_size=5120,
        num_layers=62,
        num_heads=40,
        num_kv_heads=8,
        ffn_size=20480,
        pattern="M-M-M-M*-" * 6 + "M-M-M-M-",
        **common,
    )
    small = ModelConfig(
        hidden_size=4096,
        num_layers=52,
        num_heads=32,
        num_kv_heads=4,
        ffn_size=21504,
        pattern="M-M-M-M-M-M*-" * 4,
        **common,
    )
    assert [large.pattern.count(kind) for kind in "*-M"] == [6, 28, 28] and not large.problems()
    assert [small.pattern.count(kind) for kind in "*-M"] == [4, 24, 24] and not small.problems()
    assert large.parameter_count() / 1e9 == pytest.approx(12.3, abs=0.05)
    assert small.parameter_count() / 1e9 == pytest.approx(8.1, abs=0.05)


HYBRID = {"pattern": "M-", "mamba": MAMBA}


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
        ({"pattern": "*E"}, "'E'; M is Mamba-2"),
        ({"pattern": "*--"}, "has 3 blocks, num_layers is 2"),
        ({"mamba": MAMBA}, "no block is M"),
        ({"pattern": "*-", "mamba": MAMBA}, "no block is M"),
        (HYBRID | {"mamba": replace(MAMBA, state=0)}, "mamba.state is 0"),
        (HYBRID | {"mamba": replace(MAMBA, head_dim=7)}, "mamba.head_dim 7 does not divide the inner width"),
        (HYBRID | {"mamba": replace(MAMBA, groups=4)}, "mamba.groups 4 does not divide the 6 heads"),
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
    config = replace(CONFIG, **HYBRID)
    shapes = {n: logical_shape(config, n, s) for n, s in parameter_shapes(config).items()}
    assert shapes["layers.0.mamba.in_proj.weight"] == (2, 24 + 24 + 6 + 6 + 3, 24)
    assert shapes["layers.0.mamba.conv.weight"] == (2, 24 + 6 + 6, 3)
    assert shapes["layers.0.mamba.conv.bias"] == (72,)
    assert shapes["layers.0.mamba.out_proj.weight"] == (24, 48)
