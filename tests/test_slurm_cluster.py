"""Runs as jobs of a real Slurm (tests/slurm_cluster.py): preempted, requeued, cancelled, on nodes that fail."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from parallel.checkpoint import load_weights, newest
from slurm import submit
from slurm.status import read_status
from tests.launch import steps, tiny, train
from tests.slurm_cluster import Cluster, missing

LONG_S = 400  # a start takes ten seconds of two idle cores

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.skipif(missing() is not None, reason=f"a Slurm cluster {missing()}"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not under pytest's directory, which only its owner may enter
    folder.chmod(0o755)
    try:
        with Cluster(folder) as started:
            yield started
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def job(cluster, monkeypatch):
    """Submit a recipe and return the jobs' numbers."""
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)

    def submitted(recipe: Path, *words: str) -> list[str]:
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = submit.main(["--recipe", str(recipe), "device=cpu", *words])
        assert code == 0, errors.getvalue()
        return [line.split()[1].rstrip(":") for line in output.getvalue().splitlines() if line.startswith("job ")]

    return submitted


def _log(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run.glob("slurm-*.log")))


def _losses(run: Path) -> list[float]:
    return [record["loss"] for record in steps(run)]


def _has_steps(run: Path, count: int) -> bool:
    return (run / "metrics.jsonl").is_file() and len(steps(run)) >= count


def _exit(run: Path) -> dict:
    return json.loads((run / "exit.json").read_text())


def _exits(run: Path) -> list[int]:
    return [json.loads(line)["code"] for line in (run / "exits.jsonl").read_text().splitlines()]


