"""The feed-forward network: up projection, activation, down projection.

swiglu: down(silu(gate) * up), one matrix `gate_up` with the gate's rows first (Shazeer, arXiv:2002.05202);
relu2: down(relu(up)^2) (So et al., arXiv:2109.08668); gelu: down(gelu_tanh(up)).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.linear import Linear
from model.norm import DTYPES


class GatedMLP(nn.Module):
    """SwiGLU: x [..., hidden] -> [..., hidden]."""

    def __init__(self, config: ModelConfig, gemm_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dtype = DTYPES[config.dtype]
        self.gate_up = Linear(config.hidden_size, config.up_size, bias=config.bias, dtype=dtype, gemm_dtype=gemm_dtype)
        self.down = Linear(config.ffn_size, config.hidden_size, bias=config.bias, dtype=dtype, gemm_dtype=gemm_dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MLP(nn.Module):
    """Squared ReLU or GELU: x [..., hidden] -> [..., hidden]."""

    def __init__(self, config: ModelConfig, gemm_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dtype = DTYPES[config.dtype]
        self.squared_relu = config.activation == "relu2"
        self.up = Linear(config.hidden_size, config.up_size, bias=config.bias, dtype=dtype, gemm_dtype=gemm_dtype)
        self.down = Linear(config.ffn_size, config.hidden_size, bias=config.bias, dtype=dtype, gemm_dtype=gemm_dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(F.relu(y).square() if self.squared_relu else F.gelu(y, approximate="tanh"))


def make_mlp(config: ModelConfig, gemm_dtype: torch.dtype | None = None) -> nn.Module:
    """The feed-forward network that `config.activation` names."""
    return (GatedMLP if config.activation == "swiglu" else MLP)(config, gemm_dtype)
