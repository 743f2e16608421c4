"""TensorBoard and W&B: Megatron's names, both axes, and history on resume."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from errors import UsageError
from report.metrics import MetricsConfig, ValidationRecord
from report.sinks import open_sinks, step_scalars, validation_scalars
from tests.test_report_metrics import RECORD

STEP_NAMES = {
    "lm loss",
    "learning-rate",
    "batch-size",
    "loss-scale",
    "grad-norm",
    "params-norm",
    "iteration-time",
    "throughput",
}
VALIDATION = ValidationRecord(step=2, tokens=9, samples=16, validation_loss=0.0)


def twin(names: set[str]) -> set[str]:
    return {name + " vs samples" for name in names}


def test_names_and_values() -> None:
    values = step_scalars(RECORD, global_batch=8)
    assert set(values) == STEP_NAMES
    assert values["lm loss"] == RECORD.loss and values["batch-size"] == 8
    assert values["throughput"] == RECORD.tflops and values["iteration-time"] == 0.25
    assert validation_scalars(VALIDATION) == {
        "lm loss validation": 0.0,
        "lm loss validation ppl": 1.0,
    }


def test_no_sink_unless_asked(tmp_path: Path) -> None:
    assert open_sinks(MetricsConfig(), tmp_path, recipe={}) == []


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_missing_package_says_what_to_install(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # makes `import package` fail
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UsageError, match=f"pip install {package}"):
        open_sinks(replace(MetricsConfig(), **{package: True}), tmp_path, recipe={})


def test_tensorboard_resume_hides_only_what_was_repeated(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = MetricsConfig(tensorboard=True)
    for first, last, loss in ((1, 5, 4.0), (4, 6, 3.0)):  # resumed at step 3 after 5
        start = first - 1
        (sink,) = open_sinks(config, tmp_path, recipe={}, start_step=start, start_samples=8 * start)
        for step in range(first, last + 1):
            values = step_scalars(replace(RECORD, step=step, loss=loss), global_batch=8)
            sink.scalars(values, step, 8 * step)
        sink.close()
    for folder, suffix, scale in (("", "", 1), ("samples", " vs samples", 8)):
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / folder))
        events.Reload()
        assert set(events.Tags()["scalars"]) == {name + suffix for name in STEP_NAMES}
        seen = {e.step: e.value for e in events.Scalars("lm loss" + suffix)}
        assert seen == {scale * s: 4.0 if s <= 3 else 3.0 for s in range(1, 7)}


class FakeWandB(ModuleType):
    """Records what the adapter calls, in order."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, tuple, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> FakeWandB:
            self.calls.append((name, args, kwargs))
            return self

        return call


def test_wandb_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_dir = tmp_path / "runs" / "tiny"
    (sink,) = open_sinks(MetricsConfig(wandb=True), run_dir, recipe={"a": 1})
    sink.scalars(step_scalars(RECORD, 8), 1, 8)
    sink.scalars(validation_scalars(VALIDATION), 2, 16)
    sink.close()
    name, _, init = fake.calls[0]
    assert name == "init" and init["mode"] == "offline" and init["project"] == "lowprec"
    assert init["group"] == "tiny" and init["config"] == {"a": 1} and Path(init["dir"]).is_dir()
    axes = {args[0]: kw["step_metric"] for n, args, kw in fake.calls if n == "define_metric"}
    validation = set(validation_scalars(VALIDATION))
    assert axes == dict.fromkeys(twin(STEP_NAMES | validation), "samples")
    logs = [(args[0], kw) for n, args, kw in fake.calls if n == "log"]
    assert set(logs[0][0]) == STEP_NAMES | twin(STEP_NAMES) | {"samples"}
    assert logs[0][0]["lm loss vs samples"] == RECORD.loss and logs[0][1] == {"step": 1}
    assert logs[1][0]["samples"] == 16 and logs[1][1] == {"step": 2}
    assert fake.calls[-1][0] == "finish"


def test_wandb_mode_of_the_environment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    open_sinks(MetricsConfig(wandb=True), tmp_path, recipe={}, wandb_mode="online")
    assert fake.calls[0][2]["mode"] == "online"
