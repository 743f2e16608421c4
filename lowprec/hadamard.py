"""Random Hadamard rotation of the GEMM's reduction axis.

Each group of n numbers x along the axis becomes x diag(s) H_n / sqrt(n), H_n Sylvester's Hadamard matrix, s +1 or -1.
The rotation is orthogonal: rotating both operands of a GEMM alike leaves the product unchanged, (A R)(B R)^T = A B^T,
and spreads an outlier over its group before quantization.

Signs. "fixed" is NVFP4's vector of 16 for all layers and steps (arXiv 2509.25149 and Transformer Engine: bit mask
0xD7E8), repeated for larger sizes and cut for smaller ones; "none" is all +; "run" and "call" come from
`philox.random_signs`.

Arithmetic. FP32: numbers are multiplied by s / sqrt(n) first (exact for n = 4, 16, 64), then added and subtracted in
log2(n) stages of distance 1, 2, 4, ..., and the result is rounded once, to the dtype of the input. Transformer Engine's
Python reference adds the n products one after the other (its BLAS does). For BF16 input both give the same BF16 number
but for accidents of double rounding; for FP32 input they differ in the last bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.formats import Signs
from lowprec.philox import RandomKey, random_signs

_PART = 1 << 18  # elements
# fmt: off
NVFP4_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
# fmt: on


def sign_vector(size: int, signs: Signs, key: RandomKey | None = None, device: torch.device | str = "cpu") -> Tensor:
    """[size] float32 of +-1; `key` is needed for "run" and "call"."""
    if signs in ("run", "call"):
        assert key is not None, signs
        return random_signs(key, size, fresh=signs == "call", device=device)
    if signs == "none":
        return torch.ones(size, device=device)
    repeated = NVFP4_SIGNS * -(-size // len(NVFP4_SIGNS))
    return torch.tensor(repeated[:size], dtype=torch.float32, device=device)


def _stages(y: Tensor) -> Tensor:
    """y H_n along the middle axis of a contiguous [outer, n, inner], unscaled."""
    outer, size, inner = y.shape
    distance = 1
    while distance < size:
        a, b = y.view(-1, 2, distance * inner).unbind(1)
        y = torch.stack((a + b, a - b), dim=1)
        distance *= 2
    return y.view(outer, size, inner)


def rotate(x: Tensor, signs: Tensor, axis: int = -1, *, inverse: bool = False) -> Tensor:
    """Rotate groups of len(signs) numbers of the matrix x along `axis` (0 or -1); same dtype.

    A ragged axis is padded with zeros, so that the result is longer: a rotated group cannot be cut.
    inverse: apply the transpose, which undoes the rotation up to rounding.
    """
    size = signs.numel()
    if pad := -x.shape[axis] % size:
        x = torch.nn.functional.pad(x, (0, 0, 0, pad) if axis == 0 else (0, pad))
    shape = x.shape
    # [outer, size, inner]: the group's numbers are `inner` apart
    inner = shape[1] if axis == 0 else 1
    factor = signs.float().view(1, size, 1)
    groups = x.reshape(-1, size, inner)
    each = max(1, _PART // (size * inner))  # keeps the temporaries in the processor's cache
    parts = []
    for group in groups.split(each):
        y = group.float() * (size**-0.5 if inverse else factor * size**-0.5)
        # neighbours in a row: put the groups side by side, so that the stages work on long runs
        y = _stages(y.permute(2, 1, 0).contiguous()).permute(2, 1, 0) if inner == 1 else _stages(y)
        parts.append((y * factor if inverse else y).to(x.dtype))
    return torch.cat(parts).view(shape)
