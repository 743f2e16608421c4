"""The Triton kernels against lowprec/reference.py; run by tests/test_kernels_triton.py, not collected by itself.

    TRITON_INTERPRET=1 pytest -o addopts= -m "not slow" tests/triton_cases.py

The variable has to be set before Triton is imported, so a process of its own does it. The interpreter takes tens of
milliseconds a launch: matrices are few. Without the variable the same tests run on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowprec import reference
from lowprec.formats import SPECS, QuantSpec, resolve_spec
from lowprec.kernels import gpu
from lowprec.kernels.gpu import ops
from lowprec.philox import RandomKey
from lowprec.quantized import Axis
from tests.kernel_cases import CASES, KEY, STOCHASTIC, assert_same, matrices

if reason := gpu.unavailable_because():
    pytest.skip(reason, allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (18, 70)  # ragged in every block, and more than one tile both ways for most
AXES: tuple[Axis, ...] = (-1, 0)

MXFP4 = resolve_spec("mxfp4", **STOCHASTIC, hadamard=64, signs="call", three_quarters=True)
NVFP4 = resolve_spec("nvfp4", **STOCHASTIC, hadamard=16)
FAST: dict[str, QuantSpec] = {
    **SPECS,
    "mxfp4 of the recipe": MXFP4,
    "nvfp4 of the recipe": NVFP4,
    "nvfp4_2d stochastic": resolve_spec("nvfp4_2d", **STOCHASTIC),
    "fp8_e5m2 stochastic, rotated": resolve_spec("fp8_e5m2", **STOCHASTIC, hadamard=32, signs="call"),
    "mxfp8_e4m3 even": resolve_spec("mxfp8_e4m3", scale_rule="even"),
    "mxfp8_e5m2 ceil, rotated": resolve_spec("mxfp8_e5m2", scale_rule="ceil", hadamard=128),
    "nvfp4 ue5m3": resolve_spec("nvfp4", scale="ue5m3"),
    "nvfp4 one level": resolve_spec("nvfp4", two_level=False),
}
MORE: dict[str, QuantSpec] = {
    **CASES,
    "one level ue5m3": resolve_spec("nvfp4", two_level=False, scale="ue5m3"),
    "e4m3 away": resolve_spec("mxfp8_e4m3", rounding="nearest_away"),
    "e2m1 toward zero": resolve_spec("nvfp4", rounding="toward_zero"),
    "generic e7m0": resolve_spec("mxfp8_e5m2", element="e7m0"),
    "generic e0m3": resolve_spec("mxfp4", element="e0m3"),
    "blocks of 4 x 8": resolve_spec("mxfp8_e4m3", block=(4, 8)),
    "blocks of 1": resolve_spec("mxfp8_e4m3", block=(1, 1)),
}


def compare(x: Tensor, spec: QuantSpec, axis: Axis, key: RandomKey = KEY, **given: Tensor) -> None:
    """operand, quantize and unpack of x against the reference; `given` is an amax or an encode_scale."""
    output = torch.bfloat16 if spec.exact_in_bf16 else torch.float32
    ours = {("scale" if name == "encode_scale" else name): t.to(DEVICE) for name, t in given.items()}

    def same(one: Tensor | None, truth: Tensor | None) -> None:
        assert_same(one if one is None else one.cpu(), truth)

    for a, b in zip(
        gpu.operand(x.to(DEVICE), spec, axis=axis, key=key, dtype=output, **ours),
        reference.operand(x, spec, axis=axis, seed=key, dtype=output, **given),
        strict=True,
    ):
        same(a, b)
    packed = gpu.quantize(x.to(DEVICE), spec, axis=axis, key=key, **ours)
    truth = reference.quantize(x, spec, axis=axis, seed=key, **given)
    same(packed.codes, truth.codes)
    same(packed.scales, truth.scales)
    same(packed.amax, truth.amax)
    for a, b in zip(gpu.unpack(packed, output), truth.operand(output), strict=True):
        same(a, b)


def _examples(names: dict[str, QuantSpec]) -> list[Any]:
    return [pytest.param(spec, axis, id=f"{name}, axis {axis}") for name, spec in names.items() for axis in AXES]


@pytest.mark.parametrize(("spec", "axis"), _examples(FAST))
def test_equals_reference(spec: QuantSpec, axis: Axis) -> None:
    """Ordinary and subnormal numbers in FP32 along rows, Inf and NaN along columns; all with -m slow."""
    assert gpu.supports(spec, axis, torch.bfloat16, KEY) is None
    one, other = (torch.bfloat16, torch.float32) if axis == -1 else (torch.float32, torch.bfloat16)
    _, small, odd, *_ = matrices(*SHAPE, other)
    small[:2] = next(matrices(*SHAPE, other))[:2]
    compare(small if axis == -1 else odd.to(one), spec, axis)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "axis"), _examples({**FAST, **MORE}))
def test_equals_reference_on_more(spec: QuantSpec, axis: Axis) -> None:
    if found := gpu.supports(spec, axis, torch.bfloat16, KEY):
        pytest.skip(found)
    for shape in (SHAPE, (1, 7)):
        for number, x in enumerate(zip(*(matrices(*shape, t) for t in (torch.bfloat16, torch.float32)), strict=True)):
            compare(x[(number + axis) % 2], spec, axis)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "axis"), _examples({**SPECS, "mxfp4 recipe": MXFP4, "nvfp4 recipe": NVFP4}))
def test_more_tiles(spec: QuantSpec, axis: Axis) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        compare(next(matrices(140, 330, dtype)), spec, axis)


@pytest.mark.slow
@pytest.mark.parametrize("element", ["e4m3", "e5m2", "e2m1"])
def test_every_bf16_number(element: str) -> None:
    """All 65,536 BF16 numbers: each in a block of its own, and all with one given scale."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    compare(every, resolve_spec("mxfp8_e4m3", element=element, block=(1, 1)), -1)
    delayed = resolve_spec("fp8_e4m3", element=element, amax_history=4)
    compare(every, delayed, -1, encode_scale=torch.tensor(64.0))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("scale", ["fp32", "pow2"])
