"""Learning-rate schedules: exact values at the corners, shape in between."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from run.schedules import lr_factor
from sections import ScheduleConfig


def _curve(steps: int = 100, **keys) -> list[float]:
    return [lr_factor(ScheduleConfig(**keys), step, steps) for step in range(steps)]


def test_wsd_is_flat_between_warmup_and_decay():
    curve = _curve(kind="wsd", warmup=10, decay=20, final=0.0)
    assert curve[:10] == [(i + 1) / 10 for i in range(10)]
    assert curve[10:80] == [1.0] * 70
    assert curve[80:] == pytest.approx([1 - (i + 1) / 20 for i in range(20)])


def test_cosine_has_the_closed_form_and_ends_at_final():
    curve = _curve(kind="cosine", warmup=0.1, final=0.1)
    assert curve[-1] == pytest.approx(0.1)
    assert curve[54] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2)


def test_linear_and_constant():
    assert _curve(kind="constant", warmup=0)[0] == _curve(kind="constant", warmup=0)[-1] == 1.0
    linear = _curve(kind="linear", warmup=0, final=0.5)
    assert linear == pytest.approx([1 - 0.5 * (i + 1) / 100 for i in range(100)])


@given(
    st.sampled_from(["linear", "cosine", "wsd", "constant"]),
    st.integers(1, 300),
    st.floats(0, 0.5),
    st.floats(0, 0.5, exclude_max=True),
    st.floats(0, 1),
)
def test_every_schedule_rises_once_then_never_rises(kind, steps, warmup, decay, final):
    curve = _curve(steps, kind=kind, warmup=warmup, decay=decay, final=final)
    top = round(warmup * steps)
    assert all(0 < value <= 1 or value == pytest.approx(final) for value in curve)
    assert curve[:top] == sorted(curve[:top])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(curve[top:], curve[top + 1 :], strict=False))
