"""What an optimizer step is told, and what it tells: the numbers of a step, and a tally of how updates arrived.

Effective descent quality: EDQ = <D / |D|, D'>, D the intended change of all weights and D' the one that was applied;
|D| if nothing is lost. Imprecision: the share of elements that an update left as they were.
Source: Yu et al., "Collage" (arXiv 2405.03637).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.compensated import bf16_pair


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Numbers of one step. step: AdamW's t, from 1. grad_scale: multiplies the gradient first (clipping, unscaling)."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int
    grad_scale: float = 1.0

    @property
    def decay(self) -> float:
        return self.lr * self.weight_decay

    @property
    def step_size(self) -> float:
        return self.lr / (1.0 - self.betas[0] ** self.step)

    @property
    def root_correction(self) -> float:
        """1 / sqrt(1 - b2^t)."""
        return (1.0 - self.betas[1] ** self.step) ** -0.5

    @property
    def numbers(self) -> tuple[float, ...]:
        """Those that a step computes with, in the order of the fused kernel."""
        beta1, beta2 = self.betas
        return (
            *(self.grad_scale, 1.0 - beta1, beta2, 1.0 - beta2, -self.step_size, self.root_correction),
            *(self.eps, 1.0 - self.decay, self.decay, beta1, *bf16_pair(beta2)),
        )


@dataclass(frozen=True)
class Tally:
    """How well updates arrived; sums over elements, so that tallies of fragments and ranks add up.

    sums: float64 [4]: intended times applied change, squares of the intended one, updates that were lost (something was
          intended, nothing changed), elements. The applied change is that of the represented value: with Kahan's
          compensation and Collage's low part.
    """

    sums: Tensor

    @classmethod
    def nothing(cls) -> Tally:
        return cls(torch.zeros(4, dtype=torch.float64))

    @classmethod
    def of(cls, intended: Tensor, applied: Tensor) -> Tally:
        lost = ((applied == 0) & (intended != 0)).sum()
        wanted = intended.double()
        sums = (wanted.dot(applied.double()), wanted.dot(wanted), lost.double(), lost.new_tensor(len(wanted)).double())
        return cls(torch.stack(sums))

    def __add__(self, other: Tally) -> Tally:
        where = self.sums.device if other.sums.is_cpu else other.sums.device  # on a GPU, so that none waits for it
        return Tally(self.sums.to(where) + other.sums.to(where))

    @property
    def norm(self) -> float:
        """L2 norm of the intended change."""
        return float(self.sums[1].sqrt())

    @property
    def edq(self) -> float:
        """Effective descent quality over its ideal, the length of the intended step: 1 if nothing is lost (Collage)."""
        return float(self.sums[0] / self.sums[1]) if self.sums[1] > 0 else 1.0

    @property
    def lost(self) -> float:
        """Share of the elements whose update was lost."""
        return float(self.sums[2] / self.sums[3]) if self.sums[3] > 0 else 0.0
