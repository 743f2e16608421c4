"""Memory of this process on the device that it trains on, in GiB (2**30 bytes).

On a GPU: what PyTorch's allocator handed out (`memory_allocated`; the reserved pool is larger). On
a CPU: the resident set of the process, from /proc where there is one.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

GIB = 2**30


def current_gib(device: torch.device) -> float:
    """Memory in use now. On a CPU this needs /proc: elsewhere FileNotFoundError."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / GIB
    return _status_gib("VmRSS")


def peak_gib(device: torch.device) -> float:
    """The most that was in use since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if sys.platform == "linux":  # ru_maxrss is handed down by the launcher that started us
        return _status_gib("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _status_gib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / GIB
    raise KeyError(f"{field} is not in /proc/self/status")
