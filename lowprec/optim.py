"""AdamW: its configuration, its parameter groups, its states.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w)

Matrices decay; vectors (norm gains, biases) do not, as in Megatron-LM and GPT-3. The update itself is
torch.optim.AdamW, fused, on the flat FP32 master partition that ZeRO owns.
Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and gradient clipping.

    lr:            peak learning rate; `schedule` shapes it over the run
    betas:         decay rates of the two moments
    eps:           added to the denominator
    weight_decay:  decoupled decay of matrices
    clip:          global gradient norm above which gradients are scaled down (0: never)
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def problems(self) -> list[str]:
        found = []
        if not self.lr > 0:
            found.append(f"lr is {self.lr}; it must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"betas is {list(self.betas)}; each must be in [0, 1)")
        for key in ("eps", "weight_decay", "clip"):
            if getattr(self, key) < 0:
                found.append(f"{key} is {getattr(self, key)}; it must not be negative")
        return found


def adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over two groups: parameters of two or more dimensions decay, the rest do not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def allocate_states(optimizer: torch.optim.AdamW, master: torch.Tensor) -> dict[str, torch.Tensor]:
    """Create the states of `master` now, as AdamW would at its first step, and return them.

    They then exist before the first step, so that a checkpoint can be loaded in place.
    """
    state = optimizer.state[master]
    state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
    state["exp_avg"] = torch.zeros_like(master, requires_grad=False)
    state["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)
    return state
