"""Initial values as a function of (seed, parameter name, element index): the same for any sharding.

Counter-based, so that any part of a parameter can be made without the rest, bit-equal to the same part of the whole:
    key    = first 128 bits of SHA-256("seed/name"), of a Philox4x64-10 generator (Salmon et al., SC 2011; numpy's)
    words  = its 64-bit output number j, split into two 32-bit halves a (low), b (high)
    u, v   = (a + 1/2) / 2^32, (b + 1/2) / 2^32
    normal = sqrt(-2 ln u) cos(2 pi v), sqrt(-2 ln u) sin(2 pi v)      Box-Muller in FP64
Elements are numbered row by row through the parameter (for fused weights: the flattened matrix, which is the same
order). They come in blocks of 2^16; inside a block the cosines fill the first half and the sines the second. A block is
always computed whole, so that vectorised sin and ln see the same lanes whatever part is asked for. Values times the
standard deviation are rounded once, to FP32: that is where FP32 master weights start; a BF16 parameter holds them
rounded again. 125 M values take 3 to 4 s on one core.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer

BLOCK = 1 << 16  # elements made together; part of the definition of the values
RESIDUAL_OUTPUTS = ("attention.out.weight", "mlp.down.weight")


def _normal_block(key: int, block: int) -> np.ndarray:
    """Standard normal deviates number [block * BLOCK, (block + 1) * BLOCK), FP64."""
    words = BLOCK // 2
    bits = np.random.Philox(key=key, counter=block * (words // 4)).random_raw(words)
    radius = np.sqrt(-2.0 * np.log(((bits & 0xFFFFFFFF) + 0.5) * 2.0**-32))
    angle = ((bits >> 32) + 0.5) * (math.tau * 2.0**-32)
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))


def initial_std(config: ModelConfig, name: str) -> float:
    """Standard deviation of a weight matrix under the scheme `config.init`."""
    if config.init == "megatron" and name.endswith(RESIDUAL_OUTPUTS):
        return config.init_std / math.sqrt(2 * config.num_layers)
    return config.init_std


def initial_range(config: ModelConfig, seed: int, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened parameter `name`, FP32 on the CPU.

    shape: of the whole parameter, as the module or as checkpoints hold it; only its number of elements matters.
    Matrices are normal, weights of norms 1, biases 0.
    """
    assert 0 <= start <= stop <= math.prod(shape), (name, shape, start, stop)
    if name.endswith("bias"):
        return torch.zeros(stop - start)
    if name.endswith("norm.weight"):
        return torch.ones(stop - start)
    std = initial_std(config, name)
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    out = np.empty(stop - start, dtype=np.float32)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = block * BLOCK
        low, high = max(start, first), min(stop, first + BLOCK)
        values = _normal_block(key, block)[low - first : high - first]
        np.multiply(values, std, out=out[low - start : high - start], casting="same_kind")
    return torch.from_numpy(out)


def initial_values(
    config: ModelConfig,
    seed: int,
    name: str,
    shape: tuple[int, ...],
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:
    """FP32 initial values of a rectangle of the parameter `name`, whose module holds [rows, columns] or [rows]."""
    first, last, step = rows.indices(shape[0])
    assert step == 1 and len(shape) <= 2, (name, shape, rows)
    width = math.prod(shape[1:])
    values = initial_range(config, seed, name, shape, first * width, max(first, last) * width)
    return values if len(shape) == 1 else values.view(-1, width)[:, columns]


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Fill every parameter of an unsharded model in place, rounding to its dtype."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_values(model.config, seed, name, tuple(parameter.shape)))
