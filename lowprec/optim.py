"""AdamW: its configuration, and an optimizer for use without ZeRO.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w)

Matrices decay; vectors (norm gains, biases) do not, as in Megatron-LM and GPT-3. What m, v and w are stored as, and how
w is rounded, is adamw.py's. `AdamW` here is an ordinary torch optimizer around it:

    optimizer = AdamW(model.named_parameters(), lr=3e-4, exp_avg="dynamic4_b128", exp_avg_sq="linear4_rank1")
    optimizer.scale(loss).backward()        # FP16 parameters: dynamic loss scaling; the others: loss itself
    optimizer.step()

Sources: Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101); loss scaling: Micikevicius
et al., "Mixed precision training" (arXiv 1710.03740).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from errors import UsageError
from lowprec.adamw import Hyper, Master, Rule, Tally, Update
from lowprec.codecs import Extent
from lowprec.philox import RandomKey


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and gradient clipping.

    lr:            peak learning rate; `schedule` shapes it over the run
    betas:         decay rates of the two moments
    eps:           added to the denominator
    weight_decay:  decoupled decay of matrices
    clip:          global gradient norm above which gradients are scaled down (0: never)
    exp_avg:       what the first moment is stored as: fp32, bf16, fp16_scaled, fp8_e4m3, fp8_e4m3_b256, dynamic8_b256,
                   dynamic4_b128, linear4_b128, linear4_rank1; all but fp32 also with _sr for stochastic rounding
    exp_avg_sq:    the second moment: the same, and factor (rows and columns alone)
    master:        what the updated weight is stored as: fp32, fp16_scaled, bf16, or none: the BF16 weight itself
    update:        how a BF16 weight is written: nearest, stochastic, kahan, collage_light, collage_plus
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    exp_avg: str = "fp32"
    exp_avg_sq: str = "fp32"
    master: Master = "fp32"
    update: Rule = "nearest"

    @property
    def storage(self) -> Update:
        return Update(exp_avg=self.exp_avg, exp_avg_sq=self.exp_avg_sq, master=self.master, update=self.update)

    def problems(self) -> list[str]:
        found = []
        if not self.lr > 0:
            found.append(f"lr is {self.lr}; it must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"betas is {list(self.betas)}; each must be in [0, 1)")
        for key in ("eps", "weight_decay", "clip"):
            if getattr(self, key) < 0:
                found.append(f"{key} is {getattr(self, key)}; it must not be negative")
        return found + self.storage.problems()


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scale: doubled after GROWTH good steps in a row, halved by one with Inf or NaN, which is skipped."""

    value: float = 2.0**16
    good: int = 0

    GROWTH = 2000

    def after(self, finite: bool) -> LossScale:
        """The scale of the next step."""
        if not finite:
            return LossScale(self.value / 2)
        if self.good + 1 == self.GROWTH:
            return LossScale(self.value * 2)
        return LossScale(self.value, self.good + 1)


