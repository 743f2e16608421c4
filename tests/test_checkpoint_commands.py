"""`python -m parallel.checkpoint`, saves behind training, and resumes that prove themselves."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from errors import CheckpointError
from lowprec.fragments import Fragment
from parallel import checkpoint, saver
from parallel.commands import main
from parallel.saver import CheckpointConfig, Saver
from tests.checkpoint_case import SHAPES, save_alone, truth
from tests.launch import steps, tiny, train
from tests.spawn import run_ranks


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_verify_says_which_checkpoint_is_damaged(tmp_path, capsys):
    for step in (1, 2):
        save_alone(tmp_path, step)
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("ok ") == 2
    _flip(next((tmp_path / "checkpoints/step-00000002").glob("*.distcp")))
    assert main(["verify", str(tmp_path)]) == 4
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("DAMAGED") and "step-00000002" in first and "xxh3_128" in first
    assert second.startswith("ok") and "step-00000001" in second
    assert main(["verify", str(tmp_path / "nowhere")]) == 4
    assert "neither a run" in capsys.readouterr().err


def test_prune_keeps_the_newest(tmp_path, capsys):
    for step in (1, 2, 3):
        save_alone(tmp_path, step, keep=9)
    assert main(["prune", str(tmp_path), "--keep", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000003"]
    assert main(["prune", str(tmp_path), "--keep", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_convert_writes_the_weights(tmp_path):
    save_alone(tmp_path, 5)
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 0  # a file
    assert main(["convert", str(tmp_path), str(tmp_path / "out/w.safetensors"), "--dtype", "bf16"]) == 4
    (tmp_path / "out").unlink()
    assert main(["convert", str(tmp_path), str(tmp_path / "out/w.safetensors"), "--dtype", "bf16"]) == 0
    written = load_file(tmp_path / "out/w.safetensors")
    assert written.keys() == SHAPES.keys()
    for name, tensor in truth(5)["weight"].items():
        assert torch.equal(written[name], tensor.bfloat16())


def test_inspect_a_run(tmp_path, capsys):
    assert train(tiny(tmp_path), "train.steps=2", "checkpoint.interval=2", "precision.policy=mxfp8").returncode == 0
    assert main(["inspect", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    for word in ("step 2", "16 samples", "policy mxfp8", "'tp': 1", "weight", "exp_avg_sq"):
        assert word in shown, word
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 16


def _behind(rank: int, folder: Path) -> tuple[float, list[str], str]:
    """A save while the weights change, then one that fails on one rank."""
    weight = torch.full((8,), 3.0)
    fragment = Fragment("w", (16,), 8 * rank, {"weight": weight})
    written, gate, original = [], threading.Event(), saver.save

    def slow(*args, **kwargs):
        gate.wait(30)
        return original(*args, **kwargs)

    saver.save = slow
    made = Saver(folder, CheckpointConfig(behind=True), lambda path: written.append(path.name))
    made.save(1, [fragment], {}, {})
    assert made.busy and not written
    weight.fill_(7.0)  # training goes on
    gate.set()
    made.finish()
    found = float(checkpoint.load_weights(folder)["w"].min())
    saver.save = original
    broken = Fragment("w", (16,), 8, {"weight": weight})  # both ranks hold the same half
    made.save(2, [broken], {}, {})
    with pytest.raises(CheckpointError) as error:
        made.finish()
    return found, written, str(error.value)


def test_a_save_behind_training_holds_what_was_there_and_reports_its_failure(tmp_path):
    for found, written, error in run_ranks(_behind, 2, tmp_path):
        assert found == 3.0
        assert written == ["step-00000001"]
        assert "cannot save the checkpoint of step 2" in error
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.step == 1


def test_a_resume_proves_itself(tmp_path):
    keys = ("resume.verify=true", "checkpoint.behind=true", "checkpoint.interval=2", "precision.policy=mxfp8")
    recipe, run = tiny(tmp_path), tmp_path / "run"
    assert train(recipe, *keys, "train.steps=4", "train.stop_at=2").returncode == 75
    resumed = train(recipe, *keys, "train.steps=4")
    assert resumed.returncode == 0, resumed.stderr
    assert "replayed the batch of step 2" in resumed.stdout
    assert [record["step"] for record in steps(run)] == [1, 2, 3, 4]
    other = train(recipe, *keys, "train.steps=6", "train.seed=9")  # other data than the saved run's
    assert other.returncode == 4
    assert "the loss of its weights on the batch of step 4 was" in other.stderr and "must be equal" in other.stderr
    without = train(tiny(tmp_path, "plain"), "train.steps=4", "train.stop_at=2")
    assert without.returncode == 75
    refused = train(tiny(tmp_path, "plain"), "resume.verify=true", "train.steps=4")
    assert refused.returncode == 4 and "resume.verify=false" in refused.stderr
