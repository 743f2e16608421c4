"""A run under torchrun loses ranks at random moments, saves among them, and ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from parallel.checkpoint import load_weights
from tests.launch import ROOT, command, environment, steps, tiny, train


def _workers(agent: subprocess.Popen) -> list[int]:
    """The processes that train, not torchrun's own."""
    found = []
    for child in psutil.Process(agent.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended meanwhile, perhaps not yet waited for
            found += [child.pid] * any(word.endswith("train.py") for word in child.cmdline())
    return found


def _kill_one_at_a_time(agent: subprocess.Popen, run: Path, kills: int, seed: int) -> int:
    """SIGKILL to a random rank at a random moment of its life, start-up, steps and saves; how many were killed."""
    draw, killed = random.Random(seed), 0
    while killed < kills and agent.poll() is None:
        time.sleep(draw.uniform(0.0, 3.0))
        if killed % 2:  # every second one only once training goes on: a restart must make progress
            size = _size(run)
            while _size(run) == size and agent.poll() is None:
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 0.6))
        if workers := _workers(agent):
            os.kill(draw.choice(workers), signal.SIGKILL)
            killed += 1
            while set(workers) & set(_workers(agent)) and agent.poll() is None:
                time.sleep(0.05)  # torchrun notices, and ends the others
    return killed


def _size(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def check(tmp_path: Path, kills: int, count: int, behind: bool) -> None:
    keys = (f"train.steps={count}", "checkpoint.interval=2", f"checkpoint.behind={str(behind).lower()}")
    keys += ("optimizer.master=none", "optimizer.update=stochastic")
    straight = train(tiny(tmp_path, "straight"), *keys, ranks=2)
    assert straight.returncode == 0, straight.stderr
    words = command(tiny(tmp_path, "killed"), *keys, ranks=2)
    words.insert(words.index("--standalone"), f"--max-restarts={kills + 1}")
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=log, stderr=log)
        try:
            killed = _kill_one_at_a_time(agent, tmp_path / "killed", kills, seed=1)
            assert agent.wait(600) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            if agent.poll() is None:
                agent.terminate()
                agent.wait(30)
    assert killed == kills
    first, second = steps(tmp_path / "straight"), steps(tmp_path / "killed")
    assert [record["loss"] for record in first] == [record["loss"] for record in second]
    ours, theirs = load_weights(tmp_path / "straight"), load_weights(tmp_path / "killed")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes as Linux shows them")
@pytest.mark.parametrize(("kills", "count", "behind"), [(30, 120, False), (6, 60, True)])
def test_killed_again_and_again(tmp_path, kills, count, behind):
    check(tmp_path, kills, count, behind)
