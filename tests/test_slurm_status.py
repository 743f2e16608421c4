"""The table of runs, from what runs write."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import recipe as recipes
from report.metrics import MetricsWriter, StepRecord
from run import exits
from run.records import write_resolved
from slurm import status
from tests.launch import tiny


def make_run(folder: Path, done: int, starts: int = 1) -> Path:
    """A run directory after `done` of 20 steps of half a second each, with a checkpoint of every fourth one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = recipes.load(str(tiny(folder.parent, folder.name)))
    write_resolved(folder, recipe)
    (folder / "manifest.json").write_text(json.dumps({"starts": [{}] * starts}))
    with MetricsWriter(folder) as metrics:
        for step in range(1, done + 1):
            rates = {"tokens_per_s": 512.0, "tflops": 0.01, "mfu": None if step == 1 else 0.25, "mem_gib": 1.0}
            values = {"loss": 5.0 - 0.1 * step, "lr": 1e-2, "grad_norm": 1.0, "param_norm": 9.0, "loss_scale": 1.0}
            counts = {"step": step, "tokens": 256 * step, "samples": 8 * step}
            metrics.step(StepRecord(**counts, **values, **rates, skipped=False, nan=False, step_time_s=0.5))
            if step % 4 == 0:
                (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return folder


def test_a_run_that_goes_on(tmp_path):
    run = make_run(tmp_path / "a", 6, starts=3)
    exits.record(run, 75, "received SIGUSR1", 0)
    exits.clear(run)
    found = status.read_status(run)
    assert (found.state, found.step, found.steps, found.restarts) == ("running", 6, 20, 2)
    assert found.exit == "75 received SIGUSR1" and found.checkpoint == 4 and found.loss == 5.0 - 0.6
    assert found.eta_s == 7.0 and found.tokens_per_s == 512.0 and found.mfu == 0.25


def test_states(tmp_path):
    run = make_run(tmp_path / "a", 6)
    assert status.read_status(run, time.time() + 7200).state.startswith("silent 2:00:0")
    for code, state in ((75, "stopped"), (3, "failed"), (0, "done")):
        exits.clear(run)
        exits.record(run, code, "why", 0)
        assert status.read_status(run).state == state
    (make_run(tmp_path / "b", 0) / "metrics.jsonl").unlink()
    assert status.read_status(tmp_path / "b").state == "not started"


def test_slurm_knows_better(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", 6)
    seed = make_run(tmp_path / "array" / "seed-3", 6)
    (run / "jobs.json").write_text(json.dumps([{"id": "41"}, {"id": "42"}]))
    (seed.parent / "jobs.json").write_text(json.dumps([{"id": "50"}]))
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/bash\ncase "$3" in 41) exit 1;; 42) echo PENDING;; 50_3) echo RUNNING; esac\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert status.read_status(run, time.time() + 7200).state == "PENDING"
    assert status.read_status(seed).state == "RUNNING"
    exits.record(run, 0, "done", 0)
    assert status.read_status(run).state == "done"


def test_the_table_and_json(tmp_path, capsys):
    first, second = make_run(tmp_path / "runs" / "a", 6), make_run(tmp_path / "runs" / "deep" / "b", 20)
    exits.record(second, 0, "done", 0)
    with open(first / "metrics.jsonl", "a") as torn:
        torn.write('{"kind": "step", "st')
    assert status.main([str(tmp_path / "runs")]) == 0
    output = capsys.readouterr().out
    assert "6/20" in output and "4.4000" in output and "deep/b" in output and "20/20" in output
    assert status.main(["--json", str(first), str(second)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["run"], line["step"]) for line in lines] == [(str(first), 6), (str(second), 20)]


def test_what_cannot_be_read_is_one_message(tmp_path, capsys):
    run = make_run(tmp_path / "a", 6)
    (run / "manifest.json").write_text("{")
    for words, expected in (([run], "manifest.json is damaged"), ([tmp_path / "none"], "is no directory")):
        assert status.main([*map(str, words)]) == 2
        assert expected in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert status.main([str(tmp_path / "empty")]) == 2
    assert "no run" in capsys.readouterr().err
