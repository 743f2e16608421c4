"""A flat range of a tensor as rectangles: geometry only, no tensor is touched.

ZeRO cuts a parameter anywhere in its row-major order; torch.distributed.checkpoint stores boxes. A flat range
`[start, stop)` of a matrix with C columns is at most three boxes:

            +-------------+
            |      #######|   end of the first row    (absent if the range starts a row)
            |#############|   whole rows              (absent if there are none)
            |###          |   start of the last row   (absent if the range ends a row)
            +-------------+

A tensor of three or more dimensions is stored as the matrix [prod(shape[:-1]), shape[-1]]: a slice along any
leading dimension stays whole rows, a slice of the last dimension stays one rectangle. Vectors stay vectors,
a scalar is a vector of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rectangle:
    """A box of the stored tensor and where its elements lie in the flat range that it came from."""

    offsets: tuple[int, ...]  # first element of the box in the stored tensor
    sizes: tuple[int, ...]  # extent of the box, same number of dimensions
    start: int  # first element of the box, counted from the start of the flat range

    @property
    def stop(self) -> int:
        """One past the last element of the box, counted from the start of the flat range."""
        return self.start + math.prod(self.sizes)


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The one- or two-dimensional shape in which a tensor of `shape` is stored; same row-major order."""
    if len(shape) < 2:
        return (math.prod(shape),)
    return (math.prod(shape[:-1]), shape[-1])


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> list[Rectangle]:
    """Cover elements `[start, stop)` of a row-major tensor of `shape` by disjoint boxes of `stored_shape(shape)`.

    One box for vectors, at most three for matrices, in row-major order; none if the range is empty.
    Raises ValueError if the range leaves the tensor.
    """
    stored = stored_shape(shape)
    total = math.prod(stored)
    if not 0 <= start <= stop <= total:
        raise ValueError(f"elements [{start}, {stop}) are outside a tensor of shape {shape} ({total} elements)")
    if len(stored) == 1:
        return [Rectangle((start,), (stop - start,), 0)] if start < stop else []
    columns = stored[1]
    boxes: list[Rectangle] = []
    at = start
    while at < stop:
        row, column = divmod(at, columns)
        whole_rows = 0 if column else (stop - at) // columns
        sizes = (whole_rows, columns) if whole_rows else (1, min(columns - column, stop - at))
        boxes.append(Rectangle((row, column), sizes, at - start))
        at += math.prod(sizes)
    return boxes
