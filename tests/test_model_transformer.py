"""The transformer against independent computations: rotation, masking, loss, recomputation, compilation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention import rotary_table, rotate
from model.config import ModelConfig
from model.init import initialize
from model.linear import linear
from model.loss import CrossEntropy
from model.mamba import MambaConfig
from model.transformer import Transformer

CONFIG = ModelConfig(
    dtype="fp32", vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=48, init_std=0.2
)
VARIANTS = {
    "llama": {},
    "qk_norm": {"qk_norm": True},
    "gpt": {"activation": "gelu", "norm": "layernorm", "bias": True, "position": "none", "num_kv_heads": None},
    "relu2_tied": {"activation": "relu2", "tied_embeddings": True, "head_dim": 16},
    "hybrid": {
        "pattern": "M-M*M",
        "num_layers": 5,
        "mamba": MambaConfig(state=8, groups=2, head_dim=8, chunk=5),
        "position": "none",
    },
}


def build(seed: int = 0, z_loss: float = 0.0, **changes) -> Transformer:
    model = Transformer(replace(CONFIG, **changes), z_loss)
    initialize(model, seed)
    return model


def some_tokens(batch: int = 2, seq_len: int = 12) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(1))


def gradients(model: Transformer, tokens: torch.Tensor, **inputs) -> dict[str, torch.Tensor]:
    model(tokens, tokens.roll(-1, 1), **inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_rotation_is_complex_multiplication():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 100, 5, 5]])
    frequencies = 500.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    phase = torch.polar(torch.ones(2, 5, 4, dtype=torch.float64), positions[..., None] * frequencies)
    turned = torch.complex(x[..., :4], x[..., 4:]) * phase[:, :, None]
    want = torch.cat((turned.real, turned.imag), dim=-1)
    got = rotate(x.float(), rotary_table(positions, 8, 500.0))
    torch.testing.assert_close(got, want.float(), atol=2e-5, rtol=0)


def test_rotary_angles_are_rounded_once() -> None:
    """Numbers of Python's own library, rounded to FP32: no vector library decides the last bit."""
    positions, size, theta = torch.arange(0, 9000, 7), 8, 500.0
    got = rotary_table(positions, size, theta).squeeze(2)
    inverse = torch.tensor([1.0 / theta ** (i / size) for i in range(0, size, 2)], dtype=torch.float64).float()
    angles = positions[:, None].float() * inverse
    for part, function in zip(got, (math.cos, math.sin), strict=True):
        exact = torch.tensor([[function(a) for a in row] for row in angles.tolist()], dtype=torch.float64)
        assert torch.equal(part, exact.float())


