"""Next-token cross-entropy with the z-loss, from BF16 or FP32 logits, in FP32.

    cross_entropy = mean(logsumexp(logits) - logits[label])
    loss = cross_entropy + z_loss * mean(logsumexp(logits)^2)        z-loss: PaLM, arXiv:2204.02311, section 5

Written with logsumexp and gather rather than `F.cross_entropy`: compiled, this keeps only the BF16 logits and one FP32
number a token for the backward. Forward and backward of [4096, 8192] BF16 logits with the z-loss on two CPU threads:
25 ms compiled, against 41 ms for compiled `F.cross_entropy`, 46 ms for an eager function chunked over tokens, and
88 ms for this one uncompiled.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Loss(NamedTuple):
    """FP32 scalars, means over tokens: what is minimised, and the cross-entropy alone."""

    loss: Tensor
    cross_entropy: Tensor


class CrossEntropy(nn.Module):
    """logits [B, S, V], labels [B, S] int64 -> Loss; a module so that it can be compiled or replaced by name."""

    def __init__(self, z_loss: float = 0.0) -> None:
        super().__init__()
        self.z_loss = z_loss

    def forward(self, logits: Tensor, labels: Tensor) -> Loss:
        logits = logits.flatten(0, 1).float()
        log_z = logits.logsumexp(dim=-1)
        cross_entropy = (log_z - logits.gather(-1, labels.reshape(-1, 1)).squeeze(-1)).mean()
        loss = cross_entropy + self.z_loss * log_z.square().mean() if self.z_loss else cross_entropy
        return Loss(loss, cross_entropy)
