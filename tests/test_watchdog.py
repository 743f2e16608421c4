"""A run that hangs says where on every rank and ends; one that was only suspended goes on. Slow ranks are named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from run import watchdog
from run.stragglers import Stragglers
from run.watchdog import Watchdog
from sections import WatchConfig
from tests.launch import ROOT
from tests.spawn import RankError, run_ranks


def stand_still() -> None:
    time.sleep(60)


def _hang(rank: int, run_dir: Path) -> None:
    """Three steps, then rank 1 stands still and rank 0 waits for it."""
    watchdog.GRACE_S, watchdog.POLL_S = 1.0, 0.1
    dog = Watchdog(WatchConfig(hang_factor=3.0, hang_least_s=0.5), run_dir, rank, first_limit_s=60)
    dog.start(0)
    for step in range(1, 6):
        time.sleep(0.02)
        dist.barrier()
        dog.beat(step)
    if rank:
        stand_still()
    dist.all_reduce(torch.zeros(1))


def test_a_hang_shows_the_stacks_of_all_ranks_and_ends_them(tmp_path):
    began = time.monotonic()
    with pytest.raises(RankError, match=r"exit codes \[124, 124\]"):
        run_ranks(_hang, 2, tmp_path)
    assert time.monotonic() - began < 40
    waiting, standing = (file.read_text() for file in sorted((tmp_path / "stacks").iterdir()))
    assert "in all_reduce" in waiting and "stand_still" not in waiting
    assert "in stand_still" in standing and "after step 5" in standing
    end = json.loads((tmp_path / "exit.json").read_text())
    assert end["code"] == 124 and "no progress for" in end["reason"]


def test_the_limit_follows_what_steps_saves_and_validations_take(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    dog = Watchdog(WatchConfig(hang_factor=20, hang_least_s=5), tmp_path, 0, first_limit_s=1800)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda seconds: None)

    def pass_time(seconds: float, step: int) -> float:
        clock[0] += seconds
        dog.beat(step)
        return dog.limit_s()

    assert pass_time(100, 1) == 1800, "the first step compiles"
    assert pass_time(1, 2) == pass_time(1, 3) == 1800
    assert pass_time(1, 4) == 20
    assert pass_time(0.1, 4) == 20, "a validation that is no step"
    assert pass_time(30, 4) == 60, "a save that took long may do so again"


SUSPENDED = """
import sys, time
from pathlib import Path
from run import watchdog
from sections import WatchConfig
watchdog.GRACE_S, watchdog.POLL_S = 0.2, 0.1
dog = watchdog.Watchdog(WatchConfig(hang_factor=2, hang_least_s=1), Path(sys.argv[1]), 0, 1)
dog.start(0)
for step in range(1, 30):
    time.sleep(0.1)
    dog.beat(step)
    print(step, flush=True)
dog.stop()
"""


def test_time_in_which_the_process_was_suspended_is_no_hang(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=30)
    assert process.returncode == 0 and not list(tmp_path.iterdir())


def _work(rank: int) -> list:
    """Rank 1 takes longer for its part of every step; at step 1 it compiles, which does not count."""
    compare = Stragglers(WatchConfig(straggler_every=5, straggler_factor=1.5), torch.device("cpu"))
    reports = []
    for step in range(1, 11):
        with compare.timed():
            time.sleep(0.4 if step == 1 else 0.05 + 0.1 * (rank == 1))
        dist.barrier()
        reports.append(compare.step_done(step))
    return [(report.steps, sorted(report.slow), report.describe(2)) for report in reports if report]


def test_slow_ranks_are_named():
    found = run_ranks(_work, 3)
    assert found[0] == found[1] == found[2]
    assert [(steps, slow) for steps, slow, _ in found[0]] == [(4, [1]), (5, [1])]
    assert "rank 1 (node 0)" in found[0][1][2]


def test_config_problems():
    bad = WatchConfig(hang_factor=1, hang_least_s=0, straggler_every=-1, straggler_factor=1)
    assert len(bad.problems()) == 4
    assert WatchConfig().problems() == WatchConfig(hang_factor=0, straggler_every=0).problems() == []
