"""Transformer Engine with its own kernels, on a GPU: every check of tests/gpu_te.py, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

HERE = any(each.metadata["Name"] == "transformer_engine_torch" for each in distributions())
WHY = "there is no CUDA device" if not torch.cuda.is_available() else "Transformer Engine's compiled part is missing"


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and HERE), reason=WHY)
@pytest.mark.parametrize("check", ["custom", "own_recipes", "defects", "training", "throughput"])
def test_on_a_gpu(check):
    command = [sys.executable, "-m", "tests.gpu_te", check]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=1200)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
