"""Transformer Engine's layers (tests/te_cpu) sharded, with main_grad, and with a split backward."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lowprec.joints import NormLinear
from lowprec.linear import Shared
from lowprec.slots import Place
from tests.linear_truth import INPUTS, OUTPUTS, TOKENS, distance, draw, emulated, shared, slots_of
from tests.spawn import run_ranks
from tests.te_case import check_all, ours, products, recipes, te_layers

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
    """down(up(norm(x))), of which each of two ranks has half of the features in the middle; None: all."""

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        half = MIDDLE if rank is None else MIDDLE // 2
        rank = rank or 0
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


def _pairs(rank: int | None, sp: bool, policies: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Policy -> what this rank has of y, dx and the gradients; None: of one rank alone."""
    part, found = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2) if sp and rank is not None else slice(None), {}
    for policy in policies:
        model, table = Pair(rank), dict.fromkeys(("up", "down"), _slots(policy))
        swap = te_layers.TeSwap((NormLinear("norm", "up"),), sp)
        swap(model, list(table), [table], shared(), {} if rank is None else _places(rank))
        x = draw(ROWS, INPUTS)[part].clone().requires_grad_()
        with products() as gemms:
            y = model(x[None])[0]
            y.backward(draw(ROWS, INPUTS, spread=1e-3, seed=1)[part])
        found[policy] = {"y": y.detach(), "dx": x.grad} | {name: p.grad for name, p in model.named_parameters()}
        if te_layers.recipe_of is _custom:
            check_all(gemms, policy)  # of this rank's operands; whole tensors have one amax
            assert len(gemms) == 6
    return found


def _custom(table: Any) -> Any:
    return recipes.CustomRecipe(qfactory=ours.Factory(table))


def _all_pairs(rank: int) -> dict[tuple[bool, bool], dict[str, dict[str, Tensor]]]:
    """(sequence parallelism, custom recipes) -> `_pairs`; in one process, for Transformer Engine starts slowly."""
    found = {(sp, False): _pairs(rank, sp, NATIVE) for sp in (False, True)}
    te_layers.recipe_of = _custom
    return found | {(sp, True): _pairs(rank, sp, CUSTOM) for sp in (False, True)}


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


def _whole(both: list[dict[str, Tensor]], sp: bool) -> dict[str, Tensor]:
    """Of two ranks' parts; what both have is equal without sequence parallelism, and with it a sum over tokens."""
    found = {}
    for key, one in both[0].items():
        other = both[1][key]
        if key == "up.weight" or sp and key in ("y", "dx"):
            found[key] = torch.cat([one, other])
        elif key == "down.weight":
            found[key] = torch.cat([one, other], 1)
        else:
            assert sp or torch.equal(one, other), key
            found[key] = one.float() + other.float() if sp else one
    return found


def test_tensor_and_sequence_parallelism(monkeypatch):
    ranks = run_ranks(_all_pairs, 2, timeout=240)
    truths = {(False, policy): _truth(policy) for policy in NATIVE}
    monkeypatch.setattr(te_layers, "recipe_of", _custom)
    truths |= {(True, policy): found for policy, found in _pairs(None, False, CUSTOM).items()}
    for sp, custom in ranks[0]:
        for policy in CUSTOM if custom else NATIVE:
            whole = _whole([rank[sp, custom][policy] for rank in ranks], sp)
            for key, truth in truths[custom, policy].items():
                if custom and key in ("up.weight", "down.weight"):
                    assert torch.equal(whole[key], truth), (policy, key, sp)
                # Partial sums of two ranks are added in BF16.
                assert distance(whole[key], truth) < 5e-3, (policy, key, sp, custom)


@pytest.mark.parametrize("policy", ["mxfp8", "nvfp4", "mxfp4"])
def test_weight_gradients_add_up_in_main_grad(policy):
    """In FP32, without being rounded on the way, in whatever order backwards come."""
    common, slots = shared(), _slots(policy)
    common.wgrad_dtype = torch.float32
    model = nn.ModuleDict({"linear": nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)})
    te_layers.TeSwap(())(model, ["linear"], [{"linear": slots}], common, {})
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


@pytest.mark.parametrize("kind", ["own recipe", "custom", "high"])
def test_weight_gradients_can_come_later(kind, monkeypatch):
    """In the queue of a split backward, with the bias gradients of what is not quantized; the same bits."""
    found = []
    if kind == "custom":
        monkeypatch.setattr(te_layers, "recipe_of", _custom)
    for later in (False, True):
        common, model = shared(), Pair(0)
        common.deferred = [] if later else None
        slots = slots_of("bf16") if kind == "high" else _slots("nvfp4" if kind == "own recipe" else "mxfp4")
        te_layers.TeSwap((NormLinear("norm", "up"),))(
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
            assert common.deferred is not None and len(common.deferred) == (3 if kind == "high" else 2)
            assert _gemms(common) == {"fprop": 2, "dgrad": 2}, "a GEMM counts when it has run"
            gradients |= {names[id(parameter)]: compute() for parameter, compute in common.deferred}
        assert _gemms(common) == {"fprop": 2, "dgrad": 2, "wgrad": 2}
        found.append(gradients | {"dx": x.grad})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def _gemms(common: Shared) -> dict[str, int]:
    """GEMM -> how many of them the receipt has."""
    found: Counter[str] = Counter()
    for (gemm, *_), count in common.counts.items():
        found[gemm] += count
    return dict(found)


def test_a_bias_gradient_that_its_gemm_does_not_give_is_an_error():
    common, model = shared(), Pair(0)
    common.deferred = []
    te_layers.TeSwap(())(model, ["down"], [{"down": slots_of("bf16")}], common, {})
    model(draw(1, TOKENS, INPUTS).requires_grad_()).backward(draw(1, TOKENS, INPUTS))
    (_, (bias, compute)) = common.deferred
    assert bias is model.down.bias
    with pytest.raises(RuntimeError, match="down: the GEMM of the weight gradient gave none of the bias"):
        compute()  # before the weight's
