"""One linear, forward and backward, in each precision over the same linear in BF16: ratios of time, in one process.

    python -m bench.linear [--threads 2] [--repetitions 15] [--reference] [--json FILE|-]

Large is M 2048, K 1024, N 1024 (keys without suffix); small is M 1024, K 256, N 256 (`_small`). The baseline is the
model's own linear with the same FP32 gradient accumulator and the dtype of GEMMs that a run on this machine would
choose (`gemm_dtype`); for `_fp32_wgrad` both sides give the weight gradient in FP32. The weight's quantized copies are
made in each repetition, as in a run without gradient accumulation. `_plain` is the path without a compiler
(lowprec/reference.py). `_unpacked` keeps the saved input decoded. `mxfp8_torchao` is torchao's emulated MXFP8 linear.
Minimum over interleaved repetitions, of which the small shape has ten times as many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bench.common import parser, report
from lowprec import dispatch
from lowprec.apply import Precision, RunFacts
from lowprec.policy import Policy, PrecisionConfig, Rule
from model.linear import Linear
from recipe import load_policy
from report.flops import faster_gemm
from run.environment import keep_memory

POLICIES = ("mxfp8", "nvfp4", "fp8_current", "fp8_block", "mxfp4")
SHAPES = {"": (2048, 1024, 1024), "_small": (1024, 256, 256)}


def step(
    policy: str, shape: tuple[int, int, int], gemm_dtype: torch.dtype, wgrad: str = "bf16", pack: bool = True
) -> Callable[[], None]:
    """A function that runs one forward and backward; policy "bf16" with wgrad "bf16" is the model's own linear."""
    tokens, features, outputs = shape
    torch.manual_seed(0)
    linear = Linear(features, outputs, bias=False, dtype=torch.bfloat16, gemm_dtype=gemm_dtype)
    linear.weight.grad_dtype = torch.float32  # pyright: ignore[reportAttributeAccessIssue]
    model = nn.ModuleDict({"linear": linear})
    x = torch.randn(tokens, features).bfloat16().requires_grad_()
    dy = (torch.randn(tokens, outputs) * 1e-3).bfloat16()
    precision = None
    if policy != "bf16" or wgrad == "fp32":
        tree = load_policy(policy)
        tree = Policy(tree.schemes, (Rule("*", tree.rules[0].use),))
        config = PrecisionConfig(policy=policy, wgrad_output="fp32" if wgrad == "fp32" else "bf16", pack_saved=pack)
        facts = RunFacts(seed=0, steps=10, tokens_per_step=tokens, gemm_dtype=gemm_dtype, swap_all=True)
        precision = Precision([model], tree, config, facts)

    def run() -> None:
        if precision is not None:
            precision.begin_step(1)
        x.grad = None
        model["linear"](x).backward(dy)  # the weight's gradient accumulates, as over micro-batches

    return run


def torchao_step(shape: tuple[int, int, int]) -> Callable[[], None]:
    """The same with torchao's MXFP8 linear, its three GEMMs quantized too. Raises SystemExit without torchao."""
    try:
        from torchao.prototype.moe_training import mxfp8_linear  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(f"--reference needs torchao: pip install torchao ({error})") from None
    tokens, features, outputs = shape
    x = torch.randn(tokens, features).bfloat16().requires_grad_()
    weight = (torch.randn(outputs, features) * 0.02).bfloat16().requires_grad_()
    dy = (torch.randn(tokens, outputs) * 1e-3).bfloat16()
    kernels, scaling = mxfp8_linear.KernelPreference.EMULATED, mxfp8_linear.ScaleCalculationMode.RCEIL

    def run() -> None:
        x.grad = None
        mxfp8_linear._to_mxfp8_then_scaled_mm(x, weight, kernels, scaling).backward(dy)

    return run


@contextmanager
def plain_path() -> Iterator[None]:
    """Take the reference for everything, as on a machine without a compiler."""
    chosen = dispatch.path
    dispatch.path = lambda *_: dispatch.PLAIN
    try:
        yield
    finally:
        dispatch.path = chosen


def minimum(variants: dict[str, Callable[[], None]], repetitions: int) -> dict[str, float]:
    """Least seconds of each, called in turns after two calls that do not count."""
    best = dict.fromkeys(variants, float("inf"))
    for repetition in range(repetitions + 2):
        for name, function in variants.items():
            began = time.perf_counter()
            if name.endswith("_plain"):
                with plain_path():
                    function()
            else:
                function()
            if repetition >= 2:
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--repetitions", type=int, default=15)
    made.add_argument("--reference", action="store_true", help="also torchao's linear, where it is installed (slow)")
    options = made.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    gemm_dtype = faster_gemm(torch.bfloat16, torch.device("cpu"))
    figures: dict[str, float | int | str] = {"threads": options.threads, "gemm_dtype": str(gemm_dtype)}
    for suffix, shape in SHAPES.items():
        variants = {
            "bf16": step("bf16", shape, gemm_dtype),
            "bf16_fp32_wgrad": step("bf16", shape, gemm_dtype, "fp32"),
        }
        for policy in POLICIES:
            variants[policy] = step(policy, shape, gemm_dtype)
            variants[f"{policy}_unpacked"] = step(policy, shape, gemm_dtype, pack=False)
            variants[f"{policy}_fp32_wgrad"] = step(policy, shape, gemm_dtype, "fp32")
        if not suffix:
            variants["mxfp8_plain"] = step("mxfp8", shape, gemm_dtype)
            variants["nvfp4_plain"] = step("nvfp4", shape, gemm_dtype)
            if options.reference:
                variants["mxfp8_torchao"] = torchao_step(shape)
        seconds = minimum(variants, options.repetitions * (10 if suffix else 1))
        figures[f"bf16_ms{suffix}"] = 1e3 * seconds["bf16"]
        for name in variants:
            base = "bf16_fp32_wgrad" if name.endswith("_fp32_wgrad") else "bf16"
            if name != base:
                figures[f"{name}{suffix}"] = seconds[name] / seconds[base]
    report(figures, options.json)


if __name__ == "__main__":
    main()
