"""Train a small model under any layout on synthetic tokens, many layouts in one group of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.stream import Batch
from lowprec.engine import StepResult
from parallel.checkpoint import load, newest, save
from parallel.mesh import build_mesh
from recipe import Recipe, from_dict, override
from run.local import Local, build_local, initial_weights

BASE: dict[str, Any] = {
    "name": "layout",
    "device": "cpu",
    "model": {
        "dtype": "fp32",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 64,
        "init_std": 0.1,
    },
    "train": {"steps": 100, "global_batch": 16, "micro_batch": 2, "seq_len": 16, "compile": False},
    "optimizer": {"lr": 1e-3, "clip": 0.5},
}


class Outcome(NamedTuple):
    """What a few steps gave: losses, gradient norms, L2 norm of the masters afterwards."""

    losses: list[float]
    norms: list[float]
    parameter_norm: float


def recipe_of(overrides: tuple[str, ...], world_size: int) -> Recipe:
    tree = BASE
    for assignment in overrides:
        tree = override(tree, assignment)
    recipe = from_dict(tree, "layout case")
    problems = recipe.problems(world_size)
    assert not problems, problems
    return recipe


class Case:
    """A model under one layout, in the ranks of the default process group, which all belong to it."""

    def __init__(self, overrides: tuple[str, ...], *, fill: bool = True) -> None:
        self.recipe = recipe_of(overrides, dist.get_world_size())
        self.mesh = build_mesh(self.recipe.parallel)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[self.recipe.model.dtype]
        self.local: Local = build_local(self.recipe, self.mesh, torch.device("cpu"), dtype)
        if fill:
            self.local.engine.fill_weights(initial_weights(self.recipe))

    def batches(self, step: int) -> Iterator[tuple[int, Batch]]:
        train, mesh, vocabulary = self.recipe.train, self.mesh, self.recipe.model.vocab_size
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(vocabulary, (train.global_batch, train.seq_len + 1), generator=generator)
        tokens[:, 1::2] = tokens[:, 0:-1:2]  # something to learn
        for first in range(mesh.dp_rank * train.micro_batch, train.global_batch, mesh.dp * train.micro_batch):
            own = tokens[first : first + train.micro_batch]
            yield first * train.seq_len, Batch(own[:, :-1], own[:, 1:], None, None)

    def step(self, step: int) -> tuple[float, float]:
        """One optimizer step: (loss, gradient norm)."""
        losses = self.backward(step)
        update = self.local.engine.step(self.recipe.optimizer.lr)
        self.local.precision.end_step(self.mesh.stage_group)
        counted = losses and self.mesh.tp_rank == 0
        total = torch.stack(losses).double().mean() if counted else torch.zeros((), dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / self.mesh.dp, update.grad_norm

    def update(self, step: int, accept: Callable[[float], bool] | None = None) -> StepResult:
        """One optimizer step that is asked for leave, if it is finite."""
        self.backward(step)
        result = self.local.engine.step(self.recipe.optimizer.lr, accept)
        self.local.precision.end_step(self.mesh.stage_group)
        return result

    def backward(self, step: int) -> list[Tensor]:
        """Forward and backward of all micro-batches; their losses."""
        local, losses = self.local, []
        local.precision.begin_step(step)
        if local.pipeline is not None:
            losses = local.pipeline.step(self.batches(step))
        else:
            for row, batch in self.batches(step):
                local.precision.at(row)
                loss = local.engine(batch.tokens, batch.labels, batch.positions, batch.document_ids)
                local.engine.backward(loss.loss)
                losses.append(loss.cross_entropy.detach())
        return losses

    def run(self, first: int, count: int) -> Outcome:
        pairs = [self.step(step) for step in range(first, first + count)]
        losses, norms = (list(values) for values in zip(*pairs, strict=True))
        return Outcome(losses, norms, self.local.engine.parameter_norm())

    def save(self, folder: Path, step: int) -> None:
        engine = self.local.engine
        save(folder, step, engine.fragments(), {"updates": engine.updates}, own=engine.own_states())

    def load(self, folder: Path) -> int:
        """Continue from the newest checkpoint; returns its step."""
        start = newest(folder)
        assert start is not None
        own = load(start, self.local.engine.fragments())
        self.local.engine.updates = start.meta["updates"]
        self.local.engine.refresh_weights()
        self.local.engine.restore_own_states(own)
        return start.step

    def assert_copies_equal(self) -> None:
        """Rows of working weights that several ranks hold are the same bits on all of them. Collective."""
        if self.recipe.zero.stage == 3:
            return  # holds no whole weights
        mine: dict[tuple[str, int, int], bytes] = {}
        for part in self.local.parts:
            for name, parameter in part.named_parameters():
                shard = self.local.engine.updater.shards[name]
                rows = parameter.detach().float().reshape(-1, shard.columns[1])
                for run, piece in zip(shard.runs, rows.split([run.rows for run in shard.runs]), strict=True):
                    mine[name, run.start, shard.columns[0]] = piece.numpy().tobytes()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        for other in everyone:
            drifted = [key for key in mine.keys() & other.keys() if mine[key] != other[key]]
            assert not drifted, drifted


def train_cases(rank: int, cases: list[tuple[str, ...]], steps: int) -> list[Outcome]:
    """For `run_ranks`: the outcome of every case, one after the other; copies of weights have stayed equal."""
    found = []
    for overrides in cases:
        case = Case(overrides)
        found.append(case.run(0, steps))
        case.assert_copies_equal()
    return found
