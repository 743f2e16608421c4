"""The fused AdamW step equals the plain one bit for bit, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import optim_case as case
import pytest
import torch
from torch import Tensor

from lowprec import kernels
from lowprec.adamw import Update
from lowprec.codebooks import thresholds
from lowprec.codecs import Extent, codec
from lowprec.kernels.adamw import _tables
from lowprec.philox import RandomKey

pytestmark = pytest.mark.skipif(not kernels.available(), reason=str(kernels.unavailable_because()))

MORE = [
    Update(exp_avg=first, exp_avg_sq=second)
    for first, second in (
        ("linear4_rank1", "linear4_rank1"),
        ("linear4_b128", "dynamic4_b128"),
        ("fp16_scaled", "fp8_e4m3"),
        ("linear4_rank1", "fp16_scaled"),
    )
]
UPDATES = [u for u in [*case.updates(), *MORE] if "_sr" not in u.exp_avg and u.exp_avg_sq != "factor"]


def _words(update: Update) -> set[str]:
    names = (update.exp_avg, update.exp_avg_sq)
    return {word.rstrip("48") for name in names for word in name.split("_")} | {n.split("_")[-1] for n in names}


@pytest.fixture(params=torch.ops.lowprec_cpu.isas().split() if kernels.available() else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.ops.lowprec_cpu.isa()
    torch.ops.lowprec_cpu.set_isa(request.param)
    yield request.param
    torch.ops.lowprec_cpu.set_isa(before)


def same(ours: Tensor, truth: Tensor) -> bool:
    """The same bytes, signs of zero included."""
    return ours.dtype == truth.dtype and torch.equal(ours.view(torch.uint8), truth.view(torch.uint8))


def compare(update: Update, extent: Extent, grads: list[Tensor]) -> None:
    (ours,), (truth,) = case.start(update, extent.shape, [extent]), case.start(update, extent.shape, [extent])
    for number, grad in enumerate(grads, start=1):
        hyper = replace(case.HYPER, step=number, grad_scale=0.7)
        assert update._fused(extent, ours, grad, hyper) is not None
        key = RandomKey(seed=1, tensor="layers.3.mlp.up", step=number)
        found = update.statistics(extent, ours, grad, hyper)
        true_found = update.statistics_plain(extent, truth, grad, hyper)
        assert (found is None) == (true_found is None)
        assert found is None or same(found, true_found)  # pyright: ignore
        tally = update.apply(extent, ours, grad, hyper, found, key, measure=number % 2 == 0)
        true_tally = update.apply_plain(extent, truth, grad, hyper, found, key, measure=number % 2 == 0)
        torch.testing.assert_close(tally.sums, true_tally.sums)
        for name in truth:
            assert same(ours[name], truth[name]), (name, number)


@pytest.mark.parametrize("update", UPDATES, ids=case.name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_plain_step(update: Update, dtype: torch.dtype, isa: str) -> None:
    for extent in (Extent.whole((21, 200)), Extent((50, 130), 1024, 6500 - 1024), Extent((2, 9, 300), 512, 1024)):
        grads = case.gradients(extent.shape, 4)
        grads[2] *= 1e-18  # what FP32 squares to subnormal numbers and zeros
        grads[3][::3] = 0.0
        compare(update, extent, [g[extent.offset : extent.offset + extent.count].to(dtype) for g in grads])


@pytest.mark.parametrize(
    "update", [u for u in UPDATES if not {"dynamic", "linear", "b256"} & _words(u)], ids=case.name_of
)
def test_fragments_cut_anywhere(update: Update, isa: str) -> None:
    """As ZeRO's stage 3 cuts them; stochastic rounding takes the plain path there."""
    extent = Extent((50, 130), 1001, 3333)
    grads = [grad[1001:4334] for grad in case.gradients(extent.shape, 2)]
    if update.update == "stochastic":
        (tensors,) = case.start(update, extent.shape, [extent])
        assert update._fused(extent, tensors, grads[0], case.HYPER) is None
    else:
        compare(update, extent, grads)


@pytest.mark.parametrize("update", UPDATES, ids=case.name_of)
def test_blocks_of_zeros(update: Update, isa: str) -> None:
    grads = [torch.zeros(70 * 90) for _ in range(3)]
    grads[1][300:] = torch.randn(6000, generator=torch.Generator().manual_seed(0))
    compare(update, Extent.whole((70, 90)), grads)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", ["dynamic8_b256", "dynamic4_b128", "linear4_b128"])
