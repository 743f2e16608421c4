"""Which modules of a model come one after the other, for backends that have a fused layer for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lowprec.joints import Core, Joint, NormLinear, NormMLP
from model.transformer import Transformer

ACTIVATIONS: dict[str, Literal["swiglu", "gelu", "srelu"]] = {"swiglu": "swiglu", "gelu": "gelu", "relu2": "srelu"}


def joints(parts: Sequence[Transformer]) -> list[Joint]:
    """Of all blocks of `parts`, in their local shapes, and of the output projection."""
    return [joint for part in parts for joint in _of(part)]


def _of(part: Transformer) -> Iterator[Joint]:
    blocks: dict[str, Any] = dict(part.layers.items())
    for index, block in blocks.items():
        name, sublayers = f"layers.{index}", block.sublayers
        if "M" in sublayers:
            yield NormLinear(f"{name}.mamba_norm", f"{name}.mamba.in_proj")
        if "*" in sublayers:
            yield NormLinear(f"{name}.attention_norm", f"{name}.attention.qkv")
            yield _core(f"{name}.attention", block.attention)
        if "-" in sublayers:
            up = "gate_up" if part.config.activation == "swiglu" else "up"
            yield NormMLP(f"{name}.mlp_norm", f"{name}.mlp", up, "down", ACTIVATIONS[part.config.activation])
    if hasattr(part, "lm_head"):
        yield NormLinear("norm", "lm_head")


def _core(name: str, attention: Any) -> Core:
    groups = attention.qkv.out_features // ((attention.q_per_kv + 2) * attention.head_size)
    return Core(name, groups * attention.q_per_kv, groups, attention.head_size)
