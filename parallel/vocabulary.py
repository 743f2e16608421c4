"""Embedding and cross-entropy over a vocabulary that is split over ranks: no rank ever has all logits of a token.

The cross-entropy needs three numbers a token of all ranks: the maximum, the sum of exponentials, and the label's logit,
which one rank has. Its backward needs none: softmax of the own logits, minus one at the label.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import communication as comm
from parallel.communication import Group


class VocabularyEmbedding(nn.Module):
    """tokens [B, S] -> [B, S, hidden], or with sp this rank's [B, S / n, hidden]; weight [V / n, hidden]."""

    def __init__(self, weight: nn.Parameter, rank: int, group: Group, *, sp: bool) -> None:
        super().__init__()
        self.weight, self.rank, self.group, self.sp = weight, rank, group, sp

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.rank * self.weight.shape[0]
        mine = (local >= 0) & (local < self.weight.shape[0])
        x = nn.functional.embedding(local.where(mine, 0), self.weight) * mine.unsqueeze(-1)
        add_up: Any = comm.scatter_sequence if self.sp else comm.reduce
        return add_up(x, self.group)


class VocabularyCrossEntropy(nn.Module):
    """model.loss.CrossEntropy from this rank's logits [B, S, V / n]; the same result on every rank."""

    def __init__(self, z_loss: float, rank: int, group: Group) -> None:
        super().__init__()
        self.z_loss, self.rank, self.group = z_loss, rank, group

    @torch.compiler.disable
    def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        first = self.rank * logits.shape[-1]
        log_z, label_logit = _Statistics.apply(logits.flatten(0, 1), labels.flatten() - first, self.group)
        cross_entropy = (log_z - label_logit).mean()
        loss = cross_entropy + self.z_loss * log_z.square().mean() if self.z_loss else cross_entropy
        return loss, cross_entropy


class _Statistics(torch.autograd.Function):
    """logits [T, V / n], labels [T] counted from this rank's first -> (logsumexp, label's logit), FP32 [T] each."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        wide = logits.float()
        largest = wide.amax(dim=-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        mine = (labels >= 0) & (labels < logits.shape[-1])
        index = labels.where(mine, 0).unsqueeze(-1)
        sums = torch.stack(
            (
                (wide - largest.unsqueeze(-1)).exp().sum(dim=-1),
                wide.gather(-1, index).squeeze(-1) * mine,
            )
        )
        dist.all_reduce(sums, group=group)
        log_z = largest + sums[0].log()
        ctx.save_for_backward(logits, log_z, index, mine)
        return log_z, sums[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, log_z, index, mine = ctx.saved_tensors
        of_log_z, of_label = gradients
        gradient = (logits.float() - log_z.unsqueeze(-1)).exp_().mul_(of_log_z.unsqueeze(-1))
        gradient.scatter_add_(-1, index, (of_label * mine).unsqueeze(-1))
        return gradient.to(logits.dtype), None, None
