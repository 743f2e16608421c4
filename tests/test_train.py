"""Runs from the command line, as a user starts them: training, resuming, stopping, failing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import recipe as recipes
from convert.from_hf import main as from_hf
from convert.to_hf import main as to_hf
from data.loader import open_data
from parallel.checkpoint import load_weights, newest
from tests.launch import ROOT, command, environment, steps, tiny, train


def _losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in steps(run_dir)]


def _validation_loss(run_dir: Path) -> float:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return next(record["validation_loss"] for record in records if record["kind"] == "validation")


def test_single_process_learns_and_writes_its_records(tmp_path):
    done = train(tiny(tmp_path), "eval.interval=10", "checkpoint.interval=10", "metrics.tensorboard=true")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    records = steps(run)
    assert [r["step"] for r in records] == list(range(1, 21))
    assert records[-1]["tokens"] == 20 * 8 * 32 and records[-1]["samples"] == 160
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert abs(records[0]["loss"] - torch.tensor(320.0).log()) < 0.2  # untrained: about ln V
    assert " lm loss: " in done.stdout and "validation loss at iteration 10" in done.stdout
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-00000010", "step-00000020", "latest"}
    assert list((run / "tensorboard").rglob("events*"))
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["starts"][-1]["recipe"] == yaml.safe_load((run / "resolved.yaml").read_text())


def test_number_of_ranks_and_micro_batches_do_not_change_the_run(tmp_path):
    """FP32: what differs is only the order of additions."""
    recipe = tiny(tmp_path)
    layouts = {"a": (1, 8), "b": (1, 2), "c": (2, 2)}
    for name, (ranks, micro) in layouts.items():
        done = train(
            recipe,
            f"run.dir={tmp_path / name}",
            f"train.micro_batch={micro}",
            "model.dtype=fp32",
            "train.steps=6",
            "eval.interval=6",
            "data.reset_at_document=true",
            ranks=ranks,
        )
        assert done.returncode == 0, done.stderr
    torch.testing.assert_close(_losses(tmp_path / "a"), _losses(tmp_path / "b"), rtol=1e-5, atol=0)
    torch.testing.assert_close(_losses(tmp_path / "a"), _losses(tmp_path / "c"), rtol=1e-5, atol=0)
    validation = [_validation_loss(tmp_path / name) for name in layouts]
    torch.testing.assert_close(validation, [validation[0]] * 3, rtol=1e-5, atol=0)


SLOW = pytest.mark.slow
# Packed 4-bit states and BF16 weights without masters, both rounded stochastically; matrices of more than 4096 numbers.
CODED = (
    "model.hidden_size=128",
    "optimizer.exp_avg=dynamic4_b128",
    "optimizer.exp_avg_sq=linear4_b128",
    "optimizer.master=none",
    "optimizer.update=stochastic",
)


@pytest.mark.parametrize(
    ("stage", "more"), [(1, CODED), *(pytest.param(stage, (), marks=SLOW) for stage in (0, 1, 2, 3))]
)
def test_killed_and_resumed_is_bit_equal_to_uninterrupted(tmp_path, stage, more):
    zero = (f"zero.stage={stage}", "checkpoint.interval=10", *more)
    straight = train(tiny(tmp_path, "straight"), *zero, ranks=2)
    assert straight.returncode == 0, straight.stderr

    recipe, run = tiny(tmp_path, "killed"), tmp_path / "killed"
    process = subprocess.Popen(
        command(recipe, *zero, ranks=2),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _wait_for_checkpoint(run, process)
    _kill_tree(process)
    assert not (run / "checkpoints" / "step-00000020").exists(), "the kill came too late to prove anything"

    resumed = train(recipe, *zero, ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stdout
    assert _losses(run) == _losses(tmp_path / "straight")
    ours, theirs = load_weights(run), load_weights(tmp_path / "straight")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _wait_for_checkpoint(run: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not (run / "checkpoints" / "latest").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()  # torchrun ends its workers
            process.wait(timeout=60)
            pytest.fail("no checkpoint appeared")
        time.sleep(0.002)


def _kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to torchrun and its workers, which it starts in sessions of their own."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    for pid in [int(word) for word in children.stdout.split()] + [process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait(10)


def test_stop_at_is_a_clean_preemption(tmp_path):
    recipe, run = tiny(tmp_path), tmp_path / "run"
    single = train(recipe, "train.stop_at=3")
    assert single.returncode == 75, single.stderr
    assert json.loads((run / "exit.json").read_text())["code"] == 75
    under_torchrun = train(recipe, "train.stop_at=6", ranks=2, torchrun=True)
    assert under_torchrun.returncode == 0, under_torchrun.stderr
    assert json.loads((run / "exit.json").read_text()) == {"code": 75, "reason": "train.stop_at=6"}
    assert [r["step"] for r in steps(run)] == [1, 2, 3, 4, 5, 6]
    assert train(recipe, "train.steps=8").returncode == 0
    assert [r["step"] for r in steps(run)] == list(range(1, 9))


def test_resolved_recipe_reproduces_the_run(tmp_path):
    assert train(tiny(tmp_path), "train.steps=4", "train.seed=3").returncode == 0
    again = train(tmp_path / "run" / "resolved.yaml", f"run.dir={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    assert _losses(tmp_path / "again") == _losses(tmp_path / "run")


def test_resume_never_starts_anew_and_loses_nothing(tmp_path):
    recipe, run = tiny(tmp_path), tmp_path / "run"
    assert train(recipe, "train.steps=4", "checkpoint.interval=2").returncode == 0
    again = train(recipe, "train.steps=4", "checkpoint.interval=2", "train.seed=1", "--resume", "never")
    assert again.returncode == 0, again.stderr
    assert len(steps(run)) == 4
    discarded = map(json.loads, (run / "metrics.discarded.jsonl").read_text().splitlines())
    assert [line["step"] for line in discarded if line["kind"] == "step"] == [1, 2, 3, 4]
    assert (run / "checkpoints.1" / "step-00000004").is_dir() and (run / "checkpoints" / "step-00000004").is_dir()


@pytest.mark.slow
def test_quickstart_learns_more_than_bigrams(tmp_path):
    done = train("quickstart", f"run.dir={tmp_path / 'run'}", f"data.cache={tmp_path}", ranks=2, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = re.search(r"validation loss ([\d.]+) is below the cross-entropy ([\d.]+) of an interpolated", done.stdout)
    assert found and float(found[1]) < float(found[2]), done.stdout[-2000:]


@pytest.mark.parametrize(
    ("number", "code", "ranks"),
    [
        (signal.SIGTERM, 75, 1),
        pytest.param(signal.SIGUSR1, 75, 1, marks=pytest.mark.slow),
        (signal.SIGINT, 130, 1),
        pytest.param(signal.SIGINT, 130, 2, marks=pytest.mark.slow),
    ],
)
def test_signals(tmp_path, number, code, ranks):
    """torchrun, which has Ctrl-C first, ends with 1 whatever its workers say."""
    recipe, run = tiny(tmp_path), tmp_path / "run"
    process = subprocess.Popen(
        command(recipe, "train.steps=100000", "checkpoint.interval=5", ranks=ranks),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for_checkpoint(run, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (code if ranks == 1 else 1), errors
    assert ranks > 1 or "Traceback" not in errors
    assert json.loads((run / "exit.json").read_text())["code"] == code
    resumed = train(recipe, f"train.steps={steps(run)[-1]['step'] + 1}", ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train.stpes=1"], 2, ["unknown key train.stpes", "train.steps"]),
        (["train.global_batch=7"], 2, ["train.global_batch", "7"]),
        (["data.train=/nowhere/corpus.txt"], 3, ["/nowhere/corpus.txt"]),
        (["--resume", "/nowhere"], 4, ["/nowhere"]),
        (["device=cuda"], 2, ["CUDA", "device=cpu"]),
        (["run.dir=/proc/nowhere"], 1, ["/proc/nowhere"]),
        (["eval.interval=1", "data.validation=null"], 2, ["data.validation"]),
    ],
)
def test_user_errors_are_one_message_and_a_code(tmp_path, arguments, code, words):
    if arguments == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    failed = train(tiny(tmp_path), *arguments)
    assert failed.returncode == code, failed.stderr
    assert "Traceback" not in failed.stderr
    for word in words:
        assert word in failed.stderr


def test_port_taken_is_one_message(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        failed = subprocess.run(
            command(tiny(tmp_path)),
            env=environment() | rendezvous | {"RANK": "0", "WORLD_SIZE": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert failed.returncode == 2 and "MASTER_PORT" in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr


def test_full_disk_while_saving_keeps_the_older_checkpoint(tmp_path):
    """A real small file system: room for one checkpoint of this model, not for two."""
    run = tmp_path / "run"
    run.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(run)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        failed = train(tiny(tmp_path), "checkpoint.interval=5", "model.ffn_size=256", "checkpoint.keep=9")
        assert failed.returncode == 4 and "No space left" in failed.stderr, failed.stderr
        assert "Traceback" not in failed.stderr
        kept = newest(run)
        assert kept is not None and kept.step == steps(run)[-1]["step"] - 5
        assert not list((run / "checkpoints").glob("step*.tmp"))
    finally:
        subprocess.run(["umount", str(run)], check=True)


def test_exported_model_has_the_loss_of_the_run_and_comes_back(tmp_path):
    """train -> Hugging Face -> the same validation loss there -> back -> the same loss before the first step."""
    recipe, run = tiny(tmp_path), tmp_path / "run"
    done = train(recipe, "model.dtype=fp32", "train.steps=5", "eval.interval=5", "checkpoint.interval=5")
    assert done.returncode == 0, done.stderr
    assert to_hf([str(run), str(tmp_path / "hf")]) == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    config = recipes.load(str(run / "resolved.yaml"))
    data = open_data(config.data, vocab_size=config.model.vocab_size, seq_len=32, seed=0)
    samples = torch.stack([torch.from_numpy(data.validation.sample(i)) for i in range(data.validation.num_samples)])
    with torch.no_grad():
        logits = exported(samples[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())
    assert loss.item() == pytest.approx(_validation_loss(run), rel=1e-5)

    assert from_hf([str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    tree = yaml.safe_load(recipe.read_text()) | {"base": str(tmp_path / "back" / "model.yaml")}
    del tree["model"]
    tree["run"]["dir"] = str(tmp_path / "again")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(tree))
    again = train(tmp_path / "again.yaml", "train.steps=1", "optimizer.lr=1e-30", "eval.interval=1")
    assert again.returncode == 0, again.stderr
    assert _validation_loss(tmp_path / "again") == pytest.approx(loss.item(), rel=1e-5)


def test_unknown_recipe_is_one_message():
    failed = train("quickstrat")
    assert failed.returncode == 2 and "did you mean quickstart?" in failed.stderr


def test_checkpoint_of_another_model_is_refused(tmp_path):
    assert train(tiny(tmp_path), "train.steps=2", "checkpoint.interval=2").returncode == 0
    failed = train(tiny(tmp_path, "other"), "model.ffn_size=96", "--resume", str(tmp_path / "run"))
    assert failed.returncode == 4 and "mlp" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("policy", "recompute", "close"),
    [
        ("bf16", "none", 1e-4),
        pytest.param("mxfp8", "none", 5e-3, marks=pytest.mark.slow),
        pytest.param("nvfp4", "full", 5e-3, marks=pytest.mark.slow),
    ],
)
def test_compiled_run_follows_the_eager_one(tmp_path, policy, recompute, close):
    """What is quantized may fall into another code where the compiler adds in another order."""
    keys = ("train.steps=4", "model.dtype=fp32", f"precision.policy={policy}", f"model.recompute={recompute}")
    for name, value in (("eager", "false"), ("compiled", "true")):
        done = train(tiny(tmp_path, name), *keys, f"train.compile={value}", timeout=300)
        assert done.returncode == 0, done.stderr
    torch.testing.assert_close(_losses(tmp_path / "eager"), _losses(tmp_path / "compiled"), rtol=close, atol=0)
