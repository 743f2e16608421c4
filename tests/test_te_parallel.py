"""Transformer Engine's layers (tests/te_cpu) sharded, with main_grad, and with a split backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lowprec.joints import NormLinear
from lowprec.linear import Place
from tests.spawn import run_ranks
from tests.te_case import (
    INPUTS,
    OUTPUTS,
    TOKENS,
    distance,
    draw,
    emulated,
    ours,
    recipes,
    shared,
    slots_of,
    te_layers,
)  # fmt: skip

CUSTOM = ("mxfp8", "nvfp4", "mxfp4", "fp8_current", "fp8_block")
# A rank scales by the amax of what it holds: the same numbers only where scales are powers of two.
NATIVE = ("mxfp8", "fp8_block", "fp8_lm")
MIDDLE = 256
ROWS = 2 * TOKENS  # each of two ranks has half of a sequence


def _slots(policy: str) -> Any:
    return slots_of(policy, rounding="nearest") if policy == "nvfp4" else slots_of(policy)


def _weights() -> tuple[Tensor, Tensor]:
    return draw(MIDDLE, INPUTS, spread=0.05), draw(INPUTS, MIDDLE, spread=0.05)


class Pair(nn.Module):
    """down(up(norm(x))), of which a rank has half of the features in the middle."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        half = MIDDLE // 2
        self.norm = nn.RMSNorm(INPUTS, dtype=torch.bfloat16, eps=1e-5)
        self.up = nn.Linear(INPUTS, half, bias=False, dtype=torch.bfloat16)
        self.down = nn.Linear(half, INPUTS, dtype=torch.bfloat16)
        up, down = _weights()
        with torch.no_grad():
            self.up.weight.copy_(up[rank * half : (rank + 1) * half])
            self.down.weight.copy_(down[:, rank * half : (rank + 1) * half])
            self.down.bias.copy_(draw(INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)))


def _places(rank: int) -> dict[str, Place]:
    group, half = dist.group.WORLD, MIDDLE // 2
    return {
        "up": Place(((rank * half, half),), (0, INPUTS), frozenset({"w", "dy"}), group),
        "down": Place(((0, INPUTS),), (rank * half, half), frozenset({"w", "x"}), group),
    }


def _pairs(rank: int, sp: bool, custom: bool) -> dict[str, dict[str, Tensor]]:
    """Policy -> what this rank has of y, dx and the gradients."""
    if custom:
        te_layers.recipe_of = lambda table: recipes.CustomRecipe(qfactory=ours.Factory(table))
    part, found = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2) if sp else slice(None), {}
    for policy in CUSTOM if custom else NATIVE:
        model, table = Pair(rank), dict.fromkeys(("up", "down"), _slots(policy))
        swap = te_layers.Swap((NormLinear("norm", "up"),), sp)
        swap(model, list(table), [table], shared(), _places(rank))
        x = draw(ROWS, INPUTS)[part].clone().requires_grad_()
        y = model(x[None])[0]
        y.backward(draw(ROWS, INPUTS, spread=1e-3, seed=1)[part])
        found[policy] = {"y": y.detach(), "dx": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    return found


def _truth(policy: str) -> dict[str, Tensor]:
    """The same of the whole matrices, our linears' operands multiplied in FP64."""
    (up, down), slots = _weights(), _slots(policy)
    x, dy = draw(ROWS, INPUTS), draw(ROWS, INPUTS, spread=1e-3, seed=1)
    wide, gamma = x.float().requires_grad_(), torch.ones(INPUTS, requires_grad=True)
    normed = F.rms_norm(wide, (INPUTS,), gamma, 1e-5)
    rounded = normed.detach().bfloat16()
    between = emulated(up, None, rounded, draw(ROWS, MIDDLE), slots, "up")["y"].bfloat16()
    second = emulated(down, draw(INPUTS), between, dy, slots, "down")
    first = emulated(up, None, rounded, second["dx"].bfloat16(), slots, "up")
    normed.backward(first["dx"].float())
    return {
        "y": second["y"], "dx": wide.grad, "norm.weight": gamma.grad, "up.weight": first["dw"],
        "down.weight": second["dw"], "down.bias": second["db"],
    }  # fmt: skip


@pytest.mark.parametrize("custom", [True, False])
@pytest.mark.parametrize("sp", [False, True])
def test_tensor_and_sequence_parallelism(sp, custom):
    ranks = run_ranks(_pairs, 2, sp, custom)
    for policy in CUSTOM if custom else NATIVE:
        both, whole = [rank[policy] for rank in ranks], {}
        for key, value in both[0].items():
            other = both[1][key]
            if key == "up.weight":
                whole[key] = torch.cat([value, other])
            elif key == "down.weight":
                whole[key] = torch.cat([value, other], 1)
            elif not sp:
                assert torch.equal(value, other), (policy, key)
                whole[key] = value
            else:  # parameters that every rank has see half of the tokens
                whole[key] = torch.cat([value, other]) if key in ("y", "dx") else value.float() + other.float()
        for key, truth in _truth(policy).items():
            # Partial sums of two ranks are added in BF16.
            assert distance(whole[key], truth) < 8e-3, (policy, key)


@pytest.mark.parametrize("policy", ["mxfp8", "nvfp4", "mxfp4"])
def test_weight_gradients_add_up_in_main_grad(policy):
    """In FP32, without being rounded on the way, in whatever order backwards come."""
    common, slots = shared(), _slots(policy)
    common.wgrad_dtype = torch.float32
    model = nn.ModuleDict({"linear": nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)})
    te_layers.Swap(())(model, ["linear"], [{"linear": slots}], common, {})
    layer: Any = model["linear"]
    layer.weight.main_grad, total = torch.zeros(OUTPUTS, INPUTS), torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    outputs = []
    for seed in range(3):
        x, dy = draw(1, TOKENS, INPUTS, seed=seed), draw(1, TOKENS, OUTPUTS, spread=1e-3, seed=seed)
        outputs.append((layer(x.clone().requires_grad_()), dy))
        total += emulated(layer.weight, None, x, dy, slots, "linear")["dw"]
    for y, dy in reversed(outputs):
        y.backward(dy)
    assert layer.weight.grad is None
    assert distance(layer.weight.main_grad, total) < (3e-4 if policy == "mxfp4" else 1e-6)


@pytest.mark.parametrize("quantized", [True, False])
def test_weight_gradients_can_come_later(quantized):
    """In the queue of a split backward, with the bias gradients of what is not quantized."""
    found = []
    for later in (False, True):
        common, model = shared(), Pair(0)
        common.deferred = [] if later else None
        slots = _slots("nvfp4") if quantized else slots_of("bf16")
        te_layers.Swap((NormLinear("norm", "up"),))(
            model, ["up", "down"], [dict.fromkeys(("up", "down"), slots)], common, {}
        )
        with torch.no_grad():
            model.down.bias.zero_()
        x = draw(1, TOKENS, INPUTS).requires_grad_()
        model(x).backward(draw(1, TOKENS, INPUTS, spread=1e-3))
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        if later:
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            assert gradients["up.weight"] is None and gradients["down.weight"] is None
            assert common.deferred is not None and len(common.deferred) == (2 if quantized else 3)
            gradients |= {names[id(parameter)]: compute() for parameter, compute in common.deferred}
        found.append(gradients | {"dx": x.grad})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
