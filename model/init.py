"""Initial values as a function of (seed, parameter name, element index): the same for any sharding.

Counter-based, so that any part of a parameter can be made without the rest, bit-equal to the same part of the whole:
    key    = first 128 bits of SHA-256("seed/name"), of a Philox4x64-10 generator (Salmon et al., SC 2011; numpy's)
    words  = its 64-bit output number j, split into two 32-bit halves a (low), b (high)
    u, v   = (a + 1/2) / 2^32, (b + 1/2) / 2^32
    normal = sqrt(-2 ln u) cos(2 pi v), sqrt(-2 ln u) sin(2 pi v)      Box-Muller in FP64
    uniform = u, v
Elements are numbered row by row through the parameter (for fused weights: the flattened matrix, which is the same
order). They come in blocks of 2^16; inside a block the cosines (u) fill the first half and the sines (v) the second. A
block is always computed whole, so that vectorised sin and ln see the same lanes whatever part is asked for. Values
times the standard deviation are rounded once, to FP32: that is where FP32 master weights start; a BF16 parameter holds
them rounded again. 125 M values take 3 to 4 s on one core.

Parameters of Mamba-2 that are not matrices start as in Megatron-LM's mixer:
    A_log       ln(uniform(1, 16))
    dt_bias     inverse softplus of dt, which is log-uniform(0.001, 0.1) but at least 1e-4
    conv        weight and bias uniform(-1, 1) / sqrt(width)
    D           1
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer

BLOCK = 1 << 16  # elements made together; part of the definition of the values
RESIDUAL_OUTPUTS = ("attention.out.weight", "mlp.down.weight", "mamba.out_proj.weight")


def _uniform_block(key: int, block: int) -> np.ndarray:
    """Uniform deviates in (0, 1) number [block * BLOCK, (block + 1) * BLOCK), FP64."""
    words = BLOCK // 2
    bits = np.random.Philox(key=key, counter=block * (words // 4)).random_raw(words)
    return (np.concatenate((bits & 0xFFFFFFFF, bits >> 32)) + 0.5) * 2.0**-32


def _normal(uniform: np.ndarray) -> np.ndarray:
    """Standard normal deviates of a block of uniform ones."""
    u, v = np.split(uniform, 2)
    radius, angle = np.sqrt(-2.0 * np.log(u)), math.tau * v
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))


def _inverse_softplus(dt: np.ndarray) -> np.ndarray:
    return dt + np.log(-np.expm1(-dt))


def _distribution(config: ModelConfig, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What turns a block of uniform deviates into initial values of the parameter `name`."""
    if name.endswith("mamba.A_log"):
        return lambda u: np.log(1.0 + 15.0 * u)
    if name.endswith("mamba.dt_bias"):
        low, high = math.log(1e-3), math.log(1e-1)
        return lambda u: _inverse_softplus(np.exp(low + (high - low) * u).clip(1e-4))
    if ".mamba.conv." in name:
        return lambda u: (2.0 * u - 1.0) / math.sqrt(config.mamba.conv)
    return lambda u: _normal(u) * initial_std(config, name)


def initial_std(config: ModelConfig, name: str) -> float:
    """Standard deviation of a weight matrix under the scheme `config.init`."""
    if config.init == "megatron" and name.endswith(RESIDUAL_OUTPUTS):
        return config.init_std / math.sqrt(len("".join(config.blocks)))
    return config.init_std


def initial_range(config: ModelConfig, seed: int, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened parameter `name`, FP32 on the CPU.

    shape: of the whole parameter, as the module or as checkpoints hold it; only its number of elements matters.
    Matrices are normal, weights of norms 1, biases 0; those of Mamba-2 are in the module's docstring.
    """
    assert 0 <= start <= stop <= math.prod(shape), (name, shape, start, stop)
    if name.endswith(".bias") and not name.endswith("mamba.conv.bias"):
        return torch.zeros(stop - start)
    if name.endswith(("norm.weight", "mamba.D")):
        return torch.ones(stop - start)
    distribution = _distribution(config, name)
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    out = np.empty(stop - start, dtype=np.float32)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = block * BLOCK
        low, high = max(start, first), min(stop, first + BLOCK)
        values = distribution(_uniform_block(key, block))
        out[low - start : high - start] = values[low - first : high - first]
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
