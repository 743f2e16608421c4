"""Quantization: the fused kernels against a BF16 copy, the plain torch path, and torchao where it is installed.

Each figure is a multiple of the time of `Tensor.copy_` of the same BF16 matrix to a fresh tensor in the same process,
from the fastest of many interleaved repetitions: a shared machine can only slow a repetition down. The plain names are
operands (quantized and decoded to BF16, what a GEMM takes), `_pack` writes codes and scales (saved activations),
`_unpack` reads them; `_save` is what linears keep on a CPU, codes as the matrix lies. With `--device cuda` the kernels
are Triton's, and the matrix should be a large one:

    mxfp8_row, mxfp8_col, ...    nearest; the amax of blocks needs no pass of its own
    nvfp4_row                    nearest, tensor amax given; `_amax`: found first, one more pass
    nvfp4_col_full               the wgrad operand of a gradient: amax of the rotated columns, Hadamard 16, stochastic

    python -m bench.quantize [--rows N] [--cols N] [--threads N] [--device cuda] [--reference] [--json FILE|-]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.common import fastest, parser, report
from lowprec import kernels, reference
from lowprec.formats import QuantSpec, resolve_spec
from lowprec.kernels import gpu
from lowprec.philox import RandomKey
from lowprec.quantized import Axis

_KEY = RandomKey(seed=1, tensor="bench", slot="wgrad.a", step=3)
_SR: dict[str, Any] = {"rounding": "stochastic"}

# name -> (spec, axis, whether the tensor's amax is given)
CASES: dict[str, tuple[QuantSpec, Axis, bool]] = {
    "mxfp8_row": (resolve_spec("mxfp8_e4m3"), -1, False),
    "mxfp8_col": (resolve_spec("mxfp8_e4m3"), 0, False),
    "mxfp8_row_sr": (resolve_spec("mxfp8_e4m3", **_SR), -1, False),
    "mxfp4_row": (resolve_spec("mxfp4"), -1, False),
    "mxfp4_col": (resolve_spec("mxfp4"), 0, False),
    "nvfp4_row": (resolve_spec("nvfp4"), -1, True),
    "nvfp4_row_amax": (resolve_spec("nvfp4"), -1, False),
    "nvfp4_row_amax_sr": (resolve_spec("nvfp4", **_SR), -1, False),
    "nvfp4_col": (resolve_spec("nvfp4"), 0, True),
    "nvfp4_col_full": (resolve_spec("nvfp4", hadamard=16, **_SR), 0, False),
    "nvfp4_2d_amax": (resolve_spec("nvfp4_2d"), -1, False),
    "fp8_row": (resolve_spec("fp8_e4m3"), -1, True),
    "fp8_row_amax": (resolve_spec("fp8_e4m3"), -1, False),
    "fp8_1x128_row": (resolve_spec("fp8_block_1x128"), -1, False),
    "fp8_1x128_col": (resolve_spec("fp8_block_1x128"), 0, False),
    "fp8_128x128": (resolve_spec("fp8_block_128x128"), -1, False),
}


def kernel_variants(x: Tensor) -> dict[str, Callable[[], object]]:
    """Every case as operand, and packed and unpacked where a linear saves it so."""
    variants: dict[str, Callable[[], object]] = {}
    fused: Any = gpu if x.is_cuda else kernels
    whole = x.abs().amax().float()
    for name, (spec, axis, given) in CASES.items():
        call = {"axis": axis, "key": _KEY, "amax": whole if given else None}
        variants[name] = partial(fused.operand, x, spec, **call)
        if name in ("mxfp8_row", "mxfp8_col", "nvfp4_row", "nvfp4_col", "nvfp4_col_full", "fp8_row_amax"):
            variants[f"{name}_pack"] = partial(fused.quantize, x, spec, **call)
            variants[f"{name}_unpack"] = partial(fused.unpack, fused.quantize(x, spec, **call))
            if not x.is_cuda and axis == 0:
                variants[f"{name}_save"] = partial(fused.quantize, x, spec, upright=True, **call)
                variants[f"{name}_save_unpack"] = partial(fused.unpack, fused.quantize(x, spec, upright=True, **call))
    variants["amax"] = partial(fused.amax, x)
    variants["amax_rotated_col"] = partial(fused.amax, x, CASES["nvfp4_col_full"][0], axis=0)
    return variants


def reference_variants(x: Tensor) -> dict[str, Callable[[], object]]:
    """The plain path that machines without a compiler take."""
    return {
        f"{name}_reference": partial(reference.operand, x, spec, axis=axis, seed=_KEY)
        for name, (spec, axis, _) in CASES.items()
        if name in ("mxfp8_row", "mxfp8_col", "nvfp4_row", "nvfp4_col_full", "fp8_row_amax")
    }


def torchao_variants(x: Tensor) -> dict[str, Callable[[], object]]:
    """torchao's quantize-dequantize of the same formats; empty if torchao is not installed."""
    try:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode  # pyright: ignore[reportMissingImports]
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    rceil = ScaleCalculationMode.RCEIL
    return {
        "mxfp8_row_torchao": lambda: MXTensor.to_mx(x, torch.float8_e4m3fn, 32, rceil).dequantize(torch.bfloat16),
        "nvfp4_row_torchao": lambda: NVFP4Tensor.to_nvfp4(x).dequantize(torch.bfloat16),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=4096)
    options.add_argument("--cols", type=int, default=1024)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--repetitions", type=int, default=40)
    options.add_argument("--reference", action="store_true", help="also the plain path and torchao (slow)")
    arguments = options.parse_args()
    on_gpu = arguments.device == "cuda"
    if (reason := (gpu if on_gpu else kernels).unavailable_because()) is not None:
        raise SystemExit(f"the kernels are not available: {reason}")
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(arguments.rows, arguments.cols, generator=generator).bfloat16().to(arguments.device)
    # a fresh destination for each copy, as a quantizer has for its result
    copy: dict[str, Callable[[], object]] = {"copy": lambda: torch.empty_like(x).copy_(x)}
    seconds = fastest(copy | kernel_variants(x), arguments.repetitions, x.device)
    figures: dict[str, float | int | str] = {"elements": x.numel(), "threads": arguments.threads}
    figures["isa"] = torch.cuda.get_device_name() if on_gpu else torch.ops.lowprec_cpu.isa()
    figures["copy_ms"] = seconds["copy"] * 1e3
    if arguments.reference:
        seconds |= fastest(reference_variants(x) | torchao_variants(x), 3, x.device)
    figures |= {name: value / seconds["copy"] for name, value in seconds.items() if name != "copy"}
    report(figures, arguments.json)


if __name__ == "__main__":
    main()
