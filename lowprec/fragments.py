"""`Fragment`: what a rank holds of one logical parameter, whatever engine cut it so; `Shard`: what its module holds.

Checkpoints, statistics, initial values and random bits speak of logical parameters: name, shape, offset. The buffers in
which DeepSpeed keeps them are known to lowprec/zero.py and lowprec/zero_optimizer.py alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from lowprec.codecs import Extent


@dataclass(frozen=True)
class Run:
    """Rows [start, start + rows) of a logical matrix. owned: other ranks that hold them too leave them out of sums."""

    start: int
    rows: int
    owned: bool = True


@dataclass(frozen=True)
class Shard:
    """The part of a logical parameter that tensor parallelism gives to one rank.

    A parameter is seen as the matrix [all dimensions but the last, the last]; a vector as [elements, 1].

    whole:   logical shape of the whole parameter
    shape:   logical shape of the part
    runs:    the part's rows, in its own order
    columns: (first, count) of its columns
    repeated: whether other ranks hold some of its rows, too (key/value heads, where there are fewer than ranks)
    """

    whole: tuple[int, ...]
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    columns: tuple[int, int]
    repeated: bool = False

    def __post_init__(self) -> None:
        assert sum(run.rows for run in self.runs) * self.columns[1] == math.prod(self.shape), self

    @classmethod
    def of_whole(cls, shape: tuple[int, ...], owned: bool = True) -> Shard:
        """The whole parameter; not owned: another rank counts it."""
        rows, columns = matrix_shape(shape)
        return cls(shape, shape, (Run(0, rows, owned),), (0, columns))

    def disowned(self) -> Shard:
        """The same part, which another rank owns."""
        return replace(self, runs=tuple(replace(run, owned=False) for run in self.runs))

    @property
    def split(self) -> bool:
        """Whether the rank lacks a part of the parameter."""
        return math.prod(self.shape) < math.prod(self.whole)

    def multiples_of(self, unit: int) -> bool:
        """Whether units of elements, counted along the flattened part, are whole units of the flattened parameter."""
        width = self.columns[1]
        if width < matrix_shape(self.whole)[1]:
            return all(number % unit == 0 for number in (*self.columns, matrix_shape(self.whole)[1]))
        borders = [run.start * width for run in self.runs] + [run.rows * width for run in self.runs[:-1]]
        last = self.runs[-1]
        end = (last.start + last.rows) * width
        return all(border % unit == 0 for border in borders) and (end % unit == 0 or end == math.prod(self.whole))

    def owned(self, offset: int, count: int) -> Iterator[slice]:
        """Ranges within elements [offset, offset + count) of the flattened part that this rank counts in sums."""
        at = 0
        for run in self.runs:
            size = run.rows * self.columns[1]
            low, high = max(offset, at), min(offset + count, at + size)
            if run.owned and low < high:
                yield slice(low - offset, high - offset)
            at += size


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a parameter seen as a matrix."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of one parameter as a rank holds it, with everything this rank holds for it.

    name:    the parameter's name in the plain model
    shape:   logical shape of what the rank's module holds: the parameter's, or that of `shard`
    offset:  first element of the run in the row-major flattened tensor of `shape`
    tensors: kind -> 1-D view of live memory; "weight" is the master, then its optimizer states ("exp_avg",
             "exp_avg.codes", "exp_avg.scale", ...)
    per:     kind -> logical elements for each item of its tensor where that is not 1 (codecs.Part): 2 for bytes of two
             codes, a block's size for scales, 0 for a statistic of the whole tensor, which every holder has in full
    decay:   whether weight decay applies
    shard:   what of the parameter the tensor of `shape` is; None: all of it, counted here
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    tensors: dict[str, torch.Tensor]
    per: dict[str, int] = field(default_factory=dict)
    decay: bool = True
    shard: Shard | None = None

    @property
    def extent(self) -> Extent:
        """The run as codecs count it."""
        return Extent(self.shape, self.offset, self.tensors["weight"].numel())

    def owned(self) -> Iterator[slice]:
        """The ranges of the run that sums over all ranks count here."""
        count = self.tensors["weight"].numel()
        if self.shard is None:
            yield slice(0, count)
        else:
            yield from self.shard.owned(self.offset, count)
