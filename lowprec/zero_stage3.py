"""Our ZeRO optimizer for stage 3: a subclass of DeepSpeed's, made by `zero.py`, which substitutes it by name.

DeepSpeed partitions weights, gathers them where they are used, and adds up and reduces gradients in FP32. Ours are the
masters in the recipe's format, or none, and who decides whether a step is applied. The update itself is
`PartitionedAdamW.step`, which DeepSpeed calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_Base: Any = object  # stands for DeepSpeed's class, of which this file knows only what it overrides


class LowPrecisionStage3(_Base):
    """What is ours of the optimizer: a mix-in before DeepSpeed's class.

    combined: DeepSpeed's norm of all groups from theirs; set by zero.py, as only that file imports DeepSpeed
    accept:   is asked for leave to update; refused, the gradients are dropped as after an overflow
    norm:     of the last step's gradients
    """

    combined: Callable[[list[Any]], Any]
    accept: Callable[[float], bool] | None = None
    norm = 0.0

    def _create_fp32_partitions(self) -> None:
        """Without a use for FP32 masters, a tensor of the shape and type of each stands for it, and takes no memory.

        The base class has made them all by then: for a moment of the start they are there.
        """
        super()._create_fp32_partitions()
        if self.optimizer.updater.update.master == "fp32":
            return
        for index, flat in enumerate(self.fp32_partitioned_groups_flat):
            stand_in = flat.new_zeros(1).expand(flat.shape)
            stand_in.ds_id, stand_in.requires_grad = flat.ds_id, True
            self.fp32_partitioned_groups_flat[index] = stand_in

    def _get_norm_groups(self) -> list[Any]:
        norms = super()._get_norm_groups()
        self.norm = float(self.combined(norms))
        refused = math.isfinite(self.norm) and self.accept is not None and not self.accept(self.norm)
        return [math.inf] if refused else norms

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        """Round this rank's masters into its working weights."""
        update = self.optimizer.updater.update
        if update.master == "fp32":
            super()._reassign_or_swap_out_partitioned_parameters(sub_group_id)
            return
        if update.master != "none":
            working = self.fp16_partitioned_groups_flat[sub_group_id]
            for fragment, here in self.optimizer.held[id(self.fp32_partitioned_groups_flat[sub_group_id])]:
                update.write_working(fragment.tensors, working[here])
        self._unflatten_partitioned_parameters(sub_group_id)
