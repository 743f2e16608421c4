"""The two normalisations, by name; both compute in FP32 and round once to the parameter dtype.

rmsnorm: x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, arXiv:1910.07467).
layernorm: (x - mean) / sqrt(var + eps) * weight + bias (Ba et al., arXiv:1607.06450); the bias follows `config.bias`.
"""

from __future__ import annotations

import torch
from torch import nn

from model.config import ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def make_norm(config: ModelConfig) -> nn.Module:
    """The normalisation of the residual stream, over the last dimension [..., hidden]."""
    size, eps, dtype = config.hidden_size, config.norm_eps, DTYPES[config.dtype]
    if config.norm == "rmsnorm":
        return nn.RMSNorm(size, eps=eps, dtype=dtype)
    return nn.LayerNorm(size, eps=eps, bias=config.bias, dtype=dtype)
