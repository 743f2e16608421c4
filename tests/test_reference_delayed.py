"""Delayed scaling: the worked trace, Transformer Engine's roll convention, and its state."""

from __future__ import annotations

import pytest
import torch

import lowprec
from errors import UsageError
from lowprec import DelayedScale


def spec(history: int, element: str = "e4m3", **options) -> lowprec.QuantSpec:
    return lowprec.resolve_spec(f"fp8_{element}", amax_history=history, **options)


def trace(state: DelayedScale, amaxes: list[float]) -> list[float]:
    used = []
    for amax in amaxes:
        used.append(float(state.scale))
        state.record(torch.tensor(amax))
        state.advance()
    return [*used, float(state.scale)]


def test_worked_trace():
    assert trace(DelayedScale(spec(4)), [3.5, 7, 1, 1, 1, 1]) == [1, 128, 64, 64, 64, 64, 448]


def test_scale_follows_the_last_steps_exactly():
    """Against a plain list: the scale after a step comes from the largest of the last n amaxes."""
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 5, 16):
        state, seen = DelayedScale(spec(length, "e5m2"), margin=1), []
        for _ in range(40):
            amax = torch.rand((), generator=generator) * 100
            seen.append(amax)
            state.record(amax / 2)
            state.record(amax)  # the largest micro-batch counts
            state.advance()
            assert float(state.scale) == float(torch.tensor(57344.0 / 2) / torch.stack(seen[-length:]).max())


def test_most_recent_zero_nonfinite_and_power_of_two():
    state = DelayedScale(spec(4), compute="most_recent")
    assert trace(state, [7.0, 3.5, 0.0, float("inf"), float("nan"), 1e-38]) == [
        *(1, 64, 128, 128, 128, 128),
        float(torch.finfo(torch.float32).max),
    ]
    assert trace(DelayedScale(spec(1, scale="pow2")), [3.6]) == [1, 64]
    assert trace(DelayedScale(spec(1, "e5m2")), [0.01])[1] == pytest.approx(5.7344e6)


def test_cast_uses_the_old_scale_saturates_and_reports_the_new_amax():
    state = DelayedScale(spec(4))
    x = torch.tensor([[1000.0, -3.0, 0.3, 0.0]])
    q = lowprec.quantize(x, state.spec, encode_scale=state.scale)
    assert q.dequantize()[0].tolist() == [448, -3, 0.3125, 0] and float(q.amax) == 1000
    found = lowprec.operand(x, state.spec, encode_scale=state.scale)
    assert found.amax is not None and float(found.amax) == 1000
    state.record(found.amax)
    state.advance()
    assert float(state.scale) == pytest.approx(0.448)
    found = lowprec.operand(x, state.spec, encode_scale=state.scale)
    assert found.values[0, 0] == 448 and found.scale is not None
    assert float(found.scale) == pytest.approx(1 / 0.448)
    with pytest.raises(UsageError, match="encode_scale goes with delayed scaling"):
        lowprec.quantize(x, state.spec)


def test_state_round_trip():
    state, other = DelayedScale(spec(3)), DelayedScale(spec(3))
    trace(state, [1.0, 2.0])
    state.record(torch.tensor(9.0))
    saved = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    assert {name: tensor.shape for name, tensor in saved.items()} == {"history": (3,), "scale": ()}
    other.load_state_dict(saved)
    assert trace(other, [1.0, 5.0, 1.0]) == trace(state, [1.0, 5.0, 1.0])
    with pytest.raises(UsageError, match="3 steps, this spec 4"):
        DelayedScale(spec(4)).load_state_dict(saved)
    with pytest.raises(UsageError, match="amax_history > 0"):
        DelayedScale(lowprec.resolve_spec("fp8_e4m3"))
