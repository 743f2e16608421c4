"""`Fragment`: what a rank holds of one logical parameter, whatever engine cut it so.

Checkpoints, statistics, initial values and random bits speak of logical parameters: name, shape, offset. The buffers in
which DeepSpeed keeps them are known to lowprec/zero.py and lowprec/zero_optimizer.py alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lowprec.codecs import Extent


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of one logical parameter, with everything this rank holds for it.

    name:    the parameter's name in the plain model
    shape:   its logical shape
    offset:  first element of the run in the row-major flattened parameter
    tensors: kind -> 1-D view of live memory; "weight" is the master, then its optimizer states ("exp_avg",
             "exp_avg.codes", "exp_avg.scale", ...)
    per:     kind -> logical elements for each item of its tensor where that is not 1 (codecs.Part): 2 for bytes of two
             codes, a block's size for scales, 0 for a statistic of the whole tensor, which every holder has in full
    decay:   whether weight decay applies
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    tensors: dict[str, torch.Tensor]
    per: dict[str, int] = field(default_factory=dict)
    decay: bool = True

    @property
    def extent(self) -> Extent:
        """The run as codecs count it."""
        return Extent(self.shape, self.offset, self.tensors["weight"].numel())
