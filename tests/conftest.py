"""What every process of tests shares.

One CPU thread: the workers of pytest-xdist share the cores, and threads that wait spin. No deadline for an example of
hypothesis: on a busy machine any of them may be slow. Interrupts are not ignored: background jobs of a shell do, and
so would the runs that tests interrupt.
"""

import os
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """A folder of programs that stand before all others in PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder
