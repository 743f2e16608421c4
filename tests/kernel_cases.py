"""What the fused kernels are compared with lowprec/reference.py on: specs, matrices, and what equal means.

Matrices are small but have everything: whole and ragged blocks, zeros of both signs, subnormal numbers, numbers near
the largest, Inf, NaN, blocks of nothing but NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowprec.formats import SPECS, QuantSpec, resolve_spec
from lowprec.philox import RandomKey
from lowprec.slots import specs_of
from recipe import POLICIES, load_policy

KEY = RandomKey(seed=3, tensor="layers.0.mlp.down", slot="dgrad.a", step=7, row=2**33 + 5, column=32)
STOCHASTIC: dict[str, Any] = {"rounding": "stochastic"}


def _specs() -> Iterator[tuple[str, QuantSpec]]:
    for name, spec in SPECS.items():
        changes: list[dict[str, Any]] = [{}, STOCHASTIC, {**STOCHASTIC, "hadamard": 16}]
        changes += [{"hadamard": size} for size in (2, 8, 16, 32, 128)]
        if spec.scale == "e8m0":
            changes += [{"scale_rule": rule} for rule in ("rceil", "floor", "ceil")]
            changes += [{"scale_rule": "even"}] if spec.format.exponent else []
            changes += [{**STOCHASTIC, "scale_rule": "floor", "three_quarters": True}]
            changes += [{"block": (1, 16)}, {"block": (1, 64)}, {"block": (32, 32)}]
        if spec.scale in ("fp32", "pow2"):
            changes += [{"scale": "fp32"}, {"scale": "pow2"}]
        if spec.hadamard == 0:
            changes += [{"hadamard": 16, "signs": "call"}]
        for change in changes:
            yield f"{name} {change}", resolve_spec(spec, **change)
    yield "generic e3m0", resolve_spec("mxfp4", element="e3m0")
    yield "generic e5m1", resolve_spec("mxfp8_e5m2", element="e5m1")


def _shipped() -> Iterator[tuple[str, QuantSpec]]:
    """What the shipped policies quantize with, but for delayed scaling, whose scale is given."""
    for path in sorted(POLICIES.glob("*.yaml")):
        for slots in load_policy(path.stem).schemes.values():
            for slot, spec in specs_of(slots).items():
                if spec is not None and not spec.amax_history:
                    yield f"{path.stem} {slot}", spec


CASES = dict(_specs())
CASES |= {name: spec for spec, name in {s: n for n, s in _shipped() if s not in CASES.values()}.items()}


def matrices(rows: int, cols: int, dtype: torch.dtype) -> Iterator[Tensor]:
    random = torch.Generator().manual_seed(rows * 1000 + cols)
    x = torch.randn(rows, cols, generator=random) * torch.exp2(
        torch.randint(-12, 12, (rows, 1), generator=random).float()
    )
    yield x.to(dtype)
    small = x.clone()
    small.view(-1)[::7], small.view(-1)[3::11] = 0.0, -0.0
    small[:, : cols // 2] *= 1e-39
    yield small.to(dtype)
    odd = x.clone()
    odd.view(-1)[5], odd.view(-1)[-1], odd[0, :] = torch.inf, torch.nan, torch.nan
    yield odd.to(dtype)
    yield (x * 3e34).to(dtype)
    yield torch.zeros(rows, cols, dtype=dtype)


def assert_same(ours: Tensor | None, truth: Tensor | None) -> None:
    """Same bits; NaNs count as equal."""
    assert (ours is None) == (truth is None)
    if ours is None or truth is None:
        return
    assert ours.dtype == truth.dtype and ours.shape == truth.shape, (ours.shape, truth.shape)
    if ours.dtype.is_floating_point:
        assert torch.equal(ours.isnan(), truth.isnan())
        integer = {2: torch.int16, 4: torch.int32}[ours.element_size()]
        ours, truth = (t.nan_to_num(0.0, torch.inf, -torch.inf).contiguous().view(integer) for t in (ours, truth))
    assert torch.equal(ours, truth)
