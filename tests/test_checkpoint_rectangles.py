"""A flat range becomes few, disjoint boxes that hold exactly its elements, in order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.rectangles import Rectangle, rectangles, stored_shape

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)


@st.composite
def _cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int]]:
    shape = draw(SHAPES)
    total = math.prod(shape)
    inner = draw(st.lists(st.integers(0, total), max_size=5))
    return shape, sorted([0, *inner, total])


@given(_cuts())
def test_ranges_tile_the_tensor(case: tuple[tuple[int, ...], list[int]]) -> None:
    shape, cuts = case
    owner = np.full(stored_shape(shape), -1)
    values = np.arange(math.prod(shape)).reshape(stored_shape(shape))
    for start, stop in zip(cuts, cuts[1:], strict=False):
        boxes = rectangles(shape, start, stop)
        assert len(boxes) <= (3 if len(shape) > 1 else 1)
        assert [box.start for box in boxes] == [0, *(box.stop for box in boxes)][: len(boxes)]
        for box in boxes:
            index = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            assert (owner[index] == -1).all(), "boxes overlap"
            owner[index] = start
            wanted = np.arange(start + box.start, start + box.stop)
            assert (values[index].ravel() == wanted).all(), "a box holds other elements"
    assert (owner >= 0).all(), "elements are not covered"


def test_worked_example() -> None:
    assert rectangles((5, 4), 2, 17) == [
        Rectangle((0, 2), (1, 2), 0),
        Rectangle((1, 0), (3, 4), 2),
        Rectangle((4, 0), (1, 1), 14),
    ]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 13)])
def test_range_outside_the_tensor(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 4\) \(12 elements\)"):
        rectangles((3, 4), start, stop)
