"""Memory of a rank under each layout, against one process: bytes of the tensors that it holds, and of activations.

Every layout trains the same model on the same global batch. Of the rank that holds most of each kind:

    NAME_weights_mib, NAME_optimizer_mib   working weights; masters, moments and the gradient accumulator
    NAME_activations_mib                   peak of what autograd keeps for the backward, each storage once
    NAME                                   the sum on the fullest rank, as a multiple of one process

    python -m bench.layouts [--recipe NAME] [section.key=value ...] [--json FILE|-]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import train
from bench.common import Figures, on_ranks, parser, report
from data.stream import Batch
from parallel.mesh import build_mesh
from recipe import Recipe, load
from run.local import Local, build_local, initial_weights

TP, PP = "parallel.tp=2", "parallel.pp=2"
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"alone": (), "recompute": ("model.recompute=full",)},
    2: {
        "zero1": ("zero.stage=1",),
        "zero2": ("zero.stage=2",),
        "zero3": ("zero.stage=3",),
        "tp2": (TP,),
        "tp2_sp": (TP, "parallel.sp=true"),
        "pp2_gpipe": (PP, "parallel.schedule=gpipe"),
        "pp2_1f1b": (PP, "parallel.schedule=1f1b"),
        "pp2_zbv": (PP, "parallel.schedule=zbv"),
    },
    4: {
        "tp2_pp2_sp": (TP, PP, "parallel.sp=true", "parallel.schedule=1f1b"),
        "tp2_zero1": (TP, "zero.stage=1"),
        "tp2_zero3": (TP, "zero.stage=3"),
    },
}


class Kept:
    """Bytes that autograd keeps alive: those of storages that are not parameters', and their peak."""

    def __init__(self, parameters: set[int]) -> None:
        self.parameters, self.holders = parameters, Counter[int]()
        self.bytes = self.peak = 0

    @dataclass
    class Holder:
        kept: Kept
        tensor: Tensor

        def __post_init__(self) -> None:
            self.kept.count(self.tensor, 1)

        def __del__(self) -> None:
            self.kept.count(self.tensor, -1)

    def count(self, tensor: Tensor, change: int) -> None:
        storage = tensor.untyped_storage()
        key, before = storage.data_ptr(), self.holders[storage.data_ptr()]
        if key in self.parameters:
            return
        self.holders[key] += change
        if before == 0 or before + change == 0:
            self.bytes += change * storage.nbytes()
            self.peak = max(self.peak, self.bytes)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: Kept.Holder(self, tensor), lambda holder: holder.tensor
        ):
            yield


def measure(rank: int, options: argparse.Namespace) -> Figures:
    figures: Figures = {}
    for name, layout in LAYOUTS[dist.get_world_size()].items():
        overrides = ("zero.stage=0", "train.compile=false", *layout, *options.overrides)
        for key, value in _measure(load(options.recipe, overrides, dist.get_world_size())).items():
            figures[f"{name}_{key}"] = value
    return figures


def _measure(recipe: Recipe) -> Figures:
    mesh, sizes = build_mesh(recipe.parallel), recipe.train
    local = build_local(recipe, mesh, torch.device("cpu"), torch.float32)
    local.engine.fill_weights(initial_weights(recipe))
    tokens = torch.randint(recipe.model.vocab_size, (sizes.global_batch // mesh.dp, sizes.seq_len + 1))
    batches = [Batch(rows[:, :-1], rows[:, 1:], None, None) for rows in tokens.split(sizes.micro_batch)]
    for step in range(2):  # the pipeline tries a stage out in its first step
        local.precision.begin_step(step)
        kept = Kept({p.untyped_storage().data_ptr() for part in local.parts for p in part.parameters()})
        with kept.watching():
            _forward_backward(local, sizes.micro_batch * sizes.seq_len, batches)
        local.engine.step(1e-4)
    held = local.engine.memory()
    mine = {
        "weights": held["weights"],
        "optimizer": sum(held.values()) - held["weights"],
        "activations": kept.peak,
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    figures: Figures = {f"{kind}_mib": max(each[kind] for each in everyone) / 2**20 for kind in mine}
    return figures | {"total_mib": max(sum(each.values()) for each in everyone) / 2**20}


def _forward_backward(local: Local, tokens: int, batches: list[Batch]) -> None:
    if local.pipeline is not None:
        local.pipeline.step((i * tokens, batch) for i, batch in enumerate(batches))
        return
    for i, batch in enumerate(batches):
        local.precision.at(i * tokens)
        local.engine.backward(local.engine(batch.tokens, batch.labels, None, None).loss)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--recipe", default="bf16_10m")
    made.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = made.parse_args()
    train.read_launch()  # sets what DeepSpeed insists on
    figures: Figures = {}
    for ranks in LAYOUTS:
        figures |= on_ranks(measure, ranks, 1, options)
    for name in (name for layouts in LAYOUTS.values() for name in layouts):
        figures[name] = float(figures[f"{name}_total_mib"]) / float(figures["alone_total_mib"])
    report(figures, options.json)


if __name__ == "__main__":
    main()