class AdamW(torch.optim.Optimizer):
    """AdamW with states in low precision, as lowprec/adamw.py; each tensor is one whole fragment.

    params:        parameters, or (name, parameter): random bits belong to names (or to positions in the list)
    exp_avg, exp_avg_sq, master, update: as `OptimizerConfig`; a parameter that is what its master would be is its own
    clip:          global gradient norm above which gradients are scaled down; 0: never
    seed:          of stochastic rounding

    With clipping or FP16 parameters a step whose gradients are not finite is skipped (`skipped` tells); otherwise
    gradients must be finite. A state dict keeps every byte and dtype.
    """

    def __init__(  # noqa: PLR0913 (as torch's optimizers have them)
        self,
        params: Any,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        exp_avg: str = "fp32",
        exp_avg_sq: str = "fp32",
        master: Master = "fp32",
        update: Rule = "nearest",
        clip: float = 0.0,
        seed: int = 0,
    ):
        config = OptimizerConfig(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, clip=clip,
            exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, master=master, update=update,
        )  # fmt: skip
        if found := config.problems():
            raise UsageError("AdamW: " + "; ".join(found))
        self.storage, self.clip, self.seed = config.storage, clip, seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        everything = [p for group in self.param_groups for p in group["params"]]
        if strided := [i for i, p in enumerate(everything) if not p.is_contiguous()]:
            raise UsageError(f"AdamW: parameters {strided} are not contiguous; use parameter.contiguous()")
        self.loss_scale = LossScale() if any(p.dtype == torch.float16 for p in everything) else None
        self.skipped = False
        self.measure = False
        self.tally = Tally.nothing()

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return loss if self.loss_scale is None else loss * self.loss_scale.value

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step with the gradients at hand; `tally` then holds what it did if `measure` is set."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale = self._grad_scale()
        self.skipped = grad_scale is None
        if self.loss_scale is not None:
            self.loss_scale = self.loss_scale.after(not self.skipped)
        if grad_scale is None:
            return loss
        self.tally = Tally.nothing()
        position = 0
        for group in self.param_groups:
            names = group.get("param_names") or [str(position + i) for i in range(len(group["params"]))]
            position += len(names)
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.grad is not None:
                    self.tally += self._update(parameter, name, group, grad_scale)
        return loss

    def _grad_scale(self) -> float | None:
        """What gradients are multiplied by: unscaled first, then clipped; None if they are not finite."""
        unscale = 1.0 if self.loss_scale is None else 1.0 / self.loss_scale.value
        if not self.clip and self.loss_scale is None:
            return 1.0
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        norm = float(torch.linalg.vector_norm(torch.stack(norms))) * unscale if norms else 0.0
        if not norm < float("inf"):
            return None
        return unscale * (min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0)

    def _update(self, parameter: Tensor, name: str, group: dict[str, Any], grad_scale: float) -> Tally:
        extent = Extent.whole(tuple(parameter.shape))
        state = self.state[parameter]
        if not state:
            state.update(self._fresh(parameter, extent))
        state["step"] += 1
        hyper = Hyper(
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
            grad_scale=grad_scale,
        )
        assert parameter.grad is not None
        grad, working = parameter.grad.reshape(-1), parameter.detach().view(-1)
        if grad.dtype == torch.float16:
            grad = grad.float()
        tensors = {key: tensor for key, tensor in state.items() if key != "step"}
        tensors.setdefault("weight", working)
        key = RandomKey(seed=self.seed, tensor=name, step=hyper.step)
        if (sums := self.storage.sums(extent, grad, hyper)) is not None:
            self.storage.advance(extent, tensors, sums, hyper)
        statistics = self.storage.statistics(extent, tensors, grad, hyper)
        tally = self.storage.apply(extent, tensors, grad, hyper, statistics, key, self.measure)
        if "weight" in state:
            self.storage.write_working(tensors, working)
        return tally

    def _fresh(self, parameter: Tensor, extent: Extent) -> dict[str, Tensor]:
        """The states of a parameter before its first step; with the master if the parameter is not its own."""
        flat = parameter.detach().view(-1)
        state = {"step": torch.zeros((), dtype=torch.float32)} | self.storage.allocate(extent, flat)
        how = self.storage.weight_codec
        if how.parts(extent.shape)[""].dtype == flat.dtype and "weight.scale" not in state:
            return state
        master = how.allocate(extent, flat.device)
        how.encode(flat.float(), extent, master, how.statistics(flat.float(), extent), None)
        return state | {f"weight.{suffix}" if suffix else "weight": tensor for suffix, tensor in master.items()}

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the storage and the loss scale."""
        scale = self.loss_scale and [self.loss_scale.value, self.loss_scale.good]
        return super().state_dict() | {"storage": vars(self.storage).copy(), "loss_scale": scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, bit for bit; UsageError if that has other codecs."""
        if state_dict["storage"] != vars(self.storage):
            raise UsageError(f"the saved states are {state_dict['storage']}, this optimizer's are {vars(self.storage)}")
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        # torch has cast floating-point states to the dtypes of the parameters
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, parameter in zip(saved, ours, strict=True):
            if index in state_dict["state"]:
                states = state_dict["state"][index]
                self.state[parameter] = {
                    key: tensor.detach().to("cpu" if key == "step" else parameter.device, copy=True)
                    for key, tensor in states.items()
                }
        if (scale := state_dict["loss_scale"]) is not None:
            self.loss_scale = LossScale(*scale)
