"""Optimizer step: low-precision states against torch's fused FP32 AdamW, in the same run.

Times are of one step over square matrices (`--side`, 1,024) with FP32 gradients and FP32 weights, as multiples of
torch.optim.AdamW(fused=True) on the same weights; from the fastest of interleaved repetitions, as a shared machine
can only slow one down. The bound of memory: an FP32 step moves 28 bytes a parameter, a 4-bit one 14; 4bit_r1 and
fp8lm read everything twice, as scales of whole tensors are found first.

    4bit     dynamic4_b128, linear4_b128         8bit    dynamic8_b256 twice          fp8    fp8_e4m3_b256 twice
    4bit_r1  dynamic4_b128, linear4_rank1        fp8lm   fp8_e4m3, fp16_scaled, FP16 master, BF16 weights and gradients
    bf16_sr  4bit, BF16 weights and gradients, no master, stochastic rounding; bf16_kahan, collage_plus likewise

    python -m bench.optimizer [--millions N] [--side N] [--threads N ...] [--device cuda] [--reference] [--json FILE|-]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from bench.common import fastest, parser, report
from lowprec import kernels
from lowprec.kernels import gpu
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


def parameters(shape: argparse.Namespace, dtype: torch.dtype) -> list[nn.Parameter]:
    """Square matrices of `shape.side` with gradients, `shape.millions` times 2^20 elements in all."""

    def draw(spread: float) -> torch.Tensor:
        return torch.randn(shape.side, shape.side, device=shape.device).mul_(spread).to(dtype)

    made = [nn.Parameter(draw(0.02)) for _ in range((shape.millions << 20) // shape.side**2)]
    for parameter in made:
        parameter.grad = draw(1e-3)
    return made


def optimizers(shape: argparse.Namespace) -> dict[str, torch.optim.Optimizer]:
    """torch's under the name "torch", ours under theirs. Weights and gradients of one dtype are shared."""
    shared = {dtype: parameters(shape, dtype) for dtype in (torch.float32, torch.bfloat16)}
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    made: dict[str, torch.optim.Optimizer] = {"torch": torch.optim.AdamW(shared[torch.float32], fused=True, **options)}
    for name, (storage, dtype) in VARIANTS.items():
        if name in shape.only:
            made[name] = AdamW(shared[dtype], **options, **storage)
    return made


def torchao_optimizers(shape: argparse.Namespace) -> dict[str, torch.optim.Optimizer]:
    """torchao's 4- and 8-bit AdamW; empty if torchao is not installed."""
    try:
        from torchao.optim import AdamW4bit, AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    shared = parameters(shape, torch.float32)
    return {"4bit_torchao": AdamW4bit(shared, lr=1e-4), "8bit_torchao": AdamW8bit(shared, lr=1e-4)}


def bytes_of_states(optimizer: torch.optim.Optimizer, count: int) -> float:
    """Bytes a parameter of what the optimizer keeps beside the weights, as allocated."""
    states = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return sum(t.nbytes for t in states) / count


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--millions", type=int, default=50, help="matrices of 2^20 parameters")
    options.add_argument("--side", type=int, default=1024, help="rows and columns of a matrix")
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--repetitions", type=int, default=7)
    options.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options.add_argument("--reference", action="store_true", help="also torchao's, where it is installed (slow)")
    arguments = options.parse_args()
    on_gpu = arguments.device == "cuda"
    if (reason := (gpu if on_gpu else kernels).unavailable_because()) is not None:
        raise SystemExit(f"the kernels are not available: {reason}")
    torch.manual_seed(0)
    made = optimizers(arguments)
    parameter_count = sum(weight.numel() for weight in made["torch"].param_groups[0]["params"])
    figures: dict[str, float | int | str] = {"parameters": parameter_count}
    figures["isa"] = torch.cuda.get_device_name() if on_gpu else torch.ops.lowprec_cpu.isa()
    for threads in arguments.threads[:1] if on_gpu else arguments.threads:
        torch.set_num_threads(threads)
        steps = {name: optimizer.step for name, optimizer in made.items()}
        seconds = fastest(steps, arguments.repetitions, arguments.device)
        if arguments.reference:
            steps = {name: optimizer.step for name, optimizer in torchao_optimizers(arguments).items()}
            seconds |= fastest(steps, 1, arguments.device)
        label = "" if on_gpu else f"_threads{threads}"
        figures[f"torch_ms{label}"] = seconds["torch"] * 1e3
        for name, value in seconds.items():
            if name != "torch":
                figures[f"{name}{label}"] = value / seconds["torch"]
    for name, optimizer in made.items():
        figures[f"{name}_state_bytes"] = bytes_of_states(optimizer, parameter_count)
    report(figures, arguments.json)


if __name__ == "__main__":
    main()
