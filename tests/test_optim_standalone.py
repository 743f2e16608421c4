"""`lowprec.optim.AdamW` as an ordinary torch optimizer."""

from __future__ import annotations

import io

import optim_case as case
import pytest
import torch
from torch import Tensor, nn

from errors import UsageError
from lowprec.optim import AdamW, LossScale, OptimizerConfig


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 100), nn.Tanh(), nn.Linear(100, 80)).to(dtype)


def train(net: nn.Module, optimizer: AdamW, steps: int, first: int = 0) -> list[float]:
    dtype, losses = next(net.parameters()).dtype, []
    for number in range(first, first + steps):
        x = torch.randn(32, 80, generator=torch.Generator().manual_seed(number)).to(dtype)
        loss = (net(x) - x).float().square().mean()
        optimizer.zero_grad()
        optimizer.scale(loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def options(update: object) -> dict:
    return dict(vars(update))


@pytest.mark.parametrize("update", list(case.updates()), ids=case.name_of)
def test_trains_and_saves_every_byte(update: object) -> None:
    """A run that is saved and loaded after five of ten steps ends with the same bits."""
    dtype = torch.bfloat16
    net = model(dtype)
    optimizer = AdamW(net.named_parameters(), lr=3e-3, clip=1.0, seed=4, **options(update))
    losses = train(net, optimizer, 5)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    losses += train(net, optimizer, 5, first=5)
    assert losses[-1] < 0.9 * losses[0]

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = model(dtype)
    again.load_state_dict(saved["net"])
    resumed = AdamW(again.named_parameters(), lr=1.0, clip=1.0, seed=4, **options(update))
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 5, first=5)
    for ours, theirs in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, tensor in optimizer.state[ours].items():
            other = resumed.state[theirs][key]
            assert tensor.dtype == other.dtype and torch.equal(tensor, other), key


def test_an_fp32_parameter_is_its_own_master() -> None:
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-3, weight_decay=0.1)
    truth = model()
    theirs = torch.optim.AdamW(truth.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    train(net, optimizer, 5)
    train(truth, theirs := _with_scale(theirs), 5)  # type: ignore[arg-type]
    for ours, other in zip(net.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-7)
        assert set(optimizer.state[ours]) == {"step", "exp_avg", "exp_avg_sq"}


def _with_scale(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    optimizer.scale = lambda loss: loss  # pyright: ignore
    return optimizer


def test_bf16_parameters_have_an_fp32_master() -> None:
    net = model(torch.bfloat16)
    optimizer = AdamW(net.parameters(), lr=1e-3)
    train(net, optimizer, 3)
    for parameter in net.parameters():
        master = optimizer.state[parameter]["weight"]
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), parameter.flatten())


def test_loss_scale() -> None:
    scale = LossScale()
    assert scale.value == 65536
    for _ in range(1999):
        scale = scale.after(True)
    assert (scale.value, scale.good) == (65536, 1999)
    assert scale.after(True) == LossScale(131072.0, 0)
    assert scale.after(False) == LossScale(32768.0, 0)


@pytest.mark.parametrize("master", ["fp32", "fp16_scaled"])
def test_fp16(master: str) -> None:
    """One Inf: one skipped step that changes nothing, half the scale, the count starts again."""
    net = model(torch.float16)
    optimizer = AdamW(net.parameters(), lr=3e-3, master=master, clip=1.0)  # pyright: ignore
    losses = train(net, optimizer, 4)
    while optimizer.skipped:  # the first scales may be too large
        losses += train(net, optimizer, 1)
    before, scale = [p.detach().clone() for p in net.parameters()], optimizer.loss_scale
    assert scale is not None
    next(net.parameters()).grad.view(-1)[3] = torch.inf  # pyright: ignore
    optimizer.step()
    assert optimizer.skipped and optimizer.loss_scale == LossScale(scale.value / 2, 0)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    losses += train(net, optimizer, 10)
    assert not optimizer.skipped and losses[-1] < losses[0]
    again = AdamW(model(torch.float16).parameters(), master=master, clip=1.0)  # pyright: ignore
    again.load_state_dict(optimizer.state_dict())
    assert again.loss_scale == optimizer.loss_scale


def test_unscales_before_clipping() -> None:
    """Gradients of norm 0.5, scaled by 2^16, are not clipped at 1."""
    weights: list[Tensor] = []
    for dtype in (torch.float16, torch.float32):
        parameter = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = AdamW([parameter], lr=0.1, clip=1.0, eps=1.0)  # a large eps makes the step depend on its size
        optimizer.loss_scale = optimizer.loss_scale and LossScale(2.0**10)
        optimizer.scale((parameter * 0.25).float().sum()).backward()
        optimizer.step()
        weights.append(optimizer.state[parameter].get("weight", parameter.detach()))
    assert torch.equal(*weights)


def test_refusals() -> None:
    net = model()
    with pytest.raises(UsageError, match="update kahan writes BF16 weights"):
        AdamW(net.parameters(), update="kahan")
    with pytest.raises(UsageError, match="lr is -1"):
        AdamW(net.parameters(), lr=-1.0)
    with pytest.raises(UsageError, match=r"parameters \[0\] are not contiguous"):
        AdamW([nn.Parameter(torch.zeros(3, 4).T)])
    four = AdamW(net.parameters(), exp_avg="dynamic4_b128")
    with pytest.raises(UsageError, match="the saved states are .*fp32.*dynamic4_b128"):
        four.load_state_dict(AdamW(net.parameters()).state_dict())
    assert OptimizerConfig(update="kahan").problems() and not OptimizerConfig().problems()
