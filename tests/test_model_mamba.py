"""The Mamba-2 mixer against a loop over time in FP64 and other implementations; what surrounds it in a hybrid model."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.init import initial_range, initial_std, initialize
from model.mamba import Mamba, MambaConfig, run_numbers, scan
from model.transformer import Transformer
from run.local import compile_parts
from tests.layout_case import Case
from tests.spawn import run_ranks

SIZES = MambaConfig(state=5, groups=2, head_dim=4, conv=4, chunk=8)
CONFIG = ModelConfig(
    dtype="fp32", vocab_size=61, hidden_size=12, num_layers=4, num_heads=2, ffn_size=24, pattern="M*-M", mamba=SIZES
)


def recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, ids: Tensor | None) -> Tensor:
    """What `scan` computes, token by token."""
    state, found = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[-1]), []
    for t in range(x.shape[1]):
        if ids is not None and t:
            state = state * (ids[:, t] == ids[:, t - 1])[:, None, None, None, None]
        update = (dt[:, t, ..., None] * x[:, t])[..., None] * b[:, t, :, None, None]
        state = (dt[:, t] * a).exp()[..., None, None] * state + update
        found.append((state * c[:, t, :, None, None]).sum(-1))
    return torch.stack(found, 1)


def slow_mixer(weights: dict[str, Tensor], u: Tensor, ids: Tensor | None, sizes: MambaConfig) -> Tensor:
    """The whole mixer from its weights, one group, token and tap at a time."""
    n, width, groups = sizes.state, sizes.conv, sizes.groups
    heads = weights["D"].numel() // groups
    channels = heads * sizes.head_dim
    found = []
    for group in range(groups):
        rows = weights["in_proj.weight"].chunk(groups)[group]
        z, xbc, dt = (u @ rows.T).split((channels, channels + 2 * n, heads), -1)
        taps, bias = weights["conv.weight"].chunk(groups)[group], weights["conv.bias"].chunk(groups)[group]
        tokens = []
        for t in range(u.shape[1]):
            total = bias.expand(u.shape[0], -1)
            for back in range(min(width, t + 1)):
                same = 1.0 if ids is None else (run_numbers(ids)[:, t] == run_numbers(ids)[:, t - back])[:, None]
                total = total + taps[:, width - 1 - back] * xbc[:, t - back] * same
            tokens.append(total)
        x, b, c = F.silu(torch.stack(tokens, 1)).split((channels, n, n), -1)
        mine = slice(group * heads, (group + 1) * heads)
        x, dt = x.unflatten(-1, (1, heads, -1)), F.softplus(dt + weights["dt_bias"][mine])[:, :, None]
        a = -weights["A_log"][mine].exp()[None]
        y = recurrence(x, dt, a, b[:, :, None], c[:, :, None], ids) + weights["D"][mine][:, None] * x
        gated = y.flatten(2) * F.silu(z)
        root = (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        found.append(gated / root * weights["norm.weight"].chunk(groups)[group])
    return torch.cat(found, -1) @ weights["out_proj.weight"].T


def documents(length: int, among: int) -> Tensor:
    """Two rows of ids, in which an id may come back after another one."""
    generator = torch.Generator().manual_seed(length)
    return (torch.rand(2, length, generator=generator) < 0.15).cumsum(1) % among


def mixer(sizes: MambaConfig = SIZES, hidden: int = 12) -> Mamba:
    """A mixer whose parameters are all random and of a size that matters."""
    torch.manual_seed(0)
    made = Mamba(sizes, hidden, bias=False, norm_eps=1e-5, dtype=torch.float32, gemm_dtype=None, recompute=False)
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5, mean=1.0 if name in ("norm.weight", "D", "A_log") else 0.0)
    return made


def assert_near(got: Tensor, want: Tensor, what: object) -> None:
    """Within 1e-5 of the largest number of FP64's answer."""
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max(), what


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "chunk"), [(1, 8), (5, 128), (32, 8), (37, 8), (37, 16), (130, 64), (130, 128)])
def test_scan_is_the_recurrence(length, chunk, packed):
    torch.manual_seed(length)
    a = -torch.rand(2, 3) * 8 - 0.1
    inputs = [torch.randn(2, length, 2, 3, 4), torch.rand(2, length, 2, 3) / 2, a]
    inputs += [torch.randn(2, length, 2, 5), torch.randn(2, length, 2, 5)]
    ids = documents(length, 3) if packed else None
    low, exact = ([t.to(d).requires_grad_() for t in inputs] for d in (torch.float32, torch.float64))
    got = scan(*low, chunk, None if ids is None else run_numbers(ids))
    want = recurrence(*exact, ids)
    assert_near(got, want, "y")
    dy = torch.randn_like(got)
    pairs = zip(torch.autograd.grad(got, low, dy), torch.autograd.grad(want, exact, dy.double()), strict=True)
    for index, (mine, theirs) in enumerate(pairs):
        assert_near(mine, theirs, "x dt a b c".split()[index])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "chunk"), [(3, 8), (24, 8), (29, 8), (29, 5), (29, 64)])
