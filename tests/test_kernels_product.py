"""A GEMM that quantizes on the way, against quantizers and GEMMs one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lowprec import kernels
from lowprec.apply import Precision, RunFacts
from lowprec.formats import QuantSpec, resolve_spec
from lowprec.policy import Policy, PrecisionConfig, Rule
from lowprec.quantized import Axis, Beside, Operand, Quantization
from recipe import load_policy
from tests.kernel_cases import CASES, KEY, STOCHASTIC, assert_same, matrices

pytestmark = pytest.mark.skipif(not kernels.available(), reason=str(kernels.unavailable_because()))

PRESETS = ("mxfp8", "nvfp4", "fp8_current", "fp8_delayed", "fp8_block", "mxfp4")
BESIDE = {  # what the same matrix becomes for another GEMM
    "mxfp8": resolve_spec("mxfp8_e4m3"),
    "nvfp4 rotated at random": resolve_spec("nvfp4", hadamard=16, signs="call", **STOCHASTIC),
    "rotated 128": resolve_spec("mxfp4", hadamard=128),
    "tensor": resolve_spec("fp8_e5m2"),
    "square": resolve_spec("fp8_block_128x128"),
}


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def close(y: Tensor, truth: Tensor) -> bool:
    """Within one BF16 ulp of the truth, or of FP32 sums where terms cancel."""
    ulp = torch.exp2(truth.abs().clamp_min(1e-30).log2().floor() - 7)
    return bool(((y.double() - truth).abs() <= ulp + 1e-6 * truth.abs().max()).all())


def quantization(spec: QuantSpec, axis: Axis) -> Quantization:
    return Quantization(spec, axis, KEY if spec.draws else None)


@pytest.mark.parametrize("name", CASES)
def test_what_is_quantized_on_the_way_is_the_same(name: str, threads: int) -> None:
    """rows: of several parts, the last one ragged"""
    spec = CASES[name]
    if kernels.supports(spec, -1, torch.bfloat16, KEY) is not None:
        pytest.skip(str(kernels.supports(spec, -1, torch.bfloat16, KEY)))
    for rows, cols in ((128 * threads + 130, 48), (300, 40)):
        for x in matrices(rows, cols, torch.bfloat16):
            want = kernels.operand(x, spec, key=KEY, dtype=torch.float32)
            right = torch.zeros(want.values.shape[1], 16)
            for _, other in zip(range(2), BESIDE.values(), strict=False):
                how = quantization(other, 0)
                got = kernels.product(
                    x, quantization(spec, -1), Operand(right, None, None), turned=False, keep=True, beside=Beside(how)
                )
                for mine, whole in zip(got.left, want, strict=True):
                    assert_same(mine, whole)
                for mine, whole in zip(
                    got.beside, kernels.operand(x, other, axis=0, key=KEY, dtype=torch.float32), strict=True
                ):
                    assert_same(mine, whole)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("beside", BESIDE)
def test_products_and_packed_copies(beside: str, turned: bool, threads: int) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(128 * threads + 200, 96, generator=random).bfloat16()
    weight = torch.randn((72, 96) if turned else (96, 72), generator=random)
    bias, scale = torch.randn(72, generator=random).bfloat16(), torch.tensor(0.375)
    for name in ("mxfp8_e4m3", "nvfp4", "fp8_e4m3"):
        spec = resolve_spec(name)
        left = kernels.operand(x, spec, key=KEY, dtype=torch.float32)
        factor = 0.375 * (1.0 if left.scale is None else left.scale.double())
        truth = left.values.double() @ (weight.T if turned else weight).double() * factor
        for added in (None, bias):
            got = kernels.product(
                x,
                quantization(spec, -1),
                Operand(weight, scale, None),
                turned=turned,
                bias=added,
                beside=Beside(quantization(BESIDE[beside], 0), pack=True),
            )
            assert got.y.dtype == torch.bfloat16 and got.left.values.numel() == 0
            assert close(got.y, truth if added is None else truth + added.double())
            want = kernels.quantize(x, BESIDE[beside], axis=0, key=KEY, upright=True)
            assert_same(got.beside.codes, want.codes)
            assert_same(got.beside.scales, want.scales)
            assert_same(got.beside.amax, want.amax)
            assert (got.beside.spec, got.beside.axis, got.beside.shape) == (want.spec, want.axis, want.shape)


def test_operands_that_do_not_fit_are_refused() -> None:
    x, how = torch.randn(256, 64).bfloat16(), Quantization(resolve_spec("mxfp8_e4m3"), -1)
    for right in (torch.zeros(32, 64), torch.zeros(64, 32, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match="right must be FP32 with 64 rows"):
            kernels.product(x, how, Operand(right, None, None), turned=False)


class Outcome:
    """One forward and backward of a linear, in a mode of `product`."""

    def __init__(self, policy: str, streams: bool, monkeypatch: pytest.MonkeyPatch, split: bool, **config) -> None:
        torch.manual_seed(0)
        model = nn.ModuleDict({"linear": nn.Linear(128, 192, bias=True, dtype=torch.bfloat16)})
        facts = RunFacts(seed=3, steps=10, tokens_per_step=512, gemm_dtype=torch.float32, swap_all=True)
        tree = load_policy(policy)
        tree = Policy(tree.schemes, (Rule("*", tree.rules[0].use),))
        precision = Precision([model], tree, PrecisionConfig(policy=policy, **config), facts)
        layer = precision.layers["linear"]
        layer.streams, self.calls = streams, 0
        precision.begin_step(2)
        if split:
            precision.shared.deferred = []
        original = kernels.product

        def counted(*arguments, **options):  # noqa: ANN202
            self.calls += 1
            return original(*arguments, **options)

        monkeypatch.setattr(kernels, "product", counted)
        x = torch.randn(512, 128).bfloat16().requires_grad_()
        self.y = layer(x)
        self.y.backward((torch.randn(512, 192) * 1e-3).bfloat16())
        monkeypatch.setattr(kernels, "product", original)
        for weight, gradient in precision.shared.deferred or ():
            weight.grad = gradient()
        self.dx, self.dw, self.db = x.grad, layer.weight.grad, layer.bias.grad
        self.histories = [state.history for state in layer.delayed.values()]
        self.receipt = precision.receipt()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("pack_saved", [False, True])
@pytest.mark.parametrize("policy", PRESETS)
def test_a_linear_computes_the_same_rows_by_rows(policy, pack_saved, split, monkeypatch, threads):
    whole = Outcome(policy, False, monkeypatch, split, pack_saved=pack_saved)
    rows = Outcome(policy, True, monkeypatch, split, pack_saved=pack_saved)
    quantized = 1 if policy == "mxfp4" else 2  # its forward is in BF16
    assert (whole.calls, rows.calls) == (0, quantized)
    assert close(rows.y.detach(), whole.y.detach().double()) and close(rows.dx, whole.dx.double())
    assert torch.equal(rows.dw, whole.dw) and torch.equal(rows.db, whole.db)
    assert all(map(torch.equal, rows.histories, whole.histories)) and rows.receipt == whole.receipt


def test_only_matrices_that_gain_by_it_go_rows_by_rows(threads):
    few, many = torch.zeros(128 * threads - 1, 64), torch.zeros(128 * threads, 64)
    narrow, wide = torch.zeros(64, 64), torch.zeros(64, 2**13 + 1)
    scalar, lines = torch.ones(()), torch.ones(1, 64)
    taken = kernels.rows_by_rows
    assert taken(many.bfloat16(), Operand(narrow, scalar, None)) and taken(many.bfloat16(), Operand(narrow, None, None))
    assert not taken(few.bfloat16(), Operand(narrow, None, None)) and not taken(many, Operand(narrow, None, None))
    assert not taken(many.bfloat16(), Operand(wide, None, None))
    assert not taken(many.bfloat16(), Operand(narrow, lines, None))
    assert not taken(many.bfloat16(), Operand(narrow.bfloat16(), None, None))
