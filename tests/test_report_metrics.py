"""metrics.jsonl: strict JSON, each step once, nothing lost by a kill at any byte."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from errors import UserError
from report import metrics
from report.metrics import MetricsConfig, MetricsWriter, StepRecord, ValidationRecord

RECORD = StepRecord(
    step=1,
    tokens=1024,
    samples=8,
    loss=4.1 + 1e-15,
    lr=1e-3,
    grad_norm=0.5,
    param_norm=30.0,
    loss_scale=1.0,
    skipped=False,
    nan=False,
    step_time_s=0.25,
    tokens_per_s=4096.0,
    tflops=0.2,
    mfu=0.5,
    mem_gib=1.5,
)


def read(path: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(run_dir: Path, first: int, last: int, loss: float = 4.0) -> int:
    with MetricsWriter(run_dir, first - 1) as writer:
        for step in range(first, last + 1):
            writer.step(replace(RECORD, step=step, loss=loss))
        return writer.discarded


def test_records_are_exact_strict_json_and_there_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.step(RECORD)
    writer.step(replace(RECORD, step=2, loss=math.nan, grad_norm=math.inf, mfu=None, nan=True))
    lines = read(tmp_path / "metrics.jsonl")  # before close: flushed every record
    assert lines[0] == {"kind": "step", **vars(RECORD)}  # every digit survives
    assert lines[1]["loss"] is None and lines[1]["grad_norm"] is None and lines[1]["mfu"] is None
    assert lines[1]["nan"] is True
    writer.close()


def test_validation_record(tmp_path: Path) -> None:
    record = ValidationRecord(step=3, tokens=9, samples=1, validation_loss=2.0, extra={"bigram": 5.5})
    with MetricsWriter(tmp_path) as writer:
        writer.validation(record)
        writer.validation(replace(record, validation_loss=1e4, extra={}))
        writer.validation(replace(record, validation_loss=math.nan, extra={}))
    first, huge, nan = read(tmp_path / "metrics.jsonl")
    assert first == {
        "kind": "validation",
        "step": 3,
        "tokens": 9,
        "samples": 1,
        "validation_loss": 2.0,
        "validation_ppl": math.exp(2.0),
        "bigram": 5.5,
    }
    assert huge["validation_ppl"] == math.exp(20)
    assert nan["validation_ppl"] is None


def test_resume_moves_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    assert write_steps(tmp_path, 1, 5, loss=4.0) == 0
    assert write_steps(tmp_path, 4, 6, loss=3.0) == 2
    assert write_steps(tmp_path, 6, 6, loss=2.0) == 1
    kept = read(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in kept] == [
        (1, 4.0),
        (2, 4.0),
        (3, 4.0),
        (4, 3.0),
        (5, 3.0),
        (6, 2.0),
    ]
    moved = read(tmp_path / "metrics.discarded.jsonl")
    assert [(r["step"], r["loss"]) for r in moved] == [(4, 4.0), (5, 4.0), (6, 3.0)]


def test_fresh_start_over_old_records_moves_all(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    assert write_steps(tmp_path, 1, 1, loss=1.0) == 3
    assert [r["loss"] for r in read(tmp_path / "metrics.jsonl")] == [1.0]


def test_kill_at_any_byte_leaves_strict_json(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(ends[0], len(whole) + 1, 7):
        run_dir = tmp_path / str(cut)
        run_dir.mkdir()
        (run_dir / "metrics.jsonl").write_bytes(whole[:cut])
        MetricsWriter(run_dir, 2).close()
        complete = sum(end <= cut for end in ends)  # a record without its newline is still whole
        kept = read(run_dir / "metrics.jsonl")
        assert [r["step"] for r in kept] == list(range(1, complete + 1))[:2]
        discarded = run_dir / "metrics.discarded.jsonl"
        moved = read(discarded) if discarded.exists() else []
        assert len(kept) + len(moved) == len(whole[:cut].splitlines())
        assert all(r["kind"] == "torn" for r in moved if r.get("step") != 3)


def test_garbage_in_the_middle_is_moved(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\x00\xff\x00\n[1]\n" + second)
    assert write_steps(tmp_path, 3, 3) == 2
    assert [r["step"] for r in read(path)] == [1, 2, 3]
    assert [r["kind"] for r in read(tmp_path / "metrics.discarded.jsonl")] == ["torn", "torn"]


def test_kill_during_the_move_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(tmp_path, 1, 4)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            MetricsWriter(tmp_path, 2)
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert write_steps(tmp_path, 3, 3) == 2
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert {r["step"] for r in read(tmp_path / "metrics.discarded.jsonl")} == {3, 4}
    assert not list(tmp_path.glob("*.tmp"))


CHILD = """
import itertools, sys
from dataclasses import replace
from pathlib import Path
from report.metrics import MetricsWriter
from tests.test_report_metrics import RECORD
writer = MetricsWriter(Path(sys.argv[1]))
for step in itertools.count(1):
    writer.step(replace(RECORD, step=step))
"""


def test_kill_9_then_resume(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], cwd=root)
    path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < 100_000:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = path.read_bytes().count(b"\n")
    moved = write_steps(tmp_path, 11, 12)
    assert moved >= before - 10
    assert [r["step"] for r in read(path)] == list(range(1, 13))


def test_full_disk_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with MetricsWriter(tmp_path / "elsewhere") as writer:
        writer._out = metrics.AppendOnly(tmp_path / "metrics.jsonl")
        with pytest.raises(UserError, match="No space left.*make room"):
            writer.step(RECORD)


def test_unwritable_run_directory_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/metrics.jsonl"):
        MetricsWriter(tmp_path / "file")


def test_config_problems() -> None:
    assert MetricsConfig().problems() == []
    found = MetricsConfig(log_interval=0, wandb=True, wandb_project="").problems()
    assert len(found) == 2 and "log_interval is 0" in found[0]
