"""AdamW over the fragments that a rank holds: what `adamw.Update` does to one fragment, for all of them together.

Scales of whole tensors need maxima over every rank that holds a part, factored second moments need sums. All tensors'
statistics lie in one vector, in the order of the parameters' names, so that a step has at most two small collectives,
whatever the number of tensors: sums of the factors (SUM), then maxima (MAX). A rank that holds nothing of a tensor
gives zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lowprec.adamw import Hyper, Tally, Update
from lowprec.codecs import Extent
from lowprec.fragments import Fragment, Shard
from lowprec.optim import OptimizerConfig
from lowprec.philox import RandomKey

Gradient = Callable[[], Tensor]  # FP32 [count] of one fragment, decoded when it is needed


@dataclass
class Updater:
    """The optimizer of one rank. `updates` is AdamW's t: steps applied so far.

    shards: what the module here holds of every parameter, whether this rank updates a part of it or not
    device: of the states
    group:  ranks that hold parts of the same parameters; None: all held in full here
    seed:   of stochastic rounding
    norm:   tally the updates for their norm, also where there is nothing else to tally for
    """

    config: OptimizerConfig
    shards: Mapping[str, Shard]
    device: torch.device
    group: dist.ProcessGroup | None = None
    seed: int = 0
    norm: bool = False
    updates: int = 0

    def __post_init__(self) -> None:
        self.update: Update = self.config.storage
        self.measures = self.norm or self.update.measured

    def adopt(self, name: str, offset: int, weight: Tensor, working: Tensor, decay: bool) -> Fragment:
        """A fragment with fresh states.

        weight:  its master [count] if the engine holds one in FP32
        working: its working weights [count], from which another master is made
        """
        shard = self.shards[name]
        shape = shard.shape
        extent = Extent(shape, offset, working.numel())
        master = {"fp32": weight, "none": working}.get(self.update.master)
        if master is None:
            master = torch.zeros_like(working, dtype=torch.bfloat16 if self.update.master == "bf16" else torch.float16)
        states = self.update.allocate(extent, master)
        per = {kind: part.per for kind, part in self.update.parts(shape).items() if part.per != 1}
        return Fragment(name, shape, offset, {"weight": master} | states, per, decay, shard)

    @torch.no_grad()
    def step(self, fragments: Sequence[Fragment], gradients: Sequence[Gradient], lr: float, grad_scale: float) -> Tally:
        """Update `fragments` in place as step `updates` + 1. Collective over the group; gradients must be finite."""
        config = self.config
        hyper = Hyper(
            lr=lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            step=self.updates + 1,
            grad_scale=grad_scale,
        )
        hypers = [hyper if fragment.decay else replace(hyper, weight_decay=0.0) for fragment in fragments]
        jobs = list(zip(fragments, gradients, hypers, strict=True))
        sums = self._reduced(
            lambda: {f.name: self.update.sums(f.extent, grad(), h) for f, grad, h in jobs},
            self.update.sums_length,
            dist.ReduceOp.SUM,
            torch.float64,
        )
        for fragment, _, own in jobs:
            if fragment.name in sums:
                self.update.advance(fragment.extent, fragment.tensors, sums[fragment.name], own)
        statistics = self._reduced(
            lambda: {f.name: self.update.statistics(f.extent, f.tensors, grad(), h) for f, grad, h in jobs},
            self.update.statistics_length,
            dist.ReduceOp.MAX,
        )
        tally = Tally.nothing()
        for fragment, grad, own in jobs:
            found = self.update.apply(
                fragment.extent,
                fragment.tensors,
                grad(),
                own,
                statistics.get(fragment.name),
                self._key(fragment),
                measure=self.measures,
            )
            if any(fragment.owned()):
                tally += found
        return tally

    def _key(self, fragment: Fragment) -> RandomKey:
        """Of the random bits of this step's rounding, which follow the element's place in what the module holds."""
        shard, name = fragment.shard, fragment.name
        if shard is not None and shard.split:
            name = f"{name}[{shard.runs[0].start},{shard.columns[0]}]"
        return RandomKey(seed=self.seed, tensor=name, step=self.updates)

    @torch.no_grad()
    def set_weights(self, fragments: Sequence[Fragment], values: Callable[[Fragment], Tensor]) -> None:
        """Set every master to `values(fragment)` (FP32 [count], on any device). Collective over the group."""
        wanted = {fragment.name: values(fragment).to(self.device) for fragment in fragments}
        codec = self.update.weight_codec
        shared = self._reduced(
            lambda: {f.name: codec.statistics(wanted[f.name], f.extent) for f in fragments},
            lambda shape: int("scale" in codec.parts(shape)),
            dist.ReduceOp.MAX,
        )
        for fragment in fragments:
            self.update.set_weights(fragment.extent, fragment.tensors, wanted[fragment.name], shared.get(fragment.name))

    def _reduced(
        self,
        find: Callable[[], Mapping[str, Tensor | None]],
        length: Callable[[tuple[int, ...]], int],
        op: dist.ReduceOp.RedOpType,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """Each tensor's statistics, those of this rank from `find`, reduced over the ranks; {} if no tensor has any."""
        lengths = {name: length(shard.shape) for name, shard in sorted(self.shards.items())}
        if not any(lengths.values()):
            return {}
        mine = {name: tensor for name, tensor in find().items() if tensor is not None}
        if self.group is None:
            return mine
        whole = torch.zeros(sum(lengths.values()), dtype=dtype, device=self.device)
        places = dict(zip(lengths, whole.split(list(lengths.values())), strict=True))
        for name, tensor in mine.items():
            places[name].copy_(tensor)
        dist.all_reduce(whole, op=op, group=self.group)
        return {name: place for name, place in places.items() if len(place)}
