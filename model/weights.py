"""Shapes of the parameters by name, and starting a run from given weights instead of from a seed.

A directory to start from holds `model.safetensors` with this repository's names; `python -m convert.from_hf` makes one.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from errors import CheckpointError
from model.config import ModelConfig
from model.transformer import Transformer

WEIGHTS = "model.safetensors"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape that the module holds, of every parameter of the unsharded model."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}


def logical_shape(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in which checkpoints and shardings speak of a parameter: fused rows as their own dimensions.

    The weight of qkv is [kv_heads, q_per_kv + 2, head_size, hidden], that of gate_up [2, ffn, hidden], those of Mamba's
    in_proj and conv begin with [groups]; same elements in the same order. A bias is a vector.
    """
    if name.endswith(".qkv.weight"):
        return (config.kv_heads, config.q_per_kv + 2, config.head_size, *shape[1:])
    if name.endswith(".gate_up.weight"):
        return (2, config.ffn_size, *shape[1:])
    if name.endswith((".in_proj.weight", ".conv.weight")):
        return (config.mamba.groups, shape[0] // config.mamba.groups, *shape[1:])
    return shape


def check_weights(config: ModelConfig, weights: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """`weights` in the module's shapes; raises CheckpointError if names or sizes are not those of `config`."""
    shapes = parameter_shapes(config)
    if wrong := sorted(shapes.keys() ^ weights.keys()):
        where = "lacks" if wrong[0] in shapes else "holds the unknown"
        raise CheckpointError(f"{source} {where} {wrong[0]!r} ({len(wrong)} names differ): it is of another model")
    for name, shape in shapes.items():
        if weights[name].numel() != math.prod(shape):
            raise CheckpointError(
                f"{source}: {name!r} has shape {list(weights[name].shape)}, the model needs {list(shape)}"
            )
    return {name: weights[name].reshape(shape) for name, shape in shapes.items()}


def load_initial_weights(directory: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Name -> full CPU tensor in the stored dtype, checked against `config`; raises CheckpointError."""
    path = directory / WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the initial weights {path}: {error}") from None
    return check_weights(config, weights, path)