def _training(run: Path) -> list[psutil.Process]:
    """Processes of this run's code, agents and workers."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(run) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_preempted_requeued_and_bit_equal(cluster, job, tmp_path):
    keys = ("train.steps=150", "checkpoint.interval=50")
    straight = train(tiny(tmp_path, "straight"), *keys, ranks=2)
    assert straight.returncode == 0, straight.stderr
    run = tmp_path / "run"
    (number,) = job(tiny(tmp_path), "--nodes=2", *keys)
    cluster.wait(lambda: _has_steps(run, 5), LONG_S)
    cluster.run("scancel", "--signal=USR1", number)  # what --signal=USR1@120 sends, to the same processes
    cluster.wait(lambda: "requeued" in _log(run), LONG_S)
    cluster.wait(lambda: cluster.state(number) == "COMPLETED", LONG_S)
    log = _log(run)
    assert '{"code": 75, "reason": "received SIGUSR1"}' in log
    assert "start 1 of" in log and "2 ranks reach each other" in log
    assert _exit(run) == {"code": 0, "reason": "done"} and _exits(run) == [75, 0]
    assert _losses(run) == _losses(tmp_path / "straight")
    ours, theirs = load_weights(run), load_weights(tmp_path / "straight")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert len(starts) == 2 and starts[0]["git"] == starts[1]["git"] and starts[1]["hosts"] == 2


def test_a_node_is_lost_and_the_run_goes_on_with_the_other(cluster, job, tmp_path):
    keys = ("train.steps=150", "checkpoint.interval=10", "model.dtype=fp32")
    straight = train(tiny(tmp_path, "straight"), *keys)
    assert straight.returncode == 0, straight.stderr
    run = tmp_path / "run"
    (number,) = job(tiny(tmp_path), "--nodes=2", "--min-nodes=1", "--no-check", *keys)
    cluster.wait(lambda: _has_steps(run, 25), LONG_S)
    cluster.take_down("n2")
    try:
        cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")  # what slurmctld finds in 30 s
        cluster.wait(lambda: cluster.state(number) == "COMPLETED", LONG_S)
    finally:
        cluster.bring_up("n2")
        cluster.wait(lambda: cluster.run("sinfo", "-h", "-n", "n2", "-o", "%T").strip() == "idle", 30)
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert [start["topology"]["dp"] for start in starts] == [2, 1]
    assert starts[1]["step"] >= 20
    # FP32, two ranks' order of additions up to the loss of the node: the curves part slowly.
    torch.testing.assert_close(_losses(run)[:100], _losses(tmp_path / "straight")[:100], rtol=1e-4, atol=0)
    # To the bit it is a run that two ranks begin and one goes on with.
    keys, relay = (*keys, "checkpoint.keep=99"), tiny(tmp_path, "relay")
    train(relay, *keys, f"train.stop_at={starts[1]['step']}", ranks=2)
    assert train(relay, *keys).returncode == 0
    assert _losses(run) == _losses(tmp_path / "relay")


def test_cancelled_means_saved_and_gone(cluster, job, tmp_path):
    run = tmp_path / "run"
    (number,) = job(tiny(tmp_path), "--nodes=2", "--no-check", "train.steps=100000", "checkpoint.interval=100000")
    cluster.wait(lambda: _has_steps(run, 5), LONG_S)
    with pytest.raises(AssertionError, match="scancel it, or choose another run.dir"):
        job(tiny(tmp_path), "--nodes=2", "train.steps=100000")
    cluster.run("scancel", number)
    cluster.wait(lambda: not _training(run), 20)
    cluster.wait(lambda: cluster.state(number) == "CANCELLED", 20)
    assert _exit(run) == {"code": 75, "reason": "received SIGTERM"}
    found = newest(run)
    assert found is not None and found.step == steps(run)[-1]["step"]


def test_an_array_of_seeds(cluster, job, tmp_path):
    """Each task is preempted and requeued by itself."""
    run = tmp_path / "run"
    words = ("--nodes=1", "--seeds=0,1,2", "--no-check", "train.steps=80", "checkpoint.interval=40")
    (number,) = job(tiny(tmp_path), *words)
    for seed in range(3):
        cluster.wait(lambda seed=seed: _has_steps(run / f"seed-{seed}", 2), LONG_S)
        cluster.run("scancel", "--signal=USR1", f"{number}_{seed}")
    cluster.wait(lambda: _log(run).count("requeued") == 3, LONG_S)
    cluster.wait(lambda: cluster.state(number) == "COMPLETED COMPLETED COMPLETED", LONG_S)
    losses = [_losses(run / f"seed-{seed}") for seed in range(3)]
    assert [len(each) for each in losses] == [80, 80, 80] and len(set(map(tuple, losses))) == 3
    assert [_exits(run / f"seed-{seed}") for seed in range(3)] == [[75, 0]] * 3
    shown = [read_status(run / f"seed-{seed}") for seed in range(3)]
    assert [(each.state, each.step, each.checkpoint) for each in shown] == [("done", 80, 80)] * 3


def test_a_chain_goes_on_where_the_job_before_it_stopped(cluster, job, tmp_path):
    run = tmp_path / "run"
    first, second = job(tiny(tmp_path), "--nodes=1", "--chain=2", "--no-check", "train.steps=100")
    cluster.wait(lambda: _has_steps(run, 5), LONG_S)
    assert read_status(run).state == "RUNNING"
    cluster.run("scancel", "--signal=USR2", first)
    cluster.wait(lambda: cluster.state(second) == "COMPLETED", LONG_S)
    assert "the next job of the chain goes on" in _log(run) and _exits(run) == [75, 0]
    assert [record["step"] for record in steps(run)] == list(range(1, 101))


NVIDIA_SMI = """#!/bin/bash
if [ "$SLURMD_NODENAME" = n1 ]; then echo "0, 3"; else echo "0, 0"; fi
"""


def test_an_unfit_node_is_left_out(cluster, job, tmp_path, monkeypatch):
    """The job starts on n1, whose GPU has ECC errors, and moves to n2."""
    tools, run = tmp_path / "tools", tmp_path / "run"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(NVIDIA_SMI)
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    words = ("device=auto", "train.steps=4", "checkpoint.interval=2")
    (number,) = job(tiny(tmp_path), "--nodes=1", "--per-node=1", *words)
    cluster.wait(lambda: cluster.state(number) == "COMPLETED", LONG_S)
    assert "UNHEALTHY n1: GPU 0 has 3 uncorrected ECC errors" in _log(run)
    assert "start 1 of" in _log(run) and "processes: n2" in _log(run)
    assert _exit(run) == {"code": 0, "reason": "done"}
