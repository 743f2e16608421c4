"""One pre-norm block: the unit of compilation, of full recomputation and of a pipeline stage.

x = x + sublayer(norm(x)) for each of its sublayers: attention then FFN, or one alone in a hybrid model's pattern.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.config import ModelConfig
from model.mamba import Mamba
from model.mlp import make_mlp
from model.norm import DTYPES, make_norm


class Block(nn.Module):
    """x [B, S, hidden] -> [B, S, hidden]; free of graph breaks, so `block.compile()` gives one graph.

    sublayers: which it has, by the characters of `ModelConfig.pattern`
    """

    def __init__(self, config: ModelConfig, gemm_dtype: torch.dtype | None = None, sublayers: str = "*-") -> None:
        super().__init__()
        self.sublayers = sublayers
        if "M" in sublayers:
            self.mamba_norm = make_norm(config)
            self.mamba = Mamba(
                config.mamba,
                config.hidden_size,
                bias=config.bias,
                norm_eps=config.norm_eps,
                dtype=DTYPES[config.dtype],
                gemm_dtype=gemm_dtype,
                recompute=config.recompute == "selective",
            )
        if "*" in sublayers:
            self.attention_norm = make_norm(config)
            self.attention = Attention(config, gemm_dtype)
        if "-" in sublayers:
            self.mlp_norm = make_norm(config)
            self.mlp = make_mlp(config, gemm_dtype)

    def forward(
        self, x: Tensor, rope: Tensor | None, mask: Tensor | None, document_ids: Tensor | None = None
    ) -> Tensor:
        """rope and mask as in `Attention`, document_ids as in `Mamba`."""
        if "M" in self.sublayers:
            x = x + self.mamba(self.mamba_norm(x), document_ids)
        if "*" in self.sublayers:
            x = x + self.attention(self.attention_norm(x), rope, mask)
        if "-" in self.sublayers:
            x = x + self.mlp(self.mlp_norm(x))
        return x
