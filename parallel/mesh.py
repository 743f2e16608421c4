"""Degrees of parallelism -> a frozen Mesh of process groups, validated once and passed as an argument.

    world_size = tp x pp x dp

Tensor (tp) and pipeline (pp) parallelism are keys of the recipe but not built yet: a degree above one is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out over ranks.

    tp:        tensor-parallel degree
    pp:        pipeline-parallel degree
    schedule:  pipeline schedule
    sp:        sequence parallelism: norms and residuals sharded along the sequence over the tp group
    timeout_s: seconds after which a collective that some rank never joined is an error
    """

    tp: int = 1
    pp: int = 1
    schedule: Literal["1f1b"] = "1f1b"
    sp: bool = False
    timeout_s: int = 1800

    def problems(self) -> list[str]:
        found = []
        for key in ("tp", "pp"):
            degree = getattr(self, key)
            if degree < 1:
                found.append(f"{key} is {degree}; it must be at least 1")
            elif degree > 1:
                found.append(f"{key} is {degree}; only 1 is built so far, set parallel.{key}=1")
        if self.sp and self.tp == 1:
            found.append("sp is true with parallel.tp 1; sequence parallelism needs a tensor-parallel group")
        if self.timeout_s < 1:
            found.append(f"timeout_s is {self.timeout_s}; it must be at least 1 second")
        return found


@dataclass(frozen=True)
class Mesh:
    """This rank's place. `dp_group` is None for the default group."""

    rank: int
    world_size: int
    dp: int
    dp_rank: int
    dp_group: dist.ProcessGroup | None = None


def build_mesh(config: ParallelConfig) -> Mesh:
    """The mesh of the initialised default process group."""
    assert config.tp == config.pp == 1, "refused by ParallelConfig.problems"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Mesh(rank=rank, world_size=world_size, dp=world_size, dp_rank=rank)
