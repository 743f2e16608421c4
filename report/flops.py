"""Peak FLOP/s of a device, and model FLOP/s utilization (MFU) against it.

    mfu = flops_per_token * tokens_per_s_per_device / peak

The peak of a known GPU is its data sheet's *dense* BF16 number (data sheets print the sparse one,
twice as large). Every other peak is measured: the best of a few GEMMs in the run's own dtype, in
under half a second, by as many threads as the run uses. Ranks that share a machine should measure
at the same time, so that each gets the share of the cores and of the power that it will train with.
A measured peak is what this library's GEMM attains, so an MFU against it is higher than one against
a data sheet; `Peak.source` is printed with every MFU.

An unknown GPU is measured too and marked "*", since its data sheet would say more.
"""

from __future__ import annotations

import math
import platform
import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

NVIDIA = "https://www.nvidia.com/en-us/data-center/"
AMD = "https://www.amd.com/en/products/accelerators/instinct/"

# Name as CUDA/ROCm reports it (regular expression, first match wins), dense BF16 FLOP/s, source.
BF16_DENSE = (
    (r"\bA100\b", 312e12, NVIDIA + "a100/"),
    (r"\bH100 NVL\b", 835e12, NVIDIA + "h100/"),
    (r"\bH100 PCIe\b", 756e12, NVIDIA + "h100/"),
    (r"\bH100\b", 989e12, NVIDIA + "h100/"),
    (r"\bH200 NVL\b", 835e12, NVIDIA + "h200/"),
    (r"\bH200\b", 989e12, NVIDIA + "h200/"),
    (r"\bGH200\b", 989e12, NVIDIA + "grace-hopper-superchip/"),
    (r"\bH20\b", 148e12, "torchtitan/tools/utils.py (NVIDIA has no public page)"),
    (r"\bL40S\b", 362e12, NVIDIA + "l40s/"),
    (r"\bGB[23]00\b", 2500e12, NVIDIA + "gb200-nvl72/"),
    (r"\bB[23]00\b", 2250e12, NVIDIA + "hgx/"),
    (r"\bMI250X\b", 191.5e12, AMD + "mi200/mi250x.html (one of its two dies)"),
    (r"\bMI300X\b", 1300e12, AMD + "mi300/mi300x.html"),
    (r"\bMI325X\b", 1300e12, AMD + "mi300/mi325x.html"),
    (r"\bMI355X\b", 2500e12, AMD + "mi350/mi355x.html"),
)

# (M, K, N), growing: a slow device stops early, a fast one needs the large ones to fill its units.
GEMMS = ((2048, 1024, 1024), (4096, 2048, 2048), (8192, 8192, 8192))
MEASURE_S = 0.3


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of one device; `guessed` when a data sheet should replace the measurement."""

    flops: float
    source: str
    guessed: bool

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.4g} TFLOP/s{'*' if self.guessed else ''} ({self.source})"

    def refuted_by(self, flops_per_s: float) -> str | None:
        """Why `flops_per_s` of one device cannot be compared with this peak; None when it can."""
        if flops_per_s <= self.flops:
            return None
        return (
            f"the model runs at {flops_per_s / 1e12:.4g} TFLOP/s a device, above the peak of "
            f"{self}: that peak is wrong, MFU is not reported (null in metrics.jsonl)"
        )


def mfu(flops_per_token: float, tokens_per_s_per_device: float, peak: Peak) -> float | None:
    """Fraction of the peak that the model's own FLOPs use; None where the peak is refuted."""
    achieved = flops_per_token * tokens_per_s_per_device
    return None if peak.refuted_by(achieved) else achieved / peak.flops


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Peak of `device` for GEMMs in `dtype`: the table for BF16 on a known GPU, else measured."""
    name = device_name(device)
    row = table_row(name) if device.type == "cuda" and dtype == torch.bfloat16 else None
    if row is not None:
        return Peak(row[0], f"dense BF16 of {name}, {row[1]}", guessed=False)
    flops = measure_gemm(device, dtype)
    kind = str(dtype).removeprefix("torch.")
    where = name if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    return Peak(flops, f"measured {kind} GEMM on {where}", guessed=device.type == "cuda")


def faster_gemm(model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`model_dtype`, but FP32 on a CPU whose BF16 GEMMs are slower than its FP32 ones.

    Without BF16 instructions they are 3 to 70 times slower, and nothing is measured. With them they are several times
    faster, unless the library makes no use of them, which a measurement tells: less than a second, once a process.
    Both are far from even, so the same machine always chooses, and computes, the same.
    """
    if device.type == "cuda" or model_dtype != torch.bfloat16:
        return model_dtype
    has_bf16 = any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)
    return torch.bfloat16 if has_bf16 and _bf16_gemm_is_faster() else torch.float32


@cache
def _bf16_gemm_is_faster() -> bool:
    cpu = torch.device("cpu")
    return measure_gemm(cpu, torch.bfloat16) > measure_gemm(cpu, torch.float32)


def table_row(name: str) -> tuple[float, str] | None:
    """(dense BF16 FLOP/s, source) of a GPU by name; None when unknown, or a slice (MIG) of one."""
    if "MIG" in name:
        return None
    return next((row[1:] for row in BF16_DENSE if re.search(row[0], name)), None)


def device_name(device: torch.device) -> str:
    """Name of the GPU, or model of the CPU (its architecture where the system hides the model)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    """Model of the CPU; its architecture where the system does not say."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.machine()


def measure_gemm(device: torch.device, dtype: torch.dtype) -> float:
    """Best FLOP/s of torch.mm over GEMMS in about MEASURE_S seconds; the random state is not used.

    The shapes take turns, so that one slow moment decides nothing; what no longer fits is left out.
    """
    best = 0.0
    operands: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    end = time.perf_counter() + MEASURE_S
    while time.perf_counter() < end:
        for shape in GEMMS:
            work = 2 * math.prod(shape)
            if best and time.perf_counter() + work / best > end:
                break  # the larger ones fit even less
            if shape not in operands:
                operands[shape] = _operands(*shape, device, dtype)
                torch.mm(*operands[shape])  # the first call chooses a kernel
            _finish(device)
            start = time.perf_counter()
            torch.mm(*operands[shape])
            _finish(device)
            best = max(best, work / (time.perf_counter() - start))
    return best


def _operands(m: int, k: int, n: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x_MK and w_NK.T of varied values: zeros would draw less power and run faster than data."""
    x_MK = torch.linspace(-1, 1, m * k, device=device).view(m, k).to(dtype)
    w_NK = torch.linspace(-1, 1, n * k, device=device).view(n, k).to(dtype)
    return x_MK, w_NK.T


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
