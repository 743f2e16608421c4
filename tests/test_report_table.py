"""README's table: figures of a bench, of the runs' own records, and gaps with their intervals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from report.table import BEGIN, END, main
from tests.curve_noise import baselines
from tests.test_compare_command import RECIPE

MEMORY = {"kind": "memory", "step": 1, "bytes": {"weights": 200, "master": 400, "exp_avg": 1200}, "parameters": 100}


def run(folder: Path, losses: np.ndarray, name: str, seed: int) -> str:
    folder.mkdir()
    steps = [{"kind": "step", "step": i, "samples": 8 * i, "loss": loss} for i, loss in enumerate(losses.tolist(), 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [MEMORY, *steps]))
    (folder / "resolved.yaml").write_text(RECIPE.format(name=name, seed=seed, policy=name, hidden=128))
    return str(folder)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    losses = baselines()
    runs = [run(tmp_path / f"base{i}", losses[i], "bf16", i) for i in range(3)]
    runs += [run(tmp_path / f"half{i}", losses[i] * 1.005, "half", i) for i in range(3)]
    runs += [run(tmp_path / f"one{i}", losses[i] * 1.01, "one", i) for i in range(2)]
    figures = {"hardware": "a CPU, 2 threads", "bf16_tokens_per_s": 1234.4, "half_tokens_per_s": 999.6}
    (tmp_path / "step.json").write_text(json.dumps(figures))
    return [*runs, "--baseline", "bf16", "--speed", str(tmp_path / "step.json")]


def test_the_table(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[2:] == [
        "| `bf16` | a CPU, 2 threads | 1,234 | 18.00 |  |",
        "| `half` | a CPU, 2 threads | 1,000 | 18.00 | +0.50 % (+0.50 to +0.50, seeds: 3) |",
        "| `one` | a CPU, 2 threads | not measured | 18.00 | +1.00 % (+1.00 to +1.00, seeds: 2) |",
    ]
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert main([*words, "--write", str(page)]) == 0
    assert page.read_text() == f"above\n{BEGIN}\n{table}{END}\nbelow\n"


def test_what_is_missing_is_said(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers")
    assert main([*words, "--write", str(page)]) == 2 and page.read_text() == "no markers"
    assert main([*words[6:], "--baseline", "bf16"]) == 2  # none of its runs
    assert main([*words, "--speed", str(tmp_path / "none.json")]) == 2
    assert main([str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    for message in (
        "needs the lines",
        "no run of the baseline bf16",
        "cannot be read as JSON",
        "holds no metrics.jsonl",
    ):
        assert message in said
