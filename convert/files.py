"""Hugging Face directories on disk: written whole or not at all, read with or without shards.

config.json  generation_config.json  model.safetensors | model-0000i-of-0000N.safetensors + its index
tokenizer.json  tokenizer_config.json  special_tokens_map.json  tokenizer.model (of a SentencePiece tokenizer)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.directory import new_directory, write_json
from convert.hf import hf_config, to_hf_state
from convert.tokenizer import write_tokenizer
from errors import CheckpointError
from model.config import ModelConfig
from model.norm import DTYPES

MAX_SHARD_BYTES = 5_000_000_000  # Hugging Face's customary limit of one file
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def _shards(state: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, cut so that no shard of more than one tensor exceeds `limit` bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def save_weights(directory: Path, state: dict[str, Tensor], limit: int = MAX_SHARD_BYTES) -> None:
    """Write `state` as one safetensors file, or several and their index where it exceeds `limit` bytes."""
    shards, weight_map = _shards(state, limit), {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: state[name].contiguous() for name in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def load_weights(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face directory; raises CheckpointError if there are no safetensors, or broken ones."""
    index = directory / INDEX
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [WEIGHTS]
        state: dict[str, Tensor] = {}
        for file in files:
            state |= load_file(directory / file)
        return state
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} has no safetensors weights: {error}") from None
    except Exception as error:  # safetensors and json have their own exceptions for a broken file
        raise CheckpointError(f"cannot read the weights in {directory}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Export:
    """How to write a directory.

    seq_len: positions that the model was trained on (max_position_embeddings).
    dtype: of the weights written. tokenizer: a SentencePiece .model or a tokenizer.json; none: no tokenizer files.
    """

    seq_len: int
    dtype: Literal["bf16", "fp32"] = "bf16"
    tokenizer: Path | None = None


def write_hf_directory(out: Path, config: ModelConfig, weights: dict[str, Tensor], export: Export) -> None:
    """Write `out`, which transformers loads: `weights` are our full parameters by name, of any floating dtype.

    Raises UsageError if the model has no equivalent there or `out` is in use, CheckpointError if the names do not fit.
    """
    settings = hf_config(replace(config, dtype=export.dtype), export.seq_len)
    dtype: torch.dtype = DTYPES[export.dtype]
    state = {name: tensor.to(dtype) for name, tensor in to_hf_state(config, weights).items()}
    with new_directory(out) as directory:
        ids = {} if export.tokenizer is None else write_tokenizer(directory, export.tokenizer, export.seq_len)
        write_json(directory / "config.json", settings | ids)
        write_json(directory / "generation_config.json", {"_from_model_config": True, **ids})
        save_weights(directory, state)
