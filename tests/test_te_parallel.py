"""Transformer Engine's layers (tests/te_cpu) as Megatron uses them: sharded, with main_grad, with a split backward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.spawn import run_ranks
from tests.test_te_layers import INPUTS, NAME, OUTPUTS, TOKENS, distance, draw, emulated, ours, shared, slots_of, te

POLICIES = ("mxfp8", "fp8_block", "fp8_lm")
ROWS = 2 * TOKENS  # each of two ranks has half of a sequence


def _weights() -> tuple[Tensor, Tensor]:
    return draw(2 * OUTPUTS // 3, INPUTS, spread=0.05), draw(INPUTS, 2 * OUTPUTS // 3, spread=0.05)


def _column_then_row(rank: int, sp: bool) -> dict[str, dict[str, Tensor]]:
    """Policy -> what this rank has of y, dx and the two weight gradients."""
    group, found = dist.group.WORLD, {}
    part = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2) if sp else slice(None)
    for policy in POLICIES:
        up, down = _weights()
        half = up.shape[0] // 2
        options = {"bias": False, "params_dtype": torch.bfloat16, "device": "cpu", "tp_group": group, "tp_size": 2}
        options |= {"sequence_parallel": sp}
        first = te.Linear(INPUTS, 2 * half, parallel_mode="column", name="up", **options)
        second = te.Linear(2 * half, INPUTS, parallel_mode="row", name="down", **options)
        with torch.no_grad():
            first.weight.copy_(up[rank * half : (rank + 1) * half])
            second.weight.copy_(down[:, rank * half : (rank + 1) * half])
        x = draw(ROWS, INPUTS)[part].clone().requires_grad_()
        table = dict.fromkeys(("up", "down"), slots_of(policy))
        with te.autocast(recipe=ours.custom_recipe(table, shared())):
            y = second(first(x))
        y.backward(draw(ROWS, INPUTS, spread=1e-3, seed=1)[part])
        found[policy] = {"y": y.detach(), "dx": x.grad, "up": first.weight.grad, "down": second.weight.grad}
    return found


@pytest.mark.parametrize("sp", [False, True])
def test_tensor_and_sequence_parallelism(sp):
    ranks = run_ranks(_column_then_row, 2, sp)
    for policy in POLICIES:
        up, down = _weights()
        slots, x, dy = slots_of(policy), draw(ROWS, INPUTS), draw(ROWS, INPUTS, spread=1e-3, seed=1)
        between = emulated(up, None, x, draw(ROWS, up.shape[0]), slots, "up")["y"].bfloat16()
        second = emulated(down, None, between, dy, slots, "down")
        first = emulated(up, None, x, second["dx"].bfloat16(), slots, "up")
        both = [rank[policy] for rank in ranks]
        whole = {
            "y": torch.cat([rank["y"] for rank in both]) if sp else both[0]["y"],
            "dx": torch.cat([rank["dx"] for rank in both]) if sp else both[0]["dx"],
            "up": torch.cat([rank["up"] for rank in both]),
            "down": torch.cat([rank["down"] for rank in both], 1),
        }
        truths = {"y": second["y"], "dx": first["dx"], "up": first["dw"], "down": second["dw"]}
        # Partial sums of two ranks are added in BF16; a tensor scale of w and dy is a rank's own: a power of two.
        for key, value in whole.items():
            assert distance(value, truths[key]) < 6e-3, (policy, key)


@pytest.mark.parametrize("policy", ["mxfp8", "nvfp4"])
def test_weight_gradients_add_up_in_main_grad(policy):
    """In FP32, without being rounded on the way."""
    layer = te.Linear(
        INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16, device="cpu", name=NAME, fuse_wgrad_accumulation=True
    )
    layer.weight.main_grad = torch.zeros(OUTPUTS, INPUTS)
    slots, total = slots_of(policy), torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    for seed in range(3):
        x, dy = draw(TOKENS, INPUTS, seed=seed), draw(TOKENS, OUTPUTS, spread=1e-3, seed=seed)
        inputs = x.clone().requires_grad_()
        with te.autocast(recipe=ours.custom_recipe({NAME: slots}, shared())):
            layer(inputs).backward(dy)
        total += emulated(layer.weight, None, x, dy, slots)["dw"]
    assert layer.weight.grad is None
    limit = 1e-6 if policy == "mxfp8" else 3e-3
    assert distance(layer.weight.main_grad, total) < limit


def test_weight_gradients_can_come_later():
    gradients = []
    for delay in (False, True):
        layer = te.Linear(
            INPUTS, OUTPUTS, bias=True, params_dtype=torch.bfloat16, device="cpu", name=NAME, delay_wgrad_compute=delay
        )
        with torch.no_grad():
            layer.weight.copy_(draw(OUTPUTS, INPUTS, spread=0.05))
            layer.bias.zero_()
        x = draw(TOKENS, INPUTS).requires_grad_()
        with te.autocast(recipe=ours.custom_recipe({NAME: slots_of("nvfp4")}, shared())):
            layer(x).backward(draw(TOKENS, OUTPUTS, spread=1e-3))
        if delay:
            assert layer.weight.grad is None
            layer.backward_dw()
        gradients.append((x.grad, layer.weight.grad, layer.bias.grad))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