def test_grouped_attention_is_plain_attention_with_repeated_heads():
    """The block's attention from its own weights, head by head, with an explicit softmax."""
    model = build(position="none")
    attention, x = model.layers["0"].attention, torch.randn(1, 6, 32)
    weight = attention.qkv.weight.view(2, 4, 8, 32)  # [K, G + 2, D, hidden]
    heads = []
    for head in range(4):
        group = head // 2
        q, k, v = (x[0] @ weight[group, row].T for row in (head % 2, 2, 3))
        scores = (q @ k.T / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    want = torch.cat(heads, -1) @ attention.out.weight.T
    torch.testing.assert_close(attention(x, None, None)[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_and_future_tokens_do_not_matter(variant):
    model, tokens = build(**VARIANTS[variant]), some_tokens()
    for name, grad in gradients(model, tokens).items():
        assert grad is not None and grad.abs().max() > 0, name
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % CONFIG.vocab_size
    logits, other = model(tokens), model(changed)
    torch.testing.assert_close(logits[:, :7], other[:, :7], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(logits[:, 7:], other[:, 7:])


@pytest.mark.parametrize("variant", ["llama", "gpt", "hybrid"])
def test_documents_are_independent(variant):
    model, tokens = build(**VARIANTS[variant]), some_tokens()
    ids = torch.tensor([[4] * 5 + [5] * 7, [0] * 1 + [1] * 8 + [2] * 3])
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((5, 7), (1, 8, 3))])
    packed = model(tokens, positions=positions, document_ids=ids)
    for row, lengths in enumerate(((5, 7), (1, 8, 3))):
        parts = [model(part[None])[0] for part in tokens[row].split(lengths)]
        torch.testing.assert_close(packed[row], torch.cat(parts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["llama", "hybrid"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("documents", [False, True])
def test_recomputation_changes_no_gradient(variant, recompute, documents):
    tokens = some_tokens()
    inputs = {"document_ids": torch.arange(12).div(5, rounding_mode="floor").expand(2, 12)} if documents else {}
    options = VARIANTS[variant]
    want = gradients(build(**options), tokens, **inputs)
    got = gradients(build(recompute=recompute, **options), tokens, **inputs)
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("variant", ["llama", "hybrid"])
def test_recomputation_saves_less(variant):
    """Bytes that autograd keeps between forward and backward, of a model whose blocks dominate."""

    def saved(recompute: str) -> int:
        model, kept = build(recompute=recompute, **VARIANTS[variant]), {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(some_tokens(4, 64), some_tokens(4, 64)).loss
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert loss.requires_grad  # the graph is alive, so no storage was used twice
        return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)

    none, selective, full = (saved(how) for how in ("none", "selective", "full"))
    assert full < 0.5 * none
    assert selective < none


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss(z_loss):
    logits = (torch.randn(3, 5, 17) * 3).bfloat16().requires_grad_()
    labels = torch.randint(17, (3, 5))
    loss, cross_entropy = CrossEntropy(z_loss)(logits, labels)
    exact = logits.detach().double().requires_grad_()
    want = F.cross_entropy(exact.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(cross_entropy.double(), want, atol=1e-6, rtol=1e-6)
    total = want + z_loss * exact.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(loss.double(), total, atol=1e-6, rtol=1e-6)
    assert loss.dtype == cross_entropy.dtype == torch.float32
    loss.backward()
    total.backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=2**-8)


def test_bf16_is_near_fp32():
    reference, model = build(), build(dtype="bf16")
    tokens = some_tokens()
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    loss, want = model(tokens, tokens).loss, reference(tokens, tokens).loss
    assert loss.dtype == torch.float32 and abs(loss - want) < 0.02 * want
    loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


def test_names_and_linears():
    """The names that checkpoints and precision rules use; every matrix but the embedding is a linear's."""
    names = dict(build(bias=True, norm="layernorm", qk_norm=True, num_layers=1).named_parameters())
    want = {"embedding.weight", "norm.weight", "norm.bias", "lm_head.weight"}
    for module in ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.gate_up", "mlp.down"):
        want |= {f"layers.0.{module}.weight", f"layers.0.{module}.bias"}
    want |= {"layers.0.attention.q_norm.weight", "layers.0.attention.k_norm.weight"}
    assert set(names) == want
    model = build(activation="relu2", tied_embeddings=True)
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    matrices = {n for n, p in model.named_parameters() if p.ndim == 2}
    assert matrices - linears == {"embedding.weight"} and "layers.0.mlp.up.weight" in linears
    assert not list(model.buffers())
    hybrid = build(**VARIANTS["hybrid"], bias=True)
    mine = {name.removeprefix("layers.2.") for name, _ in hybrid.named_parameters() if name.startswith("layers.2.")}
    linears = {f"mamba.{name}.{kind}" for name in ("in_proj", "out_proj") for kind in ("weight", "bias")}
    vectors = {"A_log", "D", "dt_bias", "norm.weight", "conv.weight", "conv.bias"}
    assert mine == {"mamba_norm.weight"} | linears | {f"mamba.{name}" for name in vectors}
    sublayers = [name for name, _ in hybrid.layers.named_children()]
    assert sublayers == list("01234") and {n for n, _ in hybrid.layers["3"].named_children()} == {
        "attention_norm",
        "attention",
    }


@pytest.mark.parametrize(
    ("variant", "recompute"),
    [("llama", "none"), ("llama", "selective"), ("llama", "full"), ("hybrid", "none"), ("hybrid", "selective")],
)
def test_compiled_blocks_have_one_graph_and_the_same_gradients(variant, recompute):
    torch._dynamo.reset()
    tokens, ids = some_tokens(), torch.arange(12).div(5, rounding_mode="floor").expand(2, 12)
    for inputs in ({}, {"document_ids": ids}):
        model = build(recompute=recompute, z_loss=1e-3, **VARIANTS[variant])
        for block in model.layers.values():
            block.compile(fullgraph=True)
        model.cross_entropy.compile(fullgraph=True)
        want = gradients(build(z_loss=1e-3, **VARIANTS[variant]), tokens, **inputs)
        for name, grad in gradients(model, tokens, **inputs).items():
            torch.testing.assert_close(grad, want[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_wide_linear_is_the_bf16_product_rounded_once(bias):
    """Against FP64 rounded to BF16: output and gradients within one BF16 ulp, each in its tensor's dtype."""
    torch.manual_seed(0)
    x, weight = torch.randn(24, 64).bfloat16().requires_grad_(), torch.randn(40, 64).bfloat16().requires_grad_()
    added = torch.randn(40).bfloat16().requires_grad_() if bias else None
    dy = torch.randn(24, 40).bfloat16()
    y = linear(x, weight, added, torch.float32)
    y.backward(dy)
    wide_x, wide_w, wide_dy = x.detach().double(), weight.detach().double(), dy.double()
    pairs = [
        (y, wide_x @ wide_w.T + (added.detach().double() if bias else 0)),
        (x.grad, wide_dy @ wide_w),
        (weight.grad, wide_dy.T @ wide_x),
    ]
    for found, exact in pairs:
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


def test_gemm_dtype_reaches_every_product():
    """With FP32 products of a BF16 model, no GEMM of forward and backward multiplies BF16 matrices."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if (
                function._schema.name in ("aten::mm", "aten::addmm", "aten::bmm")
                or "attention" in function._schema.name
            ):
                seen.extend(a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
            return function(*args, **(kwargs or {}))

    for tied in (False, True):
        config = replace(CONFIG, dtype="bf16", tied_embeddings=tied)
        model = Transformer(config, gemm_dtype=torch.float32)
        initialize(model, seed=0)
        tokens = torch.arange(32).view(2, 16) % config.vocab_size
        with Watch():
            model(tokens, tokens).loss.backward()
    assert seen and set(seen) == {torch.float32}
