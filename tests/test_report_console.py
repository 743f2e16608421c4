"""The Megatron line as parsers read it; a live display on a terminal and nowhere else."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from report.console import Console, megatron_line, megatron_validation_line
from report.metrics import ValidationRecord
from tests.test_report_metrics import RECORD

ROOT = Path(__file__).parent.parent
NOW = datetime(2026, 11, 23, 9, 33, 6)
FLOAT = r"(\d+\.\d+(?:E[+-]\d+)?)"
STRICT = re.compile(  # fields in Megatron's order, as the strictest parsers expect them
    r"^ \[(\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2}\.\d{6})\] iteration\s+(\d+)/\s*(\d+) \|"
    r" consumed samples:\s+(\d+) \|"
    rf" elapsed time per iteration \(ms\): {FLOAT} \|"
    rf" throughput per GPU \(TFLOP/s/GPU\): {FLOAT} \|"
    rf" learning rate: {FLOAT} \|"
    r" global batch size:\s+(\d+) \|"
    rf"(?: lm loss: {FLOAT} \|)?"
    rf" loss scale: {FLOAT} \|"
    r" grad norm: (\d+\.\d+|nan|inf) \|"
    rf" params norm: {FLOAT} \|"
    r" number of skipped iterations:\s+(\d+) \|"
    r" number of nan iterations:\s+(\d+) \|$"
)
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def parse(line: str) -> tuple[str, ...]:
    match = STRICT.match(line)
    assert match, line
    return match.groups(default="")


def test_megatron_line_is_exact() -> None:
    record = replace(
        RECORD,
        step=1000,
        samples=256000,
        loss=3.147666,
        lr=9.999946e-05,
        grad_norm=0.514,
        param_norm=123.456,
        step_time_s=5.4846,
        tflops=250.1,
    )
    line = megatron_line([record], 20000, 256, NOW)
    assert line == (
        " [2026-11-23 09:33:06.000000] iteration     1000/   20000 |"
        " consumed samples:       256000 |"
        " elapsed time per iteration (ms): 5484.6 | throughput per GPU (TFLOP/s/GPU): 250.1 |"
        " learning rate: 9.999946E-05 | global batch size:   256 | lm loss: 3.147666E+00 |"
        " loss scale: 1.0 | grad norm: 0.514 | params norm: 123.456 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 |"
    )
    parse(line)
    # Loose parsers: one search for each field.
    assert re.findall(r"iteration\s+(\d+)\s*/\s*(\d+)", line) == [("1000", "20000")]
    assert [float(x) for x in re.findall(r"lm loss:\s*([\d.E+-]+)", line)] == [3.147666]
    assert [float(x) for x in re.findall(r"grad norm: +([\d.]+)", line)] == [0.514]
    assert [float(x) for x in re.findall(r"learning rate: (\S+) \|", line)] == [9.999946e-05]


def test_line_covers_its_interval() -> None:
    a = replace(RECORD, step=1, loss=4.0, step_time_s=1.0, tflops=1.0)
    b = replace(RECORD, step=2, loss=float("nan"), grad_norm=float("nan"), nan=True, skipped=True)
    c = replace(RECORD, step=3, loss=2.0, step_time_s=3.0, tflops=5.0)
    got = parse(megatron_line([a, replace(b, step_time_s=2.0, tflops=3.0), c], 3, 8, NOW))
    assert got[4:6] == ("2000.0", "3.7")  # (1*1 + 3*2 + 5*3) / 6 s
    assert float(got[8]) == 3.0 and got[12:] == ("1", "1")
    alone = parse(megatron_line([b], 3, 8, NOW))
    assert alone[8] == "" and alone[10] == "nan" and alone[12:] == ("1", "1")


def test_validation_line() -> None:
    record = ValidationRecord(step=200, tokens=1, samples=1, validation_loss=6.496762)
    line = megatron_validation_line(record)
    found = re.search(
        r"validation loss at iteration (\d+) \|"
        r" lm loss value: ([\d.E+]+) \| lm loss PPL: ([\d.E+]+) \|",
        line,
    )
    assert found and found.groups() == ("200", "6.496762E+00", "6.629914E+02")


def test_log_interval_and_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Console(tmp_path, global_batch=8, log_interval=2) as console:
        console.message("two\nlines")
        for step in range(1, 6):
            console.step(replace(RECORD, step=step, loss=float(step)), 5)
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "train.log").read_text()
    rows = [parse(line) for line in shown.splitlines()[2:]]
    assert [(row[1], float(row[8])) for row in rows] == [("2", 1.5), ("4", 3.5), ("5", 5.0)]


def test_log_is_appended_by_a_restart(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with Console(tmp_path, global_batch=8) as console:
            console.message(text)
    assert (tmp_path / "train.log").read_text() == "first\nsecond\n"


CHILD = """
import sys, time
from dataclasses import replace
from pathlib import Path
from report.console import open_console
from report.metrics import ValidationRecord
from tests.test_report_metrics import RECORD
run_dir, mode = Path(sys.argv[1]), sys.argv[2]
try:
    with open_console(run_dir, 8, mfu_mark="*") as console:
        console.message("hello [bold] before")
        for step in range(1, 4):
            console.step(replace(RECORD, step=step), 3)
        console.validation(ValidationRecord(step=3, tokens=1, samples=1, validation_loss=2.5))
        console.message("said while it trains")
        if mode == "error":
            raise RuntimeError("boom")
        if mode == "interrupt":
            for _ in range(600):  # a signal just before a long sleep would wait for its end
                time.sleep(0.1)
