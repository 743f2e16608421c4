"""What a backend with fused layers may join: modules of the model by name, one after the other in its forward.

The model's own forward stays as it is. A norm that has been joined hands its input on; what it did, the layer after it
does. Parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


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


class Computes:
    """A layer of a backend that computes linears of ours itself; these say what is multiplied, and are not called.

    linears: name in the backend -> the linear
    norm:    parameters of the norm before them that it computes, too
    """

    linears: Mapping[str, Any]
    norm: tuple[nn.Parameter, ...] = ()

    @property
    def parts(self) -> tuple[Any, ...]:
        return tuple(self.linears.values())


class Passed(nn.Module):
    """A norm that the layer after it computes: holds the parameters under their names."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, parameter in norm.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x
