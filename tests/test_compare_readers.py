"""Every log format on a small sample of it, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from errors import UsageError
from report.compare.readers import read_curve

MEGATRON = """
using world size: 8, data-parallel size: 8
 [2026-11-23 09:33:06.000000] iteration        2/   20000 | consumed samples:          512 | elapsed time per iteration (ms): 5484.6 | throughput per GPU (TFLOP/s/GPU): 250.1 | learning rate: 9.999946E-05 | global batch size:   256 | lm loss: 3.147666E+00 | loss scale: 1.0 | grad norm: 0.514 | num zeros: 0 | params norm: 123.456 | number of skipped iterations:   0 | number of nan iterations:   0 |
7: [2026-11-23 09:33:16.000000] iteration        4/   20000 | consumed samples:         1024 | elapsed time per iteration (ms): 5000.0 | learning rate: 9.999946E-05 | global batch size:   256 | loss scale: 1.0 | grad norm: nan | number of skipped iterations:   2 | number of nan iterations:   2 |
validation loss at iteration 4 | lm loss value: 6.496762E+00 | lm loss PPL: 6.629913E+02 |
 [2026-11-23 09:33:26.000000] iteration        6/   20000 | consumed samples:         1536 | elapsed time per iteration (ms): 5000.0 | lm loss: 9.000000E+00 | grad norm: 1.0 |
 [2026-11-23 09:43:26.000000] iteration        6/   20000 | consumed samples:         1536 | elapsed time per iteration (ms): 5000.0 | lm loss: 3.000000E+00 | grad norm: 1.0 |