def test_delayed_scaling(axis: Axis, scale: str) -> None:
    """A given scale, the amax found in passing."""
    spec = resolve_spec("fp8_e5m2", amax_history=16, scale=scale, hadamard=16)
    for x in list(matrices(*SHAPE, torch.bfloat16))[:3]:
        compare(x, spec, axis, encode_scale=torch.tensor(0.75))


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_2d", "fp8_e4m3"])
@pytest.mark.parametrize("amax", [0.0, 1e-30, 1.0, 3e38, torch.inf, torch.nan])
def test_given_amax(name: str, amax: float) -> None:
    compare(next(matrices(*SHAPE, torch.bfloat16)), resolve_spec(name), -1, amax=torch.tensor(amax))


@pytest.mark.parametrize("step", [0, 1, 2**32 - 1])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (2**32 - 9, 16), (2**40, 2**20)])
def test_random_bits_of_every_place(step: int, row: int, column: int) -> None:
    """Rows that carry into their high half, and words that Triton might take for constants."""
    key = RandomKey(seed=1, tensor="t", slot="dgrad.a", step=step, row=row, column=column)
    spec = resolve_spec("mxfp8_e4m3", **STOCHASTIC)
    x = torch.rand(18, 70, generator=torch.Generator().manual_seed(0))
    ours = gpu.operand(x.to(DEVICE), spec, key=key).values.cpu()
    assert_same(ours, reference.operand(x, spec, seed=key).values)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("size", [0, 4, 64])
def test_amax(axis: Axis, size: int) -> None:
    spec = resolve_spec("nvfp4", hadamard=size)
    for x in list(matrices(33, 50, torch.bfloat16))[:3]:
        truth = reference.operand(x, spec, axis=axis, dtype=torch.float32).amax
        assert_same(gpu.amax(x.to(DEVICE), spec, axis=axis).cpu(), truth)
    x = torch.full((3, 5), -2.0, device=DEVICE)
    assert gpu.amax(x).item() == 2.0
    assert gpu.amax(x, resolve_spec("nvfp4", **STOCHASTIC)).item() == 2.0  # as on a CPU, without a key


def test_what_is_not_supported() -> None:
    for words, changes in {
        "32 random bits": {"rounding": "stochastic", "random_bits": 32},
        "four_over_six": {"four_over_six": "mae"},
        "an amax for each line": {"row_amax": True},
        "block (1, 24)": {"block": (1, 24)},
    }.items():
        assert words in str(gpu.supports(resolve_spec("nvfp4", **changes), -1, torch.bfloat16))
    assert "float16" in str(gpu.supports(SPECS["nvfp4"], -1, torch.float16))
    odd = RandomKey(seed=1, column=8)
    assert "column 8" in str(gpu.supports(NVFP4, -1, torch.bfloat16, odd))


@pytest.mark.parametrize("axis", [-1, pytest.param(0, marks=pytest.mark.slow)])
def test_meta_shapes_are_the_real_ones(axis: Axis) -> None:
    for name in ("mxfp8_e4m3", "mxfp4", "nvfp4", "nvfp4_2d", "fp8_e4m3", "fp8_block_1x128"):
        spec = resolve_spec(name, hadamard=16 if name == "nvfp4" else 0)
        x = torch.ones(50, 70, dtype=torch.bfloat16)
        real, meta = (gpu.operand(x.to(d), spec, axis=axis).values for d in (DEVICE, "meta"))
        assert meta.is_meta and (meta.shape, meta.dtype) == (real.shape, real.dtype)
        packed, shadow = (gpu.quantize(x.to(d), spec, axis=axis) for d in (DEVICE, "meta"))
        assert (packed.codes.shape, packed.scales.shape) == (shadow.codes.shape, shadow.scales.shape)
        assert (packed.codes.dtype, packed.scales.dtype) == (shadow.codes.dtype, shadow.scales.dtype)
        assert gpu.unpack(packed).values.shape == gpu.unpack(shadow).values.shape


def test_operator_registrations() -> None:
    """torch's own checks of schemas and fake versions, and a graph that holds the operators."""
    text, words = ops.spec_text(SPECS["nvfp4"]), [0] * 5
    x = torch.randn(32, 64, device=DEVICE).bfloat16()
    codes, scales, _ = torch.ops.lowprec_gpu.pack(x, None, None, words, text, -1)
    for operator, arguments in (
        ("operand", (x, None, None, words, text, -1, torch.bfloat16)),
        ("operand", (x, torch.ones((), device=DEVICE), None, words, text, 0, torch.float32)),
        ("pack", (x, None, None, words, text, 0)),
        ("unpack", (codes, scales, text, 64, torch.bfloat16)),
        ("amax", (x, words, text, -1)),
    ):
        overload = getattr(torch.ops.lowprec_gpu, operator).default
        torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled_graph() -> None:
    def function(x: Tensor) -> Tensor:
        packed = gpu.quantize(x * 2, SPECS["mxfp8_e4m3"])
        return gpu.operand(x * 2, SPECS["nvfp4"]).values.float().sum(1) + gpu.unpack(packed).values.float().sum(1)

    torch.compiler.reset()
    x = torch.randn(64, 64, device=DEVICE).bfloat16()
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))
