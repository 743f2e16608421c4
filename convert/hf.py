"""Names, layouts and config.json between this repository's model and Hugging Face's Llama and Qwen3: pure functions.

The same mathematics under other names. Only the fused matrices change shape: `qkv` rows are [K, G + 2, D] (key/value
heads; query heads of each, key, value; head size) against three matrices with query head number k G + g, and `gate_up`
is gate then up. The rotary layout (rotate-half) is the same, so nothing is permuted.

    embedding                 model.embed_tokens                     layers.i.attention_norm  .input_layernorm
    layers.i.attention.qkv    .self_attn.{q,k,v}_proj                layers.i.mlp_norm        .post_attention_layernorm
    layers.i.attention.out    .self_attn.o_proj                      layers.i.mlp.gate_up     .mlp.{gate,up}_proj
    layers.i.attention.q_norm .self_attn.q_norm (Qwen3; k_norm too)  layers.i.mlp.down        .mlp.down_proj
    norm, lm_head             model.norm, lm_head (absent if tied)

config.json carries the keys of transformers 4 (`rope_theta`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from errors import CheckpointError, UsageError
from model.config import ModelConfig

TORCH_NAMES = {"bf16": "bfloat16", "fp32": "float32"}

# What transformers assumes where an older config.json is silent, for the keys that we read.
_LLAMA_DEFAULTS: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_DEFAULTS,
    "mistral": _LLAMA_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": _LLAMA_DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128},
}


def _renames(config: ModelConfig) -> dict[str, str]:
    """Our name -> Hugging Face's, for every parameter that only changes its name."""
    kinds = ("weight", "bias") if config.bias else ("weight",)
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not config.tied_embeddings:
        names["lm_head.weight"] = "lm_head.weight"
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        names[f"{ours}.attention_norm.weight"] = f"{theirs}.input_layernorm.weight"
        names[f"{ours}.mlp_norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
        for kind in kinds:
            names[f"{ours}.attention.out.{kind}"] = f"{theirs}.self_attn.o_proj.{kind}"
            names[f"{ours}.mlp.down.{kind}"] = f"{theirs}.mlp.down_proj.{kind}"
        if config.qk_norm:
            names[f"{ours}.attention.q_norm.weight"] = f"{theirs}.self_attn.q_norm.weight"
            names[f"{ours}.attention.k_norm.weight"] = f"{theirs}.self_attn.k_norm.weight"
    return names


def _fused(config: ModelConfig) -> dict[str, list[str]]:
    """Our name of each fused parameter -> Hugging Face's names of its parts."""
    names = {}
    for i in range(config.num_layers):
        for kind in ("weight", "bias") if config.bias else ("weight",):
            names[f"layers.{i}.attention.qkv.{kind}"] = [f"model.layers.{i}.self_attn.{p}_proj.{kind}" for p in "qkv"]
            names[f"layers.{i}.mlp.gate_up.{kind}"] = [f"model.layers.{i}.mlp.{p}_proj.{kind}" for p in ("gate", "up")]
    return names


def _split(config: ModelConfig, fused: Tensor, parts: int) -> list[Tensor]:
    """Parts of a fused parameter [rows, ...]: three of qkv, two of gate_up."""
    if parts == 2:
        return list(fused.chunk(2))
    heads = fused.unflatten(0, (config.kv_heads, config.q_per_kv + 2, config.head_size))
    return [heads[:, :-2].flatten(0, 2), heads[:, -2].flatten(0, 1), heads[:, -1].flatten(0, 1)]


def _join(config: ModelConfig, parts: list[Tensor]) -> Tensor:
    """The inverse of `_split`."""
    if len(parts) == 2:
        return torch.cat(parts)
    heads = [part.unflatten(0, (config.kv_heads, -1, config.head_size)) for part in parts]
    return torch.cat(heads, dim=1).flatten(0, 2)


def _take(weights: dict[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise CheckpointError(f"the weights lack {name!r}: they are of another model than the configuration describes")
    return weights.pop(name)


def _refuse_rest(weights: dict[str, Tensor]) -> None:
    if weights:
        raise CheckpointError(f"the weights hold {len(weights)} unknown tensors, the first is {min(weights)!r}")


def to_hf_state(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our full parameters -> Hugging Face's, same dtypes; raises CheckpointError if the names do not match `config`."""
    rest = dict(weights)
    state = {theirs: _take(rest, ours) for ours, theirs in _renames(config).items()}
    for ours, parts in _fused(config).items():
        state.update(zip(parts, _split(config, _take(rest, ours), len(parts)), strict=True))
    _refuse_rest(rest)
    return state


def from_hf_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hf_state`. Ignored: old files' rotary tables, and the second copy of a tied embedding."""
    rest = {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tied_embeddings:
        rest.pop("lm_head.weight", None)
    weights = {ours: _take(rest, theirs) for ours, theirs in _renames(config).items()}
    for ours, parts in _fused(config).items():
        weights[ours] = _join(config, [_take(rest, part) for part in parts])
    _refuse_rest(rest)
    return weights


def hf_config(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """config.json of LlamaForCausalLM, or Qwen3ForCausalLM with QK-norm; raises UsageError if neither is the model."""
    if config.pattern is not None:
        raise UsageError(
            f"Hugging Face's Llama has no equivalent of model.pattern {config.pattern}; only models whose blocks are "
            "attention and FFN can be exported"
        )
    wanted = {"activation": "swiglu", "norm": "rmsnorm", "position": "rope"} | (
        {"bias": False} if config.qk_norm else {}
    )
    wrong = [
        f"model.{key}: {getattr(config, key)} (only {value})"
        for key, value in wanted.items()
        if getattr(config, key) != value
    ]
    if wrong:
        target = "Qwen3 (the one with qk_norm)" if config.qk_norm else "Llama"
        raise UsageError(f"Hugging Face's {target} has no equivalent of {'; '.join(wrong)}")
    family = "qwen3" if config.qk_norm else "llama"
    result = {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.bias,
        "attention_dropout": 0.0,
        "torch_dtype": TORCH_NAMES[config.dtype],
        "dtype": TORCH_NAMES[config.dtype],
        "use_cache": True,
    }
    if family == "llama":
        result |= {"mlp_bias": config.bias, "pretraining_tp": 1}
    else:
        result |= {"use_sliding_window": False, "sliding_window": None}
    return result


def _check_supported(hf: dict[str, Any], rope: dict[str, Any]) -> None:
    """Raise one UsageError that names every option of config.json that the model does not have."""
    family, wrong = hf["model_type"], []
    if hf["hidden_act"] != "silu":
        wrong.append(f"hidden_act {hf['hidden_act']!r} (only silu)")
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        wrong.append(f"rope type {kind!r} (only default)")
    if family == "mistral" and hf["sliding_window"] is not None or hf.get("use_sliding_window"):
        wrong.append("a sliding attention window")
    if family != "mistral" and bool(hf.get("attention_bias")) != bool(hf.get("mlp_bias")):
        wrong.append("bias in the attention or the MLP alone")
    if wrong:
        raise UsageError(f"cannot convert this {family} model: it has {', '.join(wrong)}")


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Our configuration of a Llama, Mistral or Qwen3 config.json (transformers 4 or 5).

    Raises UsageError for another model type or an option that the model does not have. A dtype other than bfloat16
    becomes fp32, which holds float16 exactly.
    """
    family = hf.get("model_type")
    if family not in _DEFAULTS:
        raise UsageError(f"model_type {family!r} of config.json is not one of {', '.join(_DEFAULTS)}")
    hf = _DEFAULTS[family] | hf
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    _check_supported(hf, rope)
    return ModelConfig(
        dtype="bf16" if (hf.get("dtype") or hf.get("torch_dtype")) == "bfloat16" else "fp32",
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads"),
        head_dim=hf.get("head_dim"),
        ffn_size=hf["intermediate_size"],
        norm_eps=hf["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta", hf["rope_theta"])),
        bias=bool(hf.get("attention_bias")),
        tied_embeddings=bool(hf.get("tie_word_embeddings")),
        qk_norm=family == "qwen3",
        init_std=hf.get("initializer_range", 0.02),
    )
