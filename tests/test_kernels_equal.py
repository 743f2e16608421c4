"""The fused kernels equal lowprec/reference.py bit for bit, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lowprec import kernels, reference
from lowprec.formats import QuantSpec, resolve_spec
from lowprec.quantized import Axis
from tests.kernel_cases import CASES, KEY, STOCHASTIC, assert_same, matrices

pytestmark = pytest.mark.skipif(not kernels.available(), reason=str(kernels.unavailable_because()))

SHAPES = [(32, 128), (130, 50), (1, 7)]
ISAS = torch.ops.lowprec_cpu.isas().split() if kernels.available() else []


@contextmanager
def running_on(isa: str) -> Iterator[None]:
    before = torch.ops.lowprec_cpu.isa()
    torch.ops.lowprec_cpu.set_isa(isa)
    try:
        yield
    finally:
        torch.ops.lowprec_cpu.set_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with running_on(request.param):
        yield request.param


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, axis: Axis) -> None:
    spec = CASES[name]
    if kernels.supports(spec, axis, torch.bfloat16, KEY) is not None:
        pytest.skip(str(kernels.supports(spec, axis, torch.bfloat16, KEY)))
    for dtype in (torch.bfloat16, torch.float32):
        for rows, cols in SHAPES:
            for x in matrices(rows, cols, dtype):
                compare(x, spec, axis)


def compare(x: Tensor, spec: QuantSpec, axis: Axis) -> None:
    outputs = [torch.float32] + [torch.bfloat16] * spec.exact_in_bf16
    truths = [reference.operand(x, spec, axis=axis, seed=KEY, dtype=output) for output in outputs]
    true_packed = reference.quantize(x, spec, axis=axis, seed=KEY)
    true_unpacked = [true_packed.operand(output) for output in outputs]
    for isa in ISAS:
        with running_on(isa):
            for output, truth in zip(outputs, truths, strict=True):
                ours = kernels.operand(x, spec, axis=axis, key=KEY, dtype=output)
                for a, b in zip(ours, truth, strict=True):
                    assert_same(a, b)
            packed = kernels.quantize(x, spec, axis=axis, key=KEY)
            assert_same(packed.codes, true_packed.codes)
            assert_same(packed.scales, true_packed.scales)
            assert_same(packed.amax, true_packed.amax)
            saved = kernels.quantize(x, spec, axis=axis, key=KEY, upright=True)
            assert_same(packed.elements(), saved.elements())
            assert_same(packed.block_scales(), saved.block_scales())
            assert saved.codes.is_contiguous() and saved.nbytes <= packed.nbytes + max(packed.codes.shape)
            for output, truth in zip(outputs, true_unpacked, strict=True):
                for form in (packed, saved):
                    for a, b in zip(kernels.unpack(form, output), truth, strict=True):
                        assert_same(a, b)
                for a, b in zip(saved.operand(output), truth, strict=True):
                    assert_same(a, b)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "nvfp4", "nvfp4_2d", "fp8_block_1x128"])
@pytest.mark.parametrize("hadamard", [0, 16])
def test_wide_matrices(name: str, hadamard: int, axis: Axis, isa: str) -> None:
    """More columns than the kernels take at once, whole and ragged."""
    spec = resolve_spec(name, hadamard=hadamard, **STOCHASTIC)
    if kernels.supports(spec, axis, torch.bfloat16, KEY) is not None:
        pytest.skip("not supported")
    for cols in (2304, 2100):
        x = torch.randn(40, cols, generator=torch.Generator().manual_seed(cols)).bfloat16()
        truth = reference.operand(x, spec, axis=axis, seed=KEY)
        assert_same(kernels.operand(x, spec, axis=axis, key=KEY).values, truth.values)
        packed, true_packed = (
            kernels.quantize(x, spec, axis=axis, key=KEY),
            reference.quantize(x, spec, axis=axis, seed=KEY),
        )
        assert_same(packed.codes, true_packed.codes)
        assert_same(packed.scales, true_packed.scales)
        assert_same(kernels.unpack(packed).values, truth.values)
        saved = kernels.quantize(x, spec, axis=axis, key=KEY, upright=True)
        assert_same(kernels.unpack(saved).values, truth.values)
        assert saved.codes.shape[0] == saved.operand().values.shape[0]


def test_almost_everything_is_supported() -> None:
    missing = {n for n, s in CASES.items() for axis in (-1, 0) if kernels.supports(s, axis, torch.bfloat16) is not None}
    assert all("128x128" in n or "(32, 32)" in n or "2d" in n for n in missing), missing


@pytest.mark.parametrize("element", ["e4m3", "e5m2", "e2m1"])
def test_every_bf16_number(element: str, isa: str) -> None:
    """All 65,536 BF16 numbers, each in a block with itself only, and all with one given scale."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    alone = torch.zeros(1 << 16, 32, dtype=torch.bfloat16)
    alone[:, 3] = every
    spec = resolve_spec("mxfp8_e4m3", element=element)
    assert_same(kernels.operand(alone, spec).values, reference.operand(alone, spec).values)
    tensor = resolve_spec("fp8_e4m3", element=element, amax_history=4)
    scale, flat = torch.tensor(64.0), every.view(256, 256)
    ours, truth = kernels.operand(flat, tensor, scale=scale), reference.operand(flat, tensor, encode_scale=scale)
    assert_same(ours.values, truth.values)
    assert_same(ours.amax, truth.amax)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_2d", "fp8_e4m3"])
@pytest.mark.parametrize("amax", [0.0, 1e-30, 1.0, 3e38, torch.inf, torch.nan])
def test_given_amax(name: str, amax: float, isa: str) -> None:
    spec, given = resolve_spec(name), torch.tensor(amax)
    for x in matrices(48, 96, torch.bfloat16):
        for a, b in zip(kernels.operand(x, spec, amax=given), reference.operand(x, spec, amax=given), strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("size", [0, 4, 16, 64])
def test_amax(axis: Axis, size: int, isa: str) -> None:
    spec = resolve_spec("nvfp4", hadamard=size)
    for dtype in (torch.bfloat16, torch.float32):
        for x in matrices(65, 100, dtype):
            assert_same(
                kernels.amax(x, spec, axis=axis), reference.operand(x, spec, axis=axis, dtype=torch.float32).amax
            )


def test_threads_do_not_matter() -> None:
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = torch.get_num_threads()
    try:
        for name in ("mxfp8_e4m3", "nvfp4", "nvfp4_2d", "fp8_e4m3"):
            for axis in (-1, 0):
                results = []
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    results.append(kernels.operand(x, resolve_spec(name, **STOCHASTIC), axis=axis, key=KEY))
                for a, b in zip(*results, strict=True):
                    assert_same(a, b)
    finally:
        torch.set_num_threads(before)