"""  # noqa: E501
TITAN = (
    "[titan] 2026-08-21 10:00:00,000 - root - INFO - \x1b[31mstep:  1  \x1b[32mloss:  8.1880  \x1b[38;2;180;60;0m"
    "grad_norm:  1.4231  \x1b[36mmemory:  4.88GiB(6.16%)  \x1b[34mtps: 13,785  \x1b[36mtflops: 71.02  \x1b[35mmfu: 7%"
    "\x1b[39m\n[titan] root - INFO - step: 1,000  loss:     nan  grad_norm:  0.5000  memory:  4.88GiB(6.16%)\n"
    "[titan] root - INFO - validate step: 1,000  loss:  7.5000  memory:  4.88GiB(6.16%)  tps: 13,785\n"
)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_megatron(tmp_path: Path) -> None:
    curve = read_curve(write(tmp_path / "pretrain.txt", MEGATRON))
    assert curve.kind == "Megatron-LM log" and curve.step.tolist() == [2, 4, 6] and curve.spacing == 2
    assert np.array_equal(curve.loss, [3.147666, math.nan, 3.0], equal_nan=True)  # the repeated step: the later line
    assert np.array_equal(curve.grad_norm, [0.514, math.nan, 1.0], equal_nan=True)
    assert curve.samples.tolist() == [512, 1024, 1536] and curve.skipped.tolist() == [0, 2, 0]
    assert curve.nan.tolist() == [0, 2, 0] and curve.validation == {4: 6.496762}
    assert curve.seconds_since_start[-1] == pytest.approx(2 * (5.4846 + 5 + 5))


def test_torchtitan(tmp_path: Path) -> None:
    path = write(tmp_path / "titan.log", TITAN)
    curve = read_curve(path)
    assert curve.kind == "torchtitan log" and curve.step.tolist() == [1, 1000]
    assert curve.loss[0] == 8.188 and math.isnan(curve.loss[1]) and curve.nan.tolist() == [0, 1]
    assert curve.grad_norm.tolist() == [1.4231, 0.5] and curve.validation == {1000: 7.5}
    with pytest.raises(UsageError, match="has one name"):
        read_curve(path, "lm loss")


def test_run_directory_tells_recipe_data_and_seed(tmp_path: Path) -> None:
    lines = [
        {"kind": "receipt", "step": 1, "gemms": {}},
        {"kind": "step", "step": 1, "tokens": 2048, "samples": 8, "loss": 7.5, "grad_norm": 1.5, "nan": False},
        {"kind": "step", "step": 2, "tokens": 4096, "samples": 16, "loss": None, "grad_norm": None, "nan": True},
        {"kind": "validation", "step": 2, "validation_loss": 7.25},
    ]
    text = "\n".join(map(json.dumps, lines))
    write(tmp_path / "metrics.jsonl", text + '\n{"kind": "step", "st')  # torn by a kill
    write(tmp_path / "resolved.yaml", "name: bf16_10m\ntrain:\n  seed: 7\n  steps: 2\n")
    data = [{"role": "validation", "bin_sha256": "00"}, {"role": "train", "bin_sha256": "ab"}]
    write(tmp_path / "manifest.json", json.dumps({"starts": [{"data": data}]}))
    curve = read_curve(tmp_path)
    assert curve.step.tolist() == [1, 2] and curve.loss[0] == 7.5 and curve.nan.tolist() == [0, 1]
    assert curve.tokens.tolist() == [2048, 4096] and curve.validation == {2: 7.25}
    assert curve.seed == 7 and curve.data == ("ab",) and curve.recipe["name"] == "bf16_10m"
    assert read_curve(tmp_path / "metrics.jsonl").seed == 7


def test_kept_baselines_of_the_bench(tmp_path: Path) -> None:
    kept = next(Path(__file__).parent.parent.glob("bench/baselines/*_seed1.jsonl"))
    curve = read_curve(kept)
    assert curve.seed == 1 and len(curve.step) == 500 and list(curve.validation) == [500]


def test_csv(tmp_path: Path) -> None:
    plain = read_curve(write(tmp_path / "a.csv", "Step,loss,grad_norm,val_loss\n1,4.5,1.0,\n2,nan,,4.4\n\n"))
    assert plain.kind == "CSV" and plain.step.tolist() == [1, 2] and plain.validation == {2: 4.4}
    assert plain.loss[0] == 4.5 and math.isnan(plain.loss[1]) and math.isnan(plain.grad_norm[1])
    wandb = '"Step";"run-1 - lm loss";"run-1 - lm loss__MIN"\n1;4.5;4.5\n2;4.25;4.25\n'
    assert read_curve(write(tmp_path / "b.csv", wandb)).loss.tolist() == [4.5, 4.25]
    named = read_curve(write(tmp_path / "c.csv", "iteration\tnll\n10\t4.5\n20\t4.0\n"), "nll")
    assert named.loss.tolist() == [4.5, 4.0] and named.spacing == 10


def test_tensorboard(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in (1, 2):
            writer.add_scalar("lm loss", 4.0 / step, step)
            writer.add_scalar("grad-norm", 0.5, step)
        writer.add_scalar("lm loss validation", 1.75, 2)
    curve = read_curve(tmp_path)
    assert curve.kind == "TensorBoard" and curve.loss.tolist() == [4.0, 2.0] and curve.validation == {2: 1.75}
    assert read_curve(next(tmp_path.glob("*tfevents*"))).grad_norm.tolist() == [0.5, 0.5]
    with pytest.raises(UsageError, match="no scalar nll; it has"):
        read_curve(tmp_path, "nll")


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    write(tmp_path / "events.out.tfevents.1", "")
    with pytest.raises(UsageError, match="pip install tensorboard"):
        read_curve(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("hello\nworld", "first line is 'hello'"),
        ("step,time\n1,2\n", "has no column loss"),
        ("step,loss\n1,2,3\n", "line 2: 3 cells under 2 columns"),
        ("step,loss\n1,four\n", "'four' is not a number"),
        ("step,loss\n1.5,4\n", "'1.5' is not a step"),
        ("step,a - loss,b - loss\n1,2,3\n", "could all be the loss"),
        ('{"step": 1, "loss": 4}\nbroken\n{"step": 2, "loss": 4}\n', "line 2: not JSON: 'broken'"),
        ('{"step": 1, "loss": 4}\n[1]\n', "line 2: not a JSON object"),
        ('{"step": null, "loss": 4}\n', "is not a step"),
        ('{"step": true, "loss": "x"}\n', "'x' is not a number"),
        ('{"step": 1e999, "loss": 1}\n', "is not a step"),
        ('{"kind": "receipt", "step": 1}\n', "holds no training loss"),
        (" iteration 1/ 2 | lm loss: what |\n", "iteration 1: 'what' is not a number"),
        ("a\0b", "binary file"),
    ],
)
def test_the_unreadable_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        read_curve(write(tmp_path / "log", text))
    assert message in str(error.value) and str(tmp_path / "log") in str(error.value)


def test_missing_files_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read .*nowhere: No such file"):
        read_curve(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="neither metrics.jsonl nor TensorBoard"):
        read_curve(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"), [("resolved.yaml", "- 1\n"), ("manifest.json", "{}"), ("manifest.json", "{")]
)
def test_a_broken_recipe_or_manifest_beside_a_log_is_said(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path / "metrics.jsonl", '{"step": 1, "loss": 4}\n')
    write(tmp_path / name, text)
    with pytest.raises(UsageError, match=name):
        read_curve(tmp_path)
