"""Conversion to and from Hugging Face: transformers computes the same logits, and nothing changes on a round trip."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from convert import from_hf as from_hf_command
from convert import to_hf as to_hf_command
from convert.directory import new_directory
from convert.files import Export, load_weights, save_weights, write_hf_directory
from convert.hf import config_from_hf, from_hf_state, hf_config, to_hf_state
from errors import CheckpointError, UsageError
from model.config import ModelConfig
from model.init import initialize
from model.transformer import Transformer
from model.weights import load_initial_weights

transformers = pytest.importorskip("transformers")

CONFIG = ModelConfig(
    dtype="fp32",
    vocab_size=71,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=48,
    init_std=0.15,
    rope_theta=500.0,
    norm_eps=1e-6,
)
VARIANTS = {
    "gqa": {},
    "tied": {"tied_embeddings": True},
    "mha_bias": {"num_kv_heads": None, "bias": True},
    "mqa_wide_heads": {"num_kv_heads": 1, "head_dim": 16},
    "qwen3": {"qk_norm": True, "head_dim": 12},
}


def random_model(config: ModelConfig) -> Transformer:
    """Weights that hide no mistake: norms and biases random too."""
    model = Transformer(config)
    initialize(model, 5)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def state_of(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def some_tokens() -> torch.Tensor:
    return torch.randint(71, (2, 40), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logit_difference(model: Transformer, theirs: torch.nn.Module) -> float:
    ours, logits = model(some_tokens()), theirs(some_tokens()).logits
    assert logits.std() > 0.1  # not a comparison of zeros
    return (ours - logits).abs().max().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_written_directory_gives_the_same_logits_and_comes_back(variant, tmp_path):
    model = random_model(replace(CONFIG, **VARIANTS[variant]))
    write_hf_directory(tmp_path / "hf", model.config, state_of(model), Export(seq_len=64, dtype="fp32"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if variant == "qwen3" else "LlamaForCausalLM")
    assert theirs.config.max_position_embeddings == 64
    assert logit_difference(model, theirs) < 1e-5

    assert from_hf_command.main([str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    section = yaml.safe_load((tmp_path / "ours/model.yaml").read_text())["model"]
    config = ModelConfig(**section)
    assert config.init_from == str(tmp_path / "ours")
    weights = load_initial_weights(tmp_path / "ours", config)
    assert weights.keys() == state_of(model).keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in state_of(model).items())


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
def test_a_model_made_by_transformers_gives_the_same_logits_here(family, tmp_path):
    torch.manual_seed(3)
    extra = {"Llama": {"attention_bias": True, "mlp_bias": True}, "Mistral": {"sliding_window": None}, "Qwen3": {}}
    settings = getattr(transformers, f"{family}Config")(
        vocab_size=71,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        max_position_embeddings=64,
        **extra[family],
    )
    theirs = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    theirs.save_pretrained(tmp_path / "hf")
    assert from_hf_command.main([str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    config = ModelConfig(**yaml.safe_load((tmp_path / "ours/model.yaml").read_text())["model"])
    model = Transformer(config)
    model.load_state_dict(load_initial_weights(tmp_path / "ours", config))
    assert logit_difference(model, theirs) < 1e-5
    again = to_hf_state(config, state_of(model))
    original = theirs.state_dict()
    assert again.keys() == original.keys()
    assert all(torch.equal(again[name], original[name]) for name in again)


def test_bf16_export_and_import_keep_bits(tmp_path):
    model = random_model(replace(CONFIG, dtype="bf16"))
    write_hf_directory(tmp_path / "hf", model.config, state_of(model), Export(seq_len=64))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert config_from_hf(json.loads((tmp_path / "hf/config.json").read_text())).dtype == "bf16"
    back = from_hf_state(model.config, load_weights(tmp_path / "hf"))
    assert all(torch.equal(back[name], tensor) for name, tensor in state_of(model).items())


def test_shards(tmp_path):
    """Cut at a byte limit, with the index that transformers reads; the same tensors come back."""
    state = to_hf_state(CONFIG, state_of(random_model(CONFIG)))
    save_weights(tmp_path, state, limit=10_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert index["weight_map"].keys() == state.keys() and len(set(index["weight_map"].values())) > 2
    for file in set(index["weight_map"].values()):
        shard = load_file(tmp_path / file)
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= 10_000
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG, 64)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(theirs.state_dict()[name], tensor) for name, tensor in load_weights(tmp_path).items())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"norm": "layernorm", "activation": "relu2"}, "model.activation: relu2 .* model.norm: layernorm"),
        ({"position": "none"}, "Llama .* model.position"),
        ({"qk_norm": True, "bias": True}, "Qwen3 .* model.bias"),
        ({"pattern": "*-"}, r"no equivalent of model.pattern \*-"),
    ],
)
def test_models_without_an_equivalent_are_refused(change, word, tmp_path):
    config = replace(CONFIG, **change)
    with pytest.raises(UsageError, match=word):
        write_hf_directory(tmp_path / "hf", config, {}, Export(seq_len=8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "nemotron_h"}, "nemotron_h"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope type 'llama3'"),
        ({"mlp_bias": True}, "bias in the attention or the MLP alone"),
        ({"model_type": "mistral"}, "sliding"),
    ],
)
def test_options_that_the_model_lacks_are_refused(change, word):
    with pytest.raises(UsageError, match=word):
        config_from_hf(hf_config(CONFIG, 8) | change)


def test_config_of_transformers_4_and_5():
    both = hf_config(CONFIG, 8)
    old = {key: value for key, value in both.items() if key not in ("rope_parameters", "dtype")}
    new = {key: value for key, value in both.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    want = replace(CONFIG, head_dim=8, init="megatron")
    assert config_from_hf(old) == config_from_hf(new) == want


def test_wrong_names_are_refused():
    state = state_of(random_model(CONFIG))
    with pytest.raises(CheckpointError, match="layers.2"):
        to_hf_state(replace(CONFIG, num_layers=3), state)
    with pytest.raises(CheckpointError, match="unknown"):
        to_hf_state(replace(CONFIG, num_layers=1), state)


def test_output_directory_is_whole_or_absent(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    with pytest.raises(UsageError, match="not an empty directory"), new_directory(full):
        pass
    with pytest.raises(RuntimeError), new_directory(tmp_path / "out") as directory:
        (directory / "half").write_text("")
        raise RuntimeError
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty") as directory:
        (directory / "file").write_text("")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]
    assert (tmp_path / "empty/file").exists() and (full / "file").read_text() == "mine"


def test_commands_explain_bad_input(tmp_path, capsys):
    assert from_hf_command.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "not a Hugging Face model directory" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG, 8)))
    assert from_hf_command.main([str(tmp_path), str(tmp_path / "out")]) == 4
    assert "no safetensors" in capsys.readouterr().err
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert from_hf_command.main([str(tmp_path), str(tmp_path / "out")]) == 4
    assert to_hf_command.main([str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
