"""The Triton kernels of the AdamW step against the plain one, as triton_cases.py."""

from __future__ import annotations

from dataclasses import replace

import optim_case as case
import pytest
import torch
from torch import Tensor

from lowprec.adamw import Update
from lowprec.codecs import Extent
from lowprec.kernels import adamw, gpu
from lowprec.kernels.gpu import adamw as gpu_adamw
from lowprec.philox import RandomKey

if reason := gpu.unavailable_because():
    pytest.skip(reason, allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY = [u for u in case.updates() if "_sr" not in u.exp_avg and u.exp_avg_sq != "factor"]
QUICK = [  # each store and master, almost every rule
    Update(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, master=master, update=update)  # pyright: ignore
    for exp_avg, exp_avg_sq, master, update in (
        ("fp32", "fp32", "fp32", "nearest"),
        ("fp8_e4m3", "fp16_scaled", "fp16_scaled", "nearest"),
        ("fp8_e4m3_b256", "dynamic8_b256", "none", "nearest"),
        ("dynamic4_b128", "linear4_rank1", "none", "stochastic"),
        ("dynamic8_b256", "linear4_b128", "bf16", "kahan"),
        ("bf16", "bf16", "none", "collage_plus"),
    )
]


def same(ours: Tensor, truth: Tensor) -> bool:
    """The same bytes, signs of zero included."""
    return ours.dtype == truth.dtype and torch.equal(ours.cpu().view(torch.uint8), truth.view(torch.uint8))


def compare(update: Update, extent: Extent, grads: list[Tensor]) -> None:
    (ours,), (truth,) = case.start(update, extent.shape, [extent]), case.start(update, extent.shape, [extent])
    ours = {name: tensor.to(DEVICE) for name, tensor in ours.items()}
    for number, grad in enumerate(grads, start=1):
        hyper = replace(case.HYPER, step=number, grad_scale=0.7)
        key = RandomKey(seed=1, tensor="layers.3.mlp.up", slot="weight", step=number)
        job = adamw.Job(update.codecs(extent.shape), update.update, extent, ours, grad.to(DEVICE), hyper.numbers)
        found, measure = update.statistics_plain(extent, truth, grad, hyper), number % 2 == 0
        if found is not None:
            assert same(gpu_adamw.statistics(job), found)
        sums = gpu_adamw.apply(
            job,
            None if found is None else found.to(DEVICE),
            key if update.update == "stochastic" else None,
            measure,
        )
        tally = update.apply_plain(extent, truth, grad, hyper, found, key, measure)
        torch.testing.assert_close(sums.cpu(), tally.sums[:3])
        for name in truth:
            assert same(ours[name], truth[name]), (name, number)


def _gradients(extent: Extent, dtype: torch.dtype) -> list[Tensor]:
    grads = case.gradients(extent.shape, 3)
    grads[1] *= 1e-18  # what FP32 squares to subnormal numbers and zeros
    grads[2][::3] = 0.0
    return [g[extent.offset : extent.offset + extent.count].to(dtype) for g in grads]


@pytest.mark.parametrize("update", QUICK, ids=case.name_of)
def test_equals_the_plain_step(update: Update) -> None:
    """A fragment of three programs, the last one ragged, that begins and ends within rows."""
    extent = Extent((50, 130), 4352, 2148)
    compare(update, extent, _gradients(extent, torch.bfloat16 if update.update == "stochastic" else torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", EVERY, ids=case.name_of)
def test_every_update_equals_the_plain_step(update: Update, dtype: torch.dtype) -> None:
    for extent in (Extent.whole((21, 201)), Extent((50, 130), 1024, 5476), Extent((2, 9, 300), 512, 1024)):
        compare(update, extent, _gradients(extent, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(
    "update", [Update(), Update(exp_avg="fp8_e4m3", exp_avg_sq="fp16_scaled", master="fp16_scaled")]
)
def test_fragments_cut_anywhere(update: Update) -> None:
    extent = Extent((50, 130), 1001, 3333)
    compare(update, extent, _gradients(extent, torch.float32))


def test_blocks_of_zeros() -> None:
    grads = [torch.zeros(70 * 90) for _ in range(3)]
    grads[1][300:] = torch.randn(6000, generator=torch.Generator().manual_seed(0))
    compare(Update(exp_avg="dynamic4_b128", exp_avg_sq="linear4_rank1"), Extent.whole((70, 90)), grads)
