"""What the checkpoint tests share: a small model's tensors, and its fragments for any number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lowprec.fragments import Shard
from parallel.checkpoint import load, newest, save

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.weight": (13, 8),
    "layers.0.attention.qkv.weight": (2, 3, 5, 7),
    "layers.0.mlp.gate_up.weight": (2, 11, 3),
    "norm.weight": (17,),
    "temperature": (),
}
KINDS = {"weight": torch.float32, "exp_avg": torch.bfloat16, "codes": torch.uint8}


@dataclass(frozen=True)
class Piece:
    """A fragment as an optimizer would hand it over."""

    name: str
    shape: tuple[int, ...]
    offset: int
    tensors: dict[str, Tensor]
    per: dict[str, int] = field(default_factory=dict)
    shard: Shard | None = None


def truth(seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, dict[str, Tensor]]:
    """Random full tensors: kind -> name -> tensor of logical shape."""
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: {name: (torch.randn(shape, generator=generator) * 50).abs().to(dtype) for name, shape in shapes.items()}
        for kind, dtype in KINDS.items()
    }


def pieces(
    rank: int,
    size: int,
    full: dict[str, dict[str, Tensor]] | None = None,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
) -> list[Piece]:
    """The fragments of `rank` when one flat buffer of all parameters is cut into `size` equal parts, as ZeRO does.

    Their tensors are copies from `full`, or all ones.
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    low, high = total * rank // size, total * (rank + 1) // size
    found, at = [], 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        start, stop = max(low - at, 0), min(high - at, count)
        at += count
        if start < stop:
            tensors = {
                kind: (full[kind][name].reshape(-1) if full else torch.ones(count, dtype=dtype))[start:stop].clone()
                for kind, dtype in KINDS.items()
            }
            found.append(Piece(name, shape, start, tensors))
    return found


def assert_equal(fragments: list[Piece], full: dict[str, dict[str, Tensor]]) -> None:
    """Every fragment holds exactly the elements of `full` that it stands for."""
    for piece in fragments:
        for kind, tensor in piece.tensors.items():
            wanted = full[kind][piece.name].reshape(-1)[piece.offset : piece.offset + tensor.numel()]
            assert torch.equal(tensor, wanted), f"{kind}/{piece.name}"


def save_alone(run_dir: Path, step: int, **options: int) -> Path:
    """Save the tensors of seed `step` from a single process."""
    return save(run_dir, step, pieces(0, 1, truth(step)), {"step": step}, **options)


def newest_step(run_dir: Path) -> int | None:
    """The step of the newest valid checkpoint, after loading it and comparing every element."""
    checkpoint = newest(run_dir)
    if checkpoint is None:
        return None
    fragments = pieces(0, 1)
    load(checkpoint, fragments)
    assert_equal(fragments, truth(checkpoint.step))
    return checkpoint.step
