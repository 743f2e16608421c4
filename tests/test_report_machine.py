"""Manifest, peak FLOP/s and memory: facts about the machine against independent sources."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch

from errors import UsageError
from report import flops, manifest, memory
from report.flops import Peak
from report.manifest import Start

CPU = torch.device("cpu")
START = Start(step=0, recipe={"train": {"steps": 3}}, data={"a.bin": "ff"}, hosts=1, topology={"dp": 2})


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GB300", 2500),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1300),
        ("AMD Instinct MI355X", 2500),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_table(name: str, tera: float | None) -> None:
    row = flops.table_row(name)
    assert (row and row[0]) == (tera and tera * 1e12)


def test_gpu_takes_the_table_for_bf16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(flops, "measure_gemm", lambda *_: 7e12)
    monkeypatch.setattr(flops, "device_name", lambda _: "NVIDIA H200")
    known = flops.find_peak(device, torch.bfloat16)
    assert known.flops == 989e12 and not known.guessed and "https://" in known.source
    assert flops.find_peak(device, torch.float32).flops == 7e12
    monkeypatch.setattr(flops, "device_name", lambda _: "NVIDIA Next")
    unknown = flops.find_peak(device, torch.bfloat16)
    assert unknown.guessed and "*" in str(unknown) and "measured bfloat16" in unknown.source


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_measured_peak_on_cpu(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    start = time.perf_counter()
    peak = flops.find_peak(CPU, dtype)
    assert time.perf_counter() - start < 5  # half a second on an idle machine
    assert torch.equal(torch.get_rng_state(), before)
    a, b = torch.ones(2048, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype).T
    start = time.perf_counter()
    torch.mm(a, b)
    once = 2 * 2048 * 1024 * 1024 / (time.perf_counter() - start)
    assert once / 20 < peak.flops < 1e15  # best of many, whatever else runs
    assert not peak.guessed and f"{torch.get_num_threads()} threads" in peak.source


def test_mfu() -> None:
    peak = Peak(1e12, "test", guessed=False)
    assert flops.mfu(6e6, 1e5, peak) == pytest.approx(0.6)
    assert flops.mfu(6e6, 2e5, peak) is None
    assert peak.refuted_by(6e11) is None
    note = peak.refuted_by(1.2e12) or ""
    assert re.search(r"1\.2 TFLOP/s .* peak of 1 TFLOP/s \(test\).*wrong", note)


def test_cpu_memory_follows_an_allocation() -> None:
    before = memory.current_gib(CPU)
    block = torch.ones(2**26)  # 0.25 GiB
    assert memory.current_gib(CPU) - before == pytest.approx(0.25, abs=0.05)
    peak = memory.peak_gib(CPU)
    assert peak >= before + 0.2
    del block
    assert memory.peak_gib(CPU) == pytest.approx(peak, abs=0.01)  # the kernel counts in batches


def test_manifest_appends_starts(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = manifest.record_start(run_dir, START, CPU)
    manifest.record_start(run_dir, Start(**{**vars(START), "step": 7}), CPU)
    starts = json.loads((run_dir / "manifest.json").read_text())["starts"]
    assert starts[0] == first and [s["step"] for s in starts] == [0, 7]
    assert first["recipe"] == {"train": {"steps": 3}} and first["topology"] == {"dp": 2}
    assert first["versions"]["torch"] == torch.__version__ and first["hosts"] == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["time"])
    assert first["threads"] == torch.get_num_threads() and first["device"] == first["cpu"]
    assert not list(run_dir.glob("*.tmp"))


def test_manifest_holds_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-7f3a")
    manifest.record_start(tmp_path, START, CPU)
    text = (tmp_path / "manifest.json").read_text()
    assert "secret-7f3a" not in text and os.uname().nodename not in text


def test_damaged_manifest_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UsageError, match="manifest.json is not a run manifest"):
        manifest.record_start(tmp_path, START, CPU)


def test_git_state(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)
        return done.stdout.decode().strip()

    assert manifest.git_state(tmp_path) is None
    git("init")
    assert manifest.git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    clean = {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert manifest.git_state(tmp_path) == clean
    inner = tmp_path / "inner"
    inner.mkdir()
    assert manifest.git_state(inner) is None  # somebody else's repository around a copy of ours
    (tmp_path / "a").write_text("2")
    assert manifest.git_state(tmp_path) == {**clean, "dirty": True}


@pytest.mark.parametrize(
    ("instructions", "bf16_rate", "chosen"),
    [(False, 9e12, torch.float32), (True, 9e12, torch.bfloat16), (True, 1e11, torch.float32)],
)
def test_gemms_take_bf16_where_the_cpu_has_it_and_the_library_uses_it(monkeypatch, instructions, bf16_rate, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": instructions})
    monkeypatch.setattr(flops, "measure_gemm", lambda _, dtype: bf16_rate if dtype == torch.bfloat16 else 1e12)
    flops._bf16_gemm_is_faster.cache_clear()
    try:
        assert flops.faster_gemm(torch.bfloat16, torch.device("cpu")) == chosen
        assert flops.faster_gemm(torch.float32, torch.device("cpu")) == torch.float32
        assert flops.faster_gemm(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    finally:
        flops._bf16_gemm_is_faster.cache_clear()