def test_every_threshold(name: str, signed: bool, isa: str) -> None:
    """Codes at each midpoint between codes and at its neighbours in FP32, in blocks whose scale is 1."""
    how = codec(name, signed)
    limits = thresholds(*{"dynamic8_b256": ("dynamic", 8)}.get(name, (name[:-6], 4)), signed)
    inf = torch.tensor(torch.inf)
    near = torch.cat((limits, limits.nextafter(inf), limits.nextafter(-inf), torch.tensor([0.0, 1.0])))
    values = torch.zeros(-(-len(near) // 64), 128)
    # a row is a block: 64 numbers, and a 1 that makes its scale
    padded = torch.nn.functional.pad(near, (0, -len(near) % 64)).view(-1, 64)
    values[:, :64], values[:, 64] = padded, 1.0
    if not signed:
        values.abs_()
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % 256))
    extent = Extent.whole((len(flat) // 256 * 20, 256))
    flat = flat.repeat(20)
    truth = how.allocate(extent)
    how.encode(flat, extent, truth, None, None)
    # a step with b1 = 0 (b2 = 0) makes the moment the gradient (its square)
    update = Update(exp_avg=name) if signed else Update(exp_avg_sq=name)
    assert update.codecs(extent.shape)["exp_avg" if signed else "exp_avg_sq"] == how
    (ours,) = case.start(update, extent.shape, [extent])
    grad = flat if signed else flat.sqrt()
    if not signed:
        how.encode(grad * grad, extent, truth, None, None)
    hyper = replace(case.HYPER, betas=(0.0, 0.0))
    assert update._fused(extent, ours, grad, hyper) is not None
    update.apply(extent, ours, grad, hyper)
    state = "exp_avg" if signed else "exp_avg_sq"
    assert same(ours[f"{state}.codes"], truth["codes"]) and same(ours[f"{state}.scale"], truth["scale"])


@pytest.mark.parametrize("signed", [True, False])
def test_cells_have_one_limit(signed: bool) -> None:
    """The 8-bit lookup decides between two codes, so no cell may hold two limits: every FP32 number near a limit."""
    values, limits, cells = _tables(codec("dynamic8_b256", signed))
    true_limits = thresholds("dynamic", 8, signed)
    x = torch.cat([true_limits] + [torch.linspace(-1, 1, 300001), torch.logspace(-9, 0, 100001)])
    x = torch.cat((x, x.nextafter(torch.tensor(2.0)), x.nextafter(torch.tensor(-2.0))))
    code = cells[(x.view(torch.int32) >> 16) & 0xFFFF].int()
    code += x > limits[code]
    assert torch.equal(code, torch.bucketize(x, true_limits).int()) and len(values) == 256


def test_threads_do_not_matter() -> None:
    before = torch.get_num_threads()
    try:
        for update in UPDATES[::5]:
            extent, found = Extent.whole((300, 700)), []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                fragments = case.start(update, extent.shape, [extent])
                tallies = [
                    case.step(update, [extent], fragments, grad, replace(case.HYPER, step=number)).sums
                    for number, grad in enumerate(case.gradients(extent.shape, 2), start=1)
                ]
                found.append((fragments[0], tallies))
            for name, tensor in found[0][0].items():
                assert same(found[1][0][name], tensor), name
            assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    finally:
        torch.set_num_threads(before)


def test_what_has_no_kernel_says_why() -> None:
    extent = Extent.whole((70, 70))
    for options, reason in (
        ({"exp_avg_sq": "factor"}, "factored second moments"),
        ({"exp_avg": "dynamic4_b128_sr"}, "stochastically encoded exp_avg"),
    ):
        update = Update(**options)
        (tensors,) = case.start(update, extent.shape, [extent])
        assert update._fused(extent, tensors, torch.zeros(4900), case.HYPER) is None, reason


def test_operators_are_registered_well() -> None:
    update, extent = Update(exp_avg="dynamic4_b128", exp_avg_sq="linear4_rank1"), Extent.whole((70, 70))
    (tensors,) = case.start(update, extent.shape, [extent])
    job = update._fused(extent, tensors, torch.ones(4900), case.HYPER)
    assert job is not None
    arguments = (job._places(), job._tables(), job.grad, job._spec(), list(job.numbers))
    torch.library.opcheck(
        torch.ops.lowprec_cpu.adamw_maxima.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
