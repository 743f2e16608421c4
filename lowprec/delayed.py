"""Delayed scaling: the FP8 scale of a tensor comes from the amaxes of the steps before (Transformer Engine).

    during a step   history[0] = max(history[0], amax of each micro-batch); the cast uses `scale`
    end of a step   amax   = max(history) or history[0] ("most_recent")
                    scale  = (max / 2^margin) / amax where 0 < amax < Inf, else unchanged; Inf becomes FLT_MAX
                    history rolls by -1, so that slot 0 goes to the end and slot 1 comes to the front; slot 0 becomes 0

The first step casts with scale 1. Slot 0 being open, the window is the last n steps. What is too large saturates.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from errors import UsageError
from lowprec.formats import QuantSpec
from lowprec.scales import FLT_MAX, divide, floor_power


class DelayedScale:
    """State of one tensor: `history` FP32 [amax_history], `scale` FP32 scalar (encode scale)."""

    def __init__(
        self,
        spec: QuantSpec,
        *,
        compute: Literal["max", "most_recent"] = "max",
        margin: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """spec needs amax_history > 0; `compute` picks the amax; `margin` leaves 2^margin of headroom."""
        if spec.amax_history < 1:
            raise UsageError("delayed scaling needs a spec with amax_history > 0, e.g. amax_history=1024")
        if compute not in ("max", "most_recent"):
            raise UsageError(f"compute is {compute!r}; use 'max' or 'most_recent'")
        self.spec, self.compute, self.margin = spec, compute, margin
        self.history = torch.zeros(spec.amax_history, device=device)
        self.scale = torch.ones((), device=device)

    def record(self, amax: Tensor) -> None:
        """Note a micro-batch's amax, FP32 scalar, already MAX-reduced over the ranks that share the tensor."""
        torch.maximum(self.history[0], amax.float(), out=self.history[0])

    def advance(self) -> None:
        """End the step: the next one casts with the new scale."""
        amax = self.history.amax() if self.compute == "max" else self.history[0]
        scale = divide(self.spec.format.max / 2.0**self.margin, amax).clamp(max=FLT_MAX)
        if self.spec.scale == "pow2":
            scale = floor_power(scale)
        self.scale.copy_(torch.where((amax > 0) & amax.isfinite(), scale, self.scale))
        self.history.copy_(self.history.roll(-1))
        self.history[0] = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Live tensors "history" and "scale"."""
        return {"history": self.history, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a saved state in; raises UsageError if the history has another length."""
        if state["history"].shape != self.history.shape:
            raise UsageError(
                f"the saved amax history has {state['history'].numel()} steps, this spec {self.history.numel()}; "
                "use the amax_history that it was trained with"
            )
        self.history.copy_(state["history"])
        self.scale.copy_(state["scale"])
