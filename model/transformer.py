"""The decoder-only transformer: embedding, blocks, final norm, output projection, loss.

It holds no buffers (rotary angles are computed from the positions of each forward), so a model made on the meta device
is complete after `to_empty(device=...)` and `model.init.initialize(model, seed)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import rotary_table
from model.block import Block
from model.config import ModelConfig
from model.linear import Linear, linear
from model.loss import CrossEntropy, Loss
from model.norm import DTYPES, make_norm


def document_mask(document_ids: Tensor) -> Tensor:
    """document_ids [B, S] -> boolean [B, 1, S, S]: true where a query may see a key (same document, not later)."""
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]


class Transformer(nn.Module):
    """tokens -> logits, or the loss if labels are given. Parameters are uninitialised until `model.init.initialize`.

    gemm_dtype: in which matrices are multiplied, if not in config.dtype (model/linear.py)
    """

    def __init__(self, config: ModelConfig, z_loss: float = 0.0, gemm_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config, self.gemm_dtype = config, gemm_dtype
        dtype = DTYPES[config.dtype]
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(Block(config, gemm_dtype) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        self.lm_head = (
            None
            if config.tied_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, gemm_dtype=gemm_dtype)
        )
        self.cross_entropy = CrossEntropy(z_loss)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor | Loss:
        """Logits [B, S, V] in the model's dtype, or `Loss` if labels are given.

        tokens, labels: int64 [B, S]; labels are the tokens that follow. positions: [S] or [B, S], default 0..S-1.
        document_ids: [B, S]; attention stays within runs of equal ids; default one document.
        """
        x = self.embedding(tokens)
        rope = self._rope(tokens, positions)
        mask = None if document_ids is None else document_mask(document_ids)
        for block in self.layers:
            if self.config.recompute == "full":
                x = checkpoint(block, x, rope, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, mask)
        x = self.norm(x)
        if self.lm_head is None:
            logits = linear(x, self.embedding.weight, gemm_dtype=self.gemm_dtype)
        else:
            logits = self.lm_head(x)
        return logits if labels is None else self.cross_entropy(logits, labels)

    def _rope(self, tokens: Tensor, positions: Tensor | None) -> Tensor | None:
        if self.config.position == "none":
            return None
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        return rotary_table(positions, self.config.head_size, self.config.rope_theta)
