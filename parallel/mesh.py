"""Degrees of parallelism -> a frozen Mesh of process groups, validated once and passed as an argument.

    world_size = tp x dp x pp        rank = tp_rank + tp (dp_rank + dp pp_rank), Megatron-LM's order

Ranks of one tensor-parallel group are neighbours, so that they share a node's fast links; pipeline stages, which talk
least, are farthest apart.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from errors import UsageError

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]
SINGLE = ("gpipe", "1f1b")  # one stage a rank; the others have several
V_SHAPED = ("zbv", "dualpipev")  # the first and the last stage are on the same rank
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")  # weight gradients are computed apart


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a layout must divide: of the model, of the batch (micro-batches a step of one data-parallel rank), ZeRO.

    mamba_groups: 0 without Mamba blocks
    """

    num_heads: int
    num_kv_heads: int
    ffn_size: int
    mamba_groups: int
    vocab_size: int
    num_layers: int
    seq_len: int
    micro_batches: int
    zero_stage: int


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out over ranks.

    ranks:           processes that the recipe is laid out for; a dry run's default, while a run takes any that divides
    tp:              tensor-parallel degree
    pp:              pipeline-parallel degree
    cp, ep:          context and expert parallelism: reserved, not built
    sp:              sequence parallelism: norms and residuals sharded along the sequence over the tp group
    sp_payload:      what activations travel in before a GEMM that would quantize them in the same way anyway: exact,
                     mxfp8_e4m3 or mxfp8_e5m2. The weight gradient's GEMM then sees them quantized twice
    schedule:        pipeline schedule
    stages_per_rank: pipeline stages of a rank; null: 1 for gpipe and 1f1b, else 2
    stage_layers:    blocks of each stage, in order; null: balanced by cost, embedding and output projection counted
    timeout_s:       seconds after which a collective that some rank never joined is an error
    """

    ranks: int | None = None
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    sp: bool = False
    sp_payload: Literal["exact", "mxfp8_e4m3", "mxfp8_e5m2"] = "exact"
    schedule: Schedule = "1f1b"
    stages_per_rank: int | None = None
    stage_layers: tuple[int, ...] | None = None
    timeout_s: int = 1800

    @property
    def stages(self) -> int:
        """Pipeline stages of the whole model."""
        if self.pp == 1:
            return 1
        return self.pp * (self.stages_per_rank or (1 if self.schedule in SINGLE else 2))

    def problems(self) -> list[str]:
        degrees = {key: getattr(self, key) for key in ("tp", "pp", "cp", "ep")}
        found = [f"{key} is {degree}; it must be at least 1" for key, degree in degrees.items() if degree < 1]
        found += [f"{key} is {degrees[key]}; only 1 is built so far" for key in ("cp", "ep") if degrees[key] > 1]
        if self.sp and self.tp == 1:
            found.append("sp is true with parallel.tp 1; sequence parallelism needs a tensor-parallel group")
        if self.sp_payload != "exact" and not self.sp:
            found.append(f"sp_payload is {self.sp_payload} with parallel.sp false; set sp, or drop it")
        if self.ranks is not None and self.ranks < 1:
            found.append(f"ranks is {self.ranks}; it must be at least 1, or null")
        if self.timeout_s < 1:
            found.append(f"timeout_s is {self.timeout_s}; it must be at least 1 second")
        return found or self._stage_problems()

    def _stage_problems(self) -> list[str]:
        found, each = [], self.stages_per_rank
        if self.pp == 1:
            unused = {"stages_per_rank": None, "stage_layers": None, "schedule": "1f1b"}
            return [
                f"{key} is {getattr(self, key)} with parallel.pp 1; set parallel.pp above 1, or drop it"
                for key, default in unused.items()
                if getattr(self, key) != default
            ]
        if each is not None:
            if each < 1:
                found.append(f"stages_per_rank is {each}; it must be at least 1")
            elif self.schedule in SINGLE and each != 1:
                found.append(f"stages_per_rank is {each}; schedule {self.schedule} has 1")
            elif self.schedule in V_SHAPED and each != 2:
                found.append(f"stages_per_rank is {each}; schedule {self.schedule} has 2")
            elif self.schedule not in SINGLE and each == 1:
                found.append(f"stages_per_rank is 1; schedule {self.schedule} interleaves at least 2, or use 1f1b")
        if not found and self.stage_layers is not None:
            if len(self.stage_layers) != self.stages:
                found.append(f"stage_layers names {len(self.stage_layers)} stages; there are {self.stages}")
            elif min(self.stage_layers) < 1:
                found.append(f"stage_layers is {list(self.stage_layers)}; every stage needs at least 1 block")
        return found

    def misfits(self, sizes: Sizes) -> list[str]:
        """Why a model and batch of these sizes cannot be laid out so; empty if they can."""
        return [*self._tensor_misfits(sizes), *(self._pipeline_misfits(sizes) if self.pp > 1 else [])]

    def _tensor_misfits(self, sizes: Sizes) -> list[str]:
        tp, kv_heads = self.tp, sizes.num_kv_heads
        split = {
            "model.num_heads": sizes.num_heads,
            "model.ffn_size": sizes.ffn_size,
            "model.mamba.groups": sizes.mamba_groups,
            "model.vocab_size": sizes.vocab_size,
            "train.seq_len": sizes.seq_len if self.sp else 0,
        }
        found = [f"{key} {size} is not divisible by parallel.tp {tp}" for key, size in split.items() if size % tp]
        if max(kv_heads, tp) % min(kv_heads, tp):
            found.append(f"model.num_kv_heads {kv_heads} and parallel.tp {tp}: neither divides the other")
        return found

    def _pipeline_misfits(self, sizes: Sizes) -> list[str]:
        found, blocks, batches = [], sizes.num_layers, sizes.micro_batches
        if sizes.zero_stage > 1:
            found.append(
                f"zero.stage {sizes.zero_stage} with parallel.pp {self.pp}: stage 2 would reduce every micro-batch, "
                "stage 3 gather every weight for each; use stage 0 or 1"
            )
        if self.stages > blocks:
            found.append(f"parallel.pp {self.pp} makes {self.stages} stages of {blocks} blocks; use fewer")
        elif self.stage_layers is not None and sum(self.stage_layers) != blocks:
            found.append(f"parallel.stage_layers has {sum(self.stage_layers)} blocks, the model {blocks}")
        least = {"gpipe": 1, "zbv": 2 * self.pp, "dualpipev": 2 * self.pp}.get(self.schedule, self.pp)
        steps = "micro-batches a step (train.global_batch / (train.micro_batch x data-parallel ranks))"
        if batches < least:
            found.append(
                f"parallel.schedule {self.schedule}, pp {self.pp}: {batches} {steps}; it needs at least {least}"
            )
        elif self.schedule.startswith("interleaved") and batches % self.pp:
            found.append(f"parallel.schedule {self.schedule}: {batches} {steps}; it needs a multiple of pp, {self.pp}")
        return found


@dataclass(frozen=True)
class Mesh:
    """This rank's place and groups. A group is None where the degree is one, or where it is the default group.

    timeout_s:  of every group's collectives
    tied_group: this rank and the one that holds the other copy of tied embeddings: the first and last pipeline ranks
    """

    rank: int = 0
    world_size: int = 1
    tp: int = 1
    pp: int = 1
    dp: int = 1
    timeout_s: int = 1800
    tp_group: dist.ProcessGroup | None = field(default=None, repr=False)
    pp_group: dist.ProcessGroup | None = field(default=None, repr=False)
    dp_group: dist.ProcessGroup | None = field(default=None, repr=False)
    model_group: dist.ProcessGroup | None = field(default=None, repr=False)
    stage_group: dist.ProcessGroup | None = field(default=None, repr=False)
    tied_group: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp % self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp * self.dp)

    @property
    def sharded(self) -> bool:
        """Whether a model is spread over several ranks."""
        return self.tp * self.pp > 1


def build_mesh(config: ParallelConfig, rank: int | None = None, world_size: int | None = None) -> Mesh:
    """The mesh of the initialised default process group. Collective over it.

    rank, world_size: of a mesh to look at, without groups, when no process group exists.
    """
    groups = rank is None
    rank = dist.get_rank() if rank is None else rank
    world_size = dist.get_world_size() if world_size is None else world_size
    tp, pp = config.tp, config.pp
    assert world_size % (tp * pp) == 0, "refused by the recipe"
    dp = world_size // (tp * pp)
    place = Mesh(rank, world_size, tp, pp, dp, config.timeout_s)
    if not groups or not place.sharded:
        return place

    def at(t: int, d: int, p: int) -> int:
        return t + tp * (d + dp * p)

    tps, dps, pps = range(tp), range(dp), range(pp)
    ends = (0, pp - 1)
    mine = functools.partial(_mine, config.timeout_s)
    return replace(
        place,
        tp_group=mine([at(t, d, p) for t in tps] for d in dps for p in pps),
        pp_group=mine([at(t, d, p) for p in pps] for t in tps for d in dps),
        dp_group=mine([at(t, d, p) for d in dps] for t in tps for p in pps),
        model_group=mine([at(t, d, p) for p in pps for t in tps] for d in dps),
        stage_group=mine([at(t, d, p) for d in dps for t in tps] for p in pps),
        tied_group=mine([at(t, d, p) for p in ends] for t in tps for d in dps) if pp > 1 else None,
    )


def _mine(timeout_s: int, members: Iterable[list[int]]) -> dist.ProcessGroup | None:
    """Make every group, in the same order on all ranks; return the one that this rank is in.

    torch gives a group its own default timeout, not that of the default group.
    """
    mine: Any = None
    for ranks in members:
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
        if dist.get_rank() in ranks:
            mine = group
    return mine


def node_groups(mesh: Mesh, node_size: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """(the data-parallel ranks on this rank's node, those with its place on every node), for two-level collectives.

    node_size: processes a node. Collective over the default group. Raises UsageError unless the data-parallel ranks
    are on several nodes, as many on each.
    """
    tp, dp = mesh.tp, mesh.dp
    inside, between = [], []
    for first in (t + tp * dp * p for p in range(mesh.pp) for t in range(tp)):
        nodes: dict[int, list[int]] = {}
        for member in range(first, first + tp * dp, tp):
            nodes.setdefault(member // node_size, []).append(member)
        if len(nodes) < 2 or len({len(members) for members in nodes.values()}) > 1:
            raise UsageError(
                f"gradients.two_level needs data-parallel ranks on several nodes, as many on each; these {dp} lie "
                f"{[len(members) for members in nodes.values()]} a node (of {node_size} processes); use false"
            )
        inside += nodes.values()
        between += [list(column) for column in zip(*nodes.values(), strict=True)]
    return _mine(mesh.timeout_s, inside), _mine(mesh.timeout_s, between)


class Mpu:
    """What DeepSpeed asks a Megatron-style `mpu` for. Its "model parallel" is everything but data parallelism.

    It must not have `initialize_sequence_parallel` or `get_sequence_parallel_*`: DeepSpeed would take them for Ulysses
    and drop the model-parallel group from its norms.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._mesh.dp_group

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._mesh.model_group

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp * self._mesh.pp

    def get_model_parallel_rank(self) -> int:
        return self._mesh.pp_rank * self._mesh.tp + self._mesh.tp_rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._mesh.tp_group

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.tp

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._mesh.pp
