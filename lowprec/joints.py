"""What a backend with fused layers may join: modules of the model by name, one after the other in its forward.

The model's own forward stays as it is. A norm that has been joined hands its input on; what it did, the layer after it
does. Parameters keep their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NormLinear:
    """linear(norm(x)), where nothing else takes what the norm gives."""

    norm: str
    linear: str


@dataclass(frozen=True)
class NormMLP:
    """down(activation(up(norm(x)))): `mlp` is the module of the two linears, which are its children `up` and `down`.

    activation: swiglu (the gate's rows come first in `up`), gelu (tanh approximation) or srelu (squared ReLU)
    """

    norm: str
    mlp: str
    up: str
    down: str
    activation: Literal["swiglu", "gelu", "srelu"]

    @property
    def linears(self) -> tuple[str, str]:
        return f"{self.mlp}.{self.up}", f"{self.mlp}.{self.down}"


@dataclass(frozen=True)
class Core:
    """softmax(q k^T / sqrt(size)) v of the attention `module`, its attribute `core`; heads and groups: on this rank.

    core(q [B, heads, S, size], k and v [B, groups, S, size], mask or None for causal, dtype) -> as q
    """

    module: str
    heads: int
    groups: int
    size: int


Joint = NormLinear | NormMLP | Core
