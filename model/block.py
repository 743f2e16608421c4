"""One pre-norm transformer block: the unit of compilation, of full recomputation and of a pipeline stage.

x = x + attention(attention_norm(x));  x = x + mlp(mlp_norm(x))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.config import ModelConfig
from model.mlp import make_mlp
from model.norm import make_norm


class Block(nn.Module):
    """x [B, S, hidden] -> [B, S, hidden]; free of graph breaks, so `block.compile()` gives one graph."""

    def __init__(self, config: ModelConfig, gemm_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, gemm_dtype)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config, gemm_dtype)

    def forward(self, x: Tensor, rope: Tensor | None, mask: Tensor | None) -> Tensor:
        """rope and mask as in `Attention`."""
        x = x + self.attention(self.attention_norm(x), rope, mask)
        return x + self.mlp(self.mlp_norm(x))