def test_mixer_is_the_recurrence(length, chunk, packed):
    sizes = replace(SIZES, chunk=chunk)
    layer, ids = mixer(sizes), documents(length, 3) if packed else None
    u = torch.randn(2, length, 12, requires_grad=True)
    weights = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact = u.detach().double().requires_grad_()
    got, want = layer(u, ids), slow_mixer(weights, exact, ids, sizes)
    assert_near(got, want, "y")
    dy = torch.randn_like(got)
    got.backward(dy)
    want.backward(dy.double())
    assert u.grad is not None and exact.grad is not None
    assert_near(u.grad, exact.grad, "u")
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and (theirs := weights[name].grad) is not None
        assert_near(parameter.grad, theirs, name)


def test_a_border_of_documents_separates_two_sequences():
    """Also where the first document's id comes back: runs of equal ids are documents."""
    layer, u = mixer(), torch.randn(1, 29, 12)
    lengths = (9, 1, 13, 6)
    ids = torch.cat([torch.full((1, n), i % 2) for i, n in enumerate(lengths)], 1)
    parts = [layer(part, None) for part in u.split(lengths, 1)]
    torch.testing.assert_close(layer(u, ids), torch.cat(parts, 1), atol=1e-6, rtol=1e-5)


def grouped(weight: Tensor, sizes: tuple[int, ...], groups: int) -> Tensor:
    """Rows [groups, parts of a group] -> [parts, of all groups], as other implementations order them."""
    return torch.cat([part.flatten(0, 1) for part in weight.unflatten(0, (groups, -1)).split(sizes, 1)])


