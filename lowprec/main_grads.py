"""Weight gradients that their GEMM adds to an FP32 buffer by itself: Transformer Engine's fuse_wgrad_accumulation.

The layer asks the weight for the buffer when its backward runs, adds to it, and hands autograd a dummy in the weight's
dtype; what would follow the gradient follows that (Megatron-LM's protocol, whose names the attributes below have). In a
split backward nothing is handed over; `LowPrecisionZero.accumulate` is called when the GEMM has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowprec.gradients import GradientStore


class MainGrads:
    """accumulator: of a parameter, where its GEMM may add to it: FP32, over the micro-batches of a step.

    Elsewhere every micro-batch has a buffer of zeros, which `take` hands on.
    """

    def __init__(self, accumulator: Callable[[Any], GradientStore] | None) -> None:
        self.accumulator = accumulator
        self._lent: set[int] = set()
        self._landed: dict[int, Tensor] = {}

    def lend(self, parameters: Iterable[Any], *, split: bool) -> None:
        """From now on the GEMMs of these weights add up their gradients. split: they run later than the backward."""
        for parameter in parameters:
            self._lent.add(id(parameter))
            vars(parameter)["__fsdp_param__"] = True  # ask me in each backward; main_grad would be asked for once
            parameter.get_main_grad = partial(self._buffer, parameter)
            if not split:
                parameter.grad_added_to_main_grad = False  # its presence asks for the dummy
                if self.accumulator is not None:
                    parameter.grad_dtype = parameter.dtype  # nothing else will be its gradient

    def __contains__(self, parameter: Any) -> bool:
        return id(parameter) in self._lent

    def _buffer(self, parameter: Any) -> Tensor:
        if self.accumulator is not None:
            return self.accumulator(parameter).lend(parameter)
        if id(parameter) not in self._landed:
            self._landed[id(parameter)] = torch.zeros_like(parameter, dtype=torch.float32)
        return self._landed[id(parameter)]

    def take(self, parameter: Any) -> Tensor | None:
        """The micro-batch's gradient, FP32, now the caller's; None where it is in the accumulator already."""
        vars(parameter).pop("main_grad", None)  # Transformer Engine's own reference, which would keep the buffer alive
        return self._landed.pop(id(parameter), None)
