"""A layout: degrees of parallelism over so many devices of so many a node, and which part of the model a rank has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.pipeline import stage_range, stages_of
from recipe import Recipe
from report.plan.partition import Parameter
from report.plan.units import Unit, Units
from run.local import stage_layers


@dataclass(frozen=True)
class Layout:
    """`recipe` has the layout's own degrees, ZeRO stage and recomputation, and is valid on `world` ranks.

    blocks: of each pipeline stage
    """

    recipe: Recipe
    world: int
    per_node: int
    blocks: tuple[range, ...]

    @property
    def tp(self) -> int:
        return self.recipe.parallel.tp

    @property
    def pp(self) -> int:
        return self.recipe.parallel.pp

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    @property
    def micro_batches(self) -> int:
        """A step, on every data-parallel rank."""
        train = self.recipe.train
        return train.global_batch // (train.micro_batch * self.dp)

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.train.global_batch * self.recipe.train.seq_len

    def describe(self) -> str:
        """ "tp 2 pp 4 (1f1b) dp 8, ZeRO 1, recompute full"."""
        words = [f"tp {self.tp}{' sp' if self.recipe.parallel.sp else ''}", f"pp {self.pp}"]
        words[1] += f" ({self.recipe.parallel.schedule})" if self.pp > 1 else ""
        head = " ".join([*words, f"dp {self.dp}"])
        return f"{head}, ZeRO {self.recipe.zero.stage}, recompute {self.recipe.model.recompute}"

    def overrides(self) -> str:
        """What a command line says to get this layout: "parallel.tp=2 ... zero.stage=1 model.recompute=full"."""
        own = self.recipe.parallel
        words = {"parallel.tp": self.tp, "parallel.sp": str(own.sp).lower(), "parallel.pp": self.pp}
        if self.pp > 1:
            words["parallel.schedule"] = own.schedule
        words |= {"zero.stage": self.recipe.zero.stage, "model.recompute": self.recipe.model.recompute}
        return " ".join(f"{key}={value}" for key, value in words.items())


def lay_out(recipe: Recipe, world: int, per_node: int) -> Layout:
    """The layout of a recipe that is valid on `world` ranks, `per_node` on each node."""
    counts = stage_layers(recipe)
    return Layout(recipe, world, per_node, tuple(stage_range(stage, counts) for stage in range(len(counts))))


def units_of(stage: int, layout: Layout, units: Units) -> list[Unit]:
    """The parts of a stage, in order."""
    first = [units.first] if stage == 0 else []
    last = [units.last] if stage == len(layout.blocks) - 1 else []
    return [*first, *(units.blocks[i] for i in layout.blocks[stage]), *last]


def parameters_of(pp_rank: int, layout: Layout, units: Units) -> list[Parameter]:
    """What the modules of a pipeline rank hold, in their order, each once."""
    found = dict.fromkeys(
        name for stage in stages_of(pp_rank, layout.recipe.parallel) for name in _names(stage, layout, units)
    )
    return [Parameter(name, units.held[name].shape, units.dims[name]) for name in found]


def _names(stage: int, layout: Layout, units: Units) -> Iterator[str]:
    tied, last = layout.recipe.model.tied_embeddings, stage == len(layout.blocks) - 1
    here = set(map(str, layout.blocks[stage]))
    for name in units.held:
        top, _, rest = name.partition(".")
        if top == "layers":
            wanted = rest.partition(".")[0] in here
        elif top == "embedding":
            wanted = stage == 0 or last and tied
        else:
            wanted = last
        if wanted:
            yield name