@torch.no_grad()
def test_mixer_equals_nemotron_h():
    """Hugging Face's port of the NVFP4 paper's kind of model, on shared weights."""
    theirs = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    settings: dict[str, Any] = {"hidden_size": 12, "mamba_num_heads": 6, "mamba_head_dim": 4, "n_groups": 2}
    settings |= {"ssm_state_size": 5, "conv_kernel": 4, "chunk_size": 8, "time_step_min": 0.0, "use_conv_bias": True}
    config = theirs.NemotronHConfig(hybrid_override_pattern="M", num_hidden_layers=1, **settings)
    other, ours = theirs.NemotronHMamba2Mixer(config, 0).eval(), mixer()
    sizes = ours.sizes
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    state = {name: weights[name] for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")}
    state["in_proj.weight"] = grouped(weights["in_proj.weight"], sizes, 2)
    state["conv1d.weight"] = grouped(weights["conv.weight"], sizes[1:4], 2)[:, None]
    state["conv1d.bias"] = grouped(weights["conv.bias"], sizes[1:4], 2)
    other.load_state_dict(state)
    u = torch.randn(2, 29, 12)
    torch.testing.assert_close(ours(u, None), other(u), atol=1e-5, rtol=1e-4)


def test_scan_equals_the_authors_listing():
    minimal = pytest.importorskip("mamba_ssm.modules.ssd_minimal", exc_type=ImportError)
    torch.manual_seed(0)
    x, dt, a = torch.randn(2, 32, 2, 3, 4), torch.rand(2, 32, 2, 3), -torch.rand(2, 3)
    b, c = torch.randn(2, 32, 2, 5), torch.randn(2, 32, 2, 5)
    per_head = [t.repeat_interleave(3, 2) for t in (b, c)]
    want, _ = minimal.ssd_minimal_discrete((x * dt[..., None]).flatten(2, 3), (dt * a).flatten(2), *per_head, 8)
    torch.testing.assert_close(scan(x, dt, a, b, c, 8).flatten(2, 3), want, atol=1e-5, rtol=1e-4)


def test_initial_values_are_those_of_the_mixer():
    """Bounds and means of 2^14 values; any part of them is a part of the whole."""
    n = 1 << 14
    values = {
        name: initial_range(CONFIG, 3, f"layers.0.mamba.{name}", (n,), 0, n)
        for name in ("A_log", "dt_bias", "conv.weight", "conv.bias", "D")
    }
    error = 5 / math.sqrt(12 * n)  # five standard errors of the mean of uniform numbers in (0, 1)
    a, dt = values["A_log"].exp(), F.softplus(values["dt_bias"])
    assert a.min() >= 1 and a.max() <= 16 and abs(a.mean() - 8.5) < 15 * error
    assert dt.min() > 0.99e-3 and dt.max() < 1.01e-1
    assert abs((dt.log().mean() - math.log(1e-2)) / math.log(100)) < error
    for name in ("conv.weight", "conv.bias"):
        assert values[name].abs().max() <= 0.5 and abs(values[name].mean()) < error and values[name].max() > 0.49
    assert not torch.equal(values["conv.weight"], values["conv.bias"]) and (values["D"] == 1).all()
    for name, whole in values.items():
        part = initial_range(CONFIG, 3, f"layers.0.mamba.{name}", (n,), 1000, 5000)
        assert torch.equal(part, whole[1000:5000]), name


def test_a_pattern_scales_residual_outputs_by_its_length():
    """Megatron-LM's rule for hybrids: a block feeds the residual stream once, not twice."""
    outputs = [f"layers.0.{name}.weight" for name in ("attention.out", "mlp.down", "mamba.out_proj")]
    assert {initial_std(CONFIG, name) for name in outputs} == {0.02 / 2}
    plain = replace(CONFIG, pattern=None, mamba=MambaConfig())
    assert {initial_std(plain, name) for name in outputs[:2]} == {0.02 / math.sqrt(8)}
    assert initial_std(CONFIG, "layers.0.mamba.in_proj.weight") == 0.02


def test_made_on_meta_it_is_complete():
    with torch.device("meta"):
        model = Transformer(replace(CONFIG, dtype="bf16"))
    assert not list(model.buffers())
    model.to_empty(device="cpu")
    initialize(model, 0)
    tokens = torch.arange(20)[None]
    loss = model(tokens, tokens).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_one_code_for_each_kind_of_block(monkeypatch):
    """Three kinds in eight blocks: three graphs, each within a limit of one compilation of its own."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = Transformer(replace(CONFIG, pattern="M-M*M-*M", num_layers=8))
    initialize(model, 0)
    tokens = torch.arange(12)[None]
    want = model(tokens)
    compile_parts([model])
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        torch.testing.assert_close(model(tokens), want)
    assert len(graphs) == 3


NVFP4 = (
    "model.dtype=bf16",
    "model.hidden_size=64",
    "model.num_layers=4",
    "model.pattern=M-M*",
    "model.mamba.state=16",
    "model.mamba.groups=2",
    "model.mamba.head_dim=8",
    "precision.policy=nvfp4",
    "precision.bf16_last=2",
    "optimizer.weight_decay=0.1",
)


def _precision(rank: int) -> tuple[dict[str, str], dict[str, int], dict[str, bool], float]:
    """Scheme of every linear, the receipt of two steps, whether each parameter decays, the loss."""
    case = Case(NVFP4)
    outcome = case.run(0, 2)
    case.local.precision.check_ran()
    schemes = {name: slots.scheme for name, slots in case.local.precision.tables[0][1].items()}
    decay = {fragment.name: fragment.decay for fragment in case.local.engine.fragments()}
    return schemes, case.local.precision.receipt(), decay, outcome.losses[-1]


def test_policies_reach_the_projections_and_decay_the_matrices():
    ((schemes, receipt, decay, loss),) = run_ranks(_precision, 1, timeout=300)
    projections = {f"layers.{i}.mamba.{name}": "nvfp4" if i == 0 else "bf16" for i in (0, 2) for name in PROJECTIONS}
    assert projections.items() <= schemes.items()
    assert schemes["layers.1.mlp.down"] == "nvfp4" and schemes["layers.3.attention.qkv"] == "bf16"
    # steps, micro-batches, linears of the first two blocks; each of the three GEMMs once
    assert sum(receipt.values()) == 3 * 2 * 8 * 4 and all("e2m1" in name for name in receipt)
    kept = {name.removeprefix("layers.0.mamba.") for name, on in decay.items() if not on and ".0.mamba." in name}
    assert kept == {"A_log", "D", "dt_bias", "conv.bias", "norm.weight"}  # Megatron-LM decays conv.weight, too
    assert math.isfinite(loss)


PROJECTIONS = ("in_proj", "out_proj")