except KeyboardInterrupt:
    sys.exit(130)
"""


def command(run_dir: Path, mode: str) -> list[str]:
    return [sys.executable, "-c", CHILD, str(run_dir), mode]


def read_until(fd: int, text: str | None) -> str:
    """What a terminal received, up to `text` or to its end."""
    seen = b""
    while text is None or text.encode() not in seen:
        try:
            data = os.read(fd, 65536)
        except OSError:  # Linux: EIO where the other side has closed
            break
        if not data:
            break
        seen += data
    return seen.decode()


@pytest.mark.parametrize("mode, code", [("plain", 0), ("error", 1), ("interrupt", 130)])
def test_terminal_gets_a_live_display_and_is_restored(mode: str, code: int, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    child = subprocess.Popen(
        command(tmp_path, mode),
        cwd=ROOT,
        env=env,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    raw = ""
    if mode == "interrupt":
        raw = read_until(ours, "said while it trains")
        os.kill(child.pid, signal.SIGINT)
    raw += read_until(ours, None)
    os.close(ours)
    errors = child.communicate(timeout=60)[1].decode()
    assert child.returncode == code, errors
    assert ("boom" in errors) == (mode == "error")
    shown = ANSI.sub("", raw)
    assert "step 3/3" in shown and "ETA 0:00:00" in shown and "loss 4.1000" in shown
    assert "4,096 tokens/s" in shown and "MFU 50.0%*" in shown
    assert "validation 2.5000 (step 3)" in shown
    assert "hello [bold] before" in shown and "said while it trains" in shown
    assert "consumed samples" not in shown and "lm loss" not in shown
    assert raw.rfind("\x1b[?25h") > raw.rfind("\x1b[?25l") >= 0  # the cursor is back
    check_log(tmp_path)


def test_pipe_gets_megatron_lines_and_no_display(tmp_path: Path) -> None:
    env = {**os.environ, "FORCE_COLOR": "1"}  # colour is not a terminal
    done = subprocess.run(command(tmp_path, "plain"), cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "ETA" not in done.stdout
    assert done.stdout == (tmp_path / "train.log").read_text()
    check_log(tmp_path)


def check_log(run_dir: Path) -> None:
    lines = (run_dir / "train.log").read_text().splitlines()
    assert lines[0] == "hello [bold] before" and lines[-1] == "said while it trains"
    assert [parse(line)[1] for line in lines[1:4]] == ["1", "2", "3"]
    assert lines[4].startswith(" validation loss at iteration 3 | lm loss value: 2.500000E+00")
