"""Causal self-attention with grouped key/value heads and rotary positions.

Shapes: B batch, S sequence, K key/value heads, G query heads per key/value head, D head size; heads H = K G.
The fused projection's rows are [K, G + 2, D]: for each key/value head its query heads, then key, then value, so that
a tensor-parallel rank's part is a contiguous range of rows. Head counts are read from the projection's output, so the
module works unchanged on such a part.

Rotary embedding (Su et al., arXiv:2104.09864) in the rotate-half layout of Hugging Face's Llama: dimension j is paired
with j + D/2, rotated by position * theta^(-2j/D). Angles and rotation are FP32; the result is rounded once.

torch's SDPA gets the grouped heads as they are (`enable_gqa`): on CPU this keeps the flash kernel and is 0-7 %
faster than expanding the keys and values first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.linear import Linear
from model.norm import DTYPES


def rotary_table(positions: Tensor, head_size: int, theta: float) -> Tensor:
    """Cosines and sines of every angle: positions [..., S] -> FP32 [2, ..., S, 1, head_size / 2].

    Angles are FP32 numbers, as elsewhere; powers, cosines and sines are computed in FP64 and rounded once. In FP32 the
    first call of a process, with two threads beside other load, could give other last bits than later calls.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64, device=positions.device) / head_size
    angles = positions[..., None, None].float() * (1.0 / theta**exponents).float()
    return torch.stack((angles.double().cos(), angles.double().sin())).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate pairs (j, j + D/2) of x [B, S, heads, D] by the angles of `rotary_table`; same shape and dtype."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention_core(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gemm_dtype: torch.dtype | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v; q [B, H, S, D], k and v [B, K, S, D]; causal unless a boolean mask is given.

    gemm_dtype: of the products and the softmax, as in model/linear.py; None: that of q. The result has q's dtype.
    """
    wide = (x.to(gemm_dtype or x.dtype) for x in (q, k, v))
    y = F.scaled_dot_product_attention(*wide, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return y.to(q.dtype)


class Attention(nn.Module):
    """x [B, S, hidden] -> [B, S, hidden].

    core: what takes the arguments of `attention_core`; another library's may take its place
    """

    def __init__(self, config: ModelConfig, gemm_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dtype, size = DTYPES[config.dtype], config.head_size
        self.head_size, self.q_per_kv = size, config.q_per_kv
        self.recompute_core = config.recompute == "selective"
        self.gemm_dtype = gemm_dtype
        self.core: Callable[..., Tensor] = attention_core
        self.qkv = Linear(config.hidden_size, config.qkv_size, bias=config.bias, dtype=dtype, gemm_dtype=gemm_dtype)
        self.out = Linear(config.q_size, config.hidden_size, bias=config.bias, dtype=dtype, gemm_dtype=gemm_dtype)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(size, eps=config.norm_eps, dtype=dtype)
            self.k_norm = nn.RMSNorm(size, eps=config.norm_eps, dtype=dtype)

    def forward(self, x: Tensor, rope: Tensor | None, mask: Tensor | None) -> Tensor:
        """rope: of `rotary_table`, or none for no positions; mask: boolean [B, 1, S, S], or none for causal."""
        groups = self.qkv(x).unflatten(-1, (-1, self.q_per_kv + 2, self.head_size))  # [B, S, K, G + 2, D]
        q, k, v = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        core = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, self.gemm_dtype)
        if self.recompute_core:
            y = checkpoint(self.core, *core, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self.core(*core)
        return self.out(y.transpose(1, 2).flatten(2))
