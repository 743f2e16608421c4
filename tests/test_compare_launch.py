"""--run: processes are started, followed, stopped and not repeated; a small pair is really trained (slow)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from errors import UsageError
from report.compare import launch
from report.compare.__main__ import main
from report.compare.launch import Training, difference, run_all

# Stands for train.py: writes steps, waits for the file `go` beside the run where the recipe is called slow.
FAKE = """
import json, os, pathlib, sys, time
words = dict(word.split("=", 1) for word in sys.argv[3:])
recipe, folder = sys.argv[2], pathlib.Path(words["run.dir"])
folder.mkdir(parents=True, exist_ok=True)
if recipe == "broken":
    sys.exit("no such number")
if os.environ.get("RANK", "0") != "0":
    (folder / "rank").touch()
    sys.exit()
with open(folder / "metrics.jsonl", "w") as out:
    for step in range(1, 4):
        print(json.dumps({"kind": "step", "step": step, "loss": float(words["loss"])}), file=out, flush=True)
while recipe == "slow":
    time.sleep(0.05)
(folder / "exit.json").write_text(json.dumps({"code": 0}))
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setattr(launch, "POLL_S", 0.02)
    return tmp_path / "out"


def training(out: Path, recipe: str, loss: float) -> Training:
    return Training(recipe=recipe, overrides=(f"loss={loss}",), folder=out / f"{recipe}{loss}")


def test_runs_are_trained_once_and_followed(out: Path) -> None:
    both = training(out, "fast", 4.0), training(out, "fast", 4.04)
    for _ in run_all(both, jobs=1):
        pass
    assert all(run.done for run in both) and difference(*both) == pytest.approx(1.0)
    written = (both[0].folder / "metrics.jsonl").stat().st_mtime_ns
    again = training(out, "fast", 4.0)
    for _ in run_all([again], jobs=2):
        pass
    assert (again.folder / "metrics.jsonl").stat().st_mtime_ns == written
    assert again.losses == {1: 4.0, 2: 4.0, 3: 4.0}


def test_a_layout_is_started_with_its_ranks(out: Path) -> None:
    run = training(out, "fast", 4.0)
    run.ranks = 2
    for _ in run_all([run], jobs=1):
        pass
    assert run.done and run.losses == {1: 4.0, 2: 4.0, 3: 4.0}
    assert (run.folder / "rank").exists()


def test_a_failure_tells_what_the_run_said_and_stops_the_others(out: Path) -> None:
    slow, broken = training(out, "slow", 4.0), training(out, "broken", 4.0)
    with pytest.raises(UsageError, match="ended with 1:\nno such number"):
        for _ in run_all([slow, broken], jobs=2):
            pass
    assert not slow.done and slow._process is not None and slow._process.poll() is not None


def test_the_difference_is_shown_while_both_train(out: Path) -> None:
    both = training(out, "slow", 4.0), training(out, "slow", 4.08)
    trained = run_all(both, jobs=2)
    end = time.monotonic() + 60
    for _ in trained:
        if len(both[0].losses) == len(both[1].losses) == 3 or time.monotonic() > end:
            break
    assert difference(*both) == pytest.approx(2.0)
    trained.close()
    assert all(run._process is not None and run._process.poll() is not None for run in both)


def test_following_a_file_that_grows_and_is_replaced(tmp_path: Path) -> None:
    run = Training(recipe="x", overrides=(), folder=tmp_path)
    run.follow()
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "step", "step": step, "loss": 4.0}) + "\n" for step in (1, 2, 3)]
    path.write_text(lines[0] + lines[1][:10])  # half a line
    run.follow()
    assert run.losses == {1: 4.0}
    with open(path, "a") as more:
        more.write(lines[1][10:])
    run.follow()
    assert run.losses == {1: 4.0, 2: 4.0}
    (tmp_path / "new").write_text(lines[0] + '{"kind": "step", "step": 2, "loss": null}\n' + lines[2])
    (tmp_path / "new").replace(path)
    run.follow()
    assert math.isnan(run.losses[2]) and run.losses[3] == 4.0


def test_recipes_that_cannot_be_compared_are_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run", "nvfp4_10m", "--baseline", "bf16_30m", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "cannot be compared with bf16_30m" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["--run", "nvfp4_11m", "--baseline", "bf16_10m", "--out", str(tmp_path / "out")]) == 2
    assert "nvfp4_10m" in capsys.readouterr().err  # did you mean


@pytest.mark.slow
def test_a_pair_is_trained_and_compared(tmp_path: Path) -> None:
    small = "vocab_size=512 hidden_size=64 num_layers=2 num_heads=2 num_kv_heads=1 ffn_size=128".split()
    short = "train.steps=40 train.global_batch=4 train.micro_batch=4 train.seq_len=64 eval.interval=40".split()
    words = ["--run", "mxfp8_10m", "--baseline", "bf16_10m", "--seeds", "1", "--limit", "50"]
    words += [*(f"model.{word}" for word in small), *short, "checkpoint.interval=0", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "report.compare", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    tree = json.loads((tmp_path / "compare.json").read_text())
    assert tree["verdict"] == "within" and len(tree["steps"]) == 40 and tree["validation"]["step"] == 40
    assert abs(tree["pairs"][0]["gap"][0]) < 0.5  # the same initial weights
    assert tree["pairs"][0]["order_correlation"] > 0.5
