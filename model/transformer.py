"""The decoder-only transformer: embedding, blocks, final norm, output projection, loss; or a run of its blocks.

A part of the model (`blocks`, `first`, `last`) has the whole model's parameter names. It holds no buffers (rotary
angles are computed from the positions of each forward), so a model made on the meta device is complete after
`to_empty(device=...)` and `model.init.initialize(model, seed)`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

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


class Unembedding(nn.Module):
    """The output projection of tied embeddings: x [..., hidden] and the embedding [V, hidden] -> logits [..., V]."""

    def __init__(self, gemm_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.gemm_dtype = gemm_dtype

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, gemm_dtype=self.gemm_dtype)


class Transformer(nn.Module):
    """tokens -> logits, or the loss if labels are given. Parameters are uninitialised until `model.init.initialize`.

    gemm_dtype:  in which matrices are multiplied, if not in config.dtype (model/linear.py)
    blocks:      which blocks this part has; None: all
    first, last: whether it begins with the embedding of tokens (else with hidden states), and ends with logits. A last
                 part with tied embeddings has the embedding, too
    """

    def __init__(
        self,
        config: ModelConfig,
        z_loss: float = 0.0,
        gemm_dtype: torch.dtype | None = None,
        *,
        blocks: range | None = None,
        first: bool = True,
        last: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.first, self.last = config, first, last
        dtype = DTYPES[config.dtype]
        if first or last and config.tied_embeddings:
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        kinds = config.blocks
        self.layers = nn.ModuleDict(
            {str(i): Block(config, gemm_dtype, kinds[i]) for i in (range(len(kinds)) if blocks is None else blocks)}
        )
        # What wraps a block's second forward under full recomputation (lowprec/apply.py: where its tokens are).
        self.recompute_context: Callable[[], tuple[AbstractContextManager, AbstractContextManager]] = noop_context_fn
        if not last:
            return
        self.norm = make_norm(config)
        if config.tied_embeddings:
            self.unembedding = Unembedding(gemm_dtype)
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, gemm_dtype=gemm_dtype)
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
        document_ids: [B, S]; attention and recurrences stay within runs of equal ids; default one document.
        A part that is not the first takes hidden states [B, S, hidden]; one that is not the last returns them.
        """
        x = self.embedding(tokens) if self.first else tokens
        rope = self._rope(tokens, positions)
        mask = None if document_ids is None else document_mask(document_ids)
        for block in self.layers.values():
            if self.config.recompute == "full":
                options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": self.recompute_context}
                x = checkpoint(block, x, rope, mask, document_ids, **options)
            else:
                x = block(x, rope, mask, document_ids)
        if not self.last:
            return x
        x = self.norm(x)
        logits = self.unembedding(x, self.embedding.weight) if self.config.tied_embeddings else self.lm_head(x)
        return logits if labels is None else Loss(*self.cross_entropy(logits, labels))

    def _rope(self, tokens: Tensor, positions: Tensor | None) -> Tensor | None:
        if self.config.position == "none":
            return None
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        return rotary_table(positions, self.config.head_size, self.config.rope_theta)
