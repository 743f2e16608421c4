"""Optimizer step: low-precision states against torch's fused FP32 AdamW, in the same run.

Times are of one step over matrices of 1,024 x 1,024 with FP32 gradients and FP32 weights, as multiples of
torch.optim.AdamW(fused=True) on the same weights; from the fastest of interleaved repetitions, as a shared machine
can only slow one down. The bound of memory: an FP32 step moves 28 bytes a parameter, a 4-bit one 14; 4bit_r1 and
fp8lm read everything twice, as scales of whole tensors are found first.

    4bit     dynamic4_b128, linear4_b128         8bit    dynamic8_b256 twice          fp8    fp8_e4m3_b256 twice
    4bit_r1  dynamic4_b128, linear4_rank1        fp8lm   fp8_e4m3, fp16_scaled, FP16 master, BF16 weights and gradients
    bf16_sr  4bit, BF16 weights and gradients, no master, stochastic rounding; bf16_kahan, collage_plus likewise

    python -m bench.optimizer [--millions N] [--threads N ...] [--reference] [--json FILE|-]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.common import parser, report
from lowprec import kernels
from lowprec.optim import AdamW

_FOUR = {"exp_avg": "dynamic4_b128", "exp_avg_sq": "linear4_b128"}
_BF16 = {"exp_avg": "bf16", "exp_avg_sq": "bf16", "master": "none"}

# name -> (options of the optimizer, dtype of weights and gradients)
VARIANTS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "fp32": ({}, torch.float32),
    "4bit": (_FOUR, torch.float32),
    "4bit_r1": ({"exp_avg": "dynamic4_b128", "exp_avg_sq": "linear4_rank1"}, torch.float32),
    "8bit": ({"exp_avg": "dynamic8_b256", "exp_avg_sq": "dynamic8_b256"}, torch.float32),
    "fp8": ({"exp_avg": "fp8_e4m3_b256", "exp_avg_sq": "fp8_e4m3_b256"}, torch.float32),
    "fp8lm": ({"exp_avg": "fp8_e4m3", "exp_avg_sq": "fp16_scaled", "master": "fp16_scaled"}, torch.bfloat16),
    "bf16_sr": (_FOUR | {"master": "none", "update": "stochastic"}, torch.bfloat16),
    "bf16_kahan": (_BF16 | {"update": "kahan"}, torch.bfloat16),
    "collage_plus": (_BF16 | {"update": "collage_plus"}, torch.bfloat16),
}


def parameters(millions: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """`millions` matrices of 2^20 elements with gradients."""
    made = [nn.Parameter(torch.randn(1024, 1024).mul_(0.02).to(dtype)) for _ in range(millions)]
    for parameter in made:
        parameter.grad = torch.randn(1024, 1024).mul_(1e-3).to(dtype)
    return made


def optimizers(millions: int) -> dict[str, torch.optim.Optimizer]:
    """torch's under the name "torch", ours under theirs. Weights and gradients of one dtype are shared."""
    shared = {dtype: parameters(millions, dtype) for dtype in (torch.float32, torch.bfloat16)}
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    made: dict[str, torch.optim.Optimizer] = {"torch": torch.optim.AdamW(shared[torch.float32], fused=True, **options)}
    for name, (storage, dtype) in VARIANTS.items():
        made[name] = AdamW(shared[dtype], **options, **storage)
    return made


def torchao_optimizers(millions: int) -> dict[str, torch.optim.Optimizer]:
    """torchao's 4- and 8-bit AdamW; empty if torchao is not installed."""
    try:
        from torchao.optim import AdamW4bit, AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    shared = parameters(millions, torch.float32)
    return {"4bit_torchao": AdamW4bit(shared, lr=1e-4), "8bit_torchao": AdamW8bit(shared, lr=1e-4)}


def fastest(variants: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Least seconds of each function, called in turns after one uncounted call each."""
    best = dict.fromkeys(variants, float("inf"))
    for repetition in range(repetitions + 1):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            if repetition:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def bytes_of_states(optimizer: torch.optim.Optimizer, count: int) -> float:
    """Bytes a parameter of what the optimizer keeps beside the weights, as allocated."""
    states = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return sum(t.nbytes for t in states) / count


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--millions", type=int, default=50, help="matrices of 2^20 parameters")
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument("--repetitions", type=int, default=7)
    options.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options.add_argument("--reference", action="store_true", help="also torchao's, where it is installed (slow)")
    arguments = options.parse_args()
    if (reason := kernels.unavailable_because()) is not None:
        raise SystemExit(f"the kernels are not available: {reason}")
    torch.manual_seed(0)
    made = {name: o for name, o in optimizers(arguments.millions).items() if name in ("torch", *arguments.only)}
    figures: dict[str, float | int | str] = {"parameters": arguments.millions << 20, "isa": torch.ops.lowprec_cpu.isa()}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        seconds = fastest({name: optimizer.step for name, optimizer in made.items()}, arguments.repetitions)
        if arguments.reference:
            theirs = torchao_optimizers(arguments.millions)
            seconds |= fastest({name: optimizer.step for name, optimizer in theirs.items()}, 1)
        figures[f"torch_ms_threads{threads}"] = seconds["torch"] * 1e3
        for name, value in seconds.items():
            if name != "torch":
                figures[f"{name}_threads{threads}"] = value / seconds["torch"]
    for name, optimizer in made.items():
        figures[f"{name}_state_bytes"] = bytes_of_states(optimizer, arguments.millions << 20)
    report(figures, arguments.json)


if __name__ == "__main__":
    main()
