"""Random bits as a function of (seed, tensor, slot, step, element): Philox4x32-10 in plain torch.

    key      first 8 bytes, little endian, of SHA-256("seed/tensor/slot"): words k0 (low), k1 (high)
    counter  of element (r, c) of the logical, never transposed matrix:
             8 bits:   c0 = c // 16, and byte c % 16 of the 16 bytes that come out (little endian)
             16 bits:  c0 = c // 8, and bytes 2 (c % 8) and 2 (c % 8) + 1 of them (little endian)
             32 bits:  c0 = c // 4, and word c % 4
             c1, c2 = low and high 32 bits of the global row r,   c3 = step
    round    hi0:lo0 = 0xD2511F53 c0,  hi1:lo1 = 0xCD9E8D57 c2
             c <- (hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0);  between rounds k0 += 0x9E3779B9, k1 += 0xBB67AE85

The global row of a token is (index of its sample in the step's global batch) * seq_len + position, so that the bits do
not depend on ranks, threads, gradient accumulation or slicing; tensor parallelism adds a column offset.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; known answers from the
authors' Random123 library.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

ROUNDS = 10
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


@cache
def key_words(text: str) -> tuple[int, int]:
    """(k0, k1) of a key's text, "seed/tensor/slot"."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


@dataclass(frozen=True, kw_only=True)
class RandomKey:
    """Everything that the random bits of one quantized tensor depend on.

    seed:    of the run
    tensor:  logical name of the module, e.g. "layers.3.mlp.down"
    slot:    GEMM and operand, e.g. "dgrad.a"
    step:    optimizer step, 0 .. 2^32 - 1
    row:     global row of the tensor's row 0
    column:  global column of its column 0
    """

    seed: int
    tensor: str = ""
    slot: str = ""
    step: int = 0
    row: int = 0
    column: int = 0

    def words(self) -> tuple[int, int]:
        """Philox key (k0, k1) of the rounding bits."""
        return key_words(f"{self.seed}/{self.tensor}/{self.slot}")


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """Where a run is: makes the keys of every tensor that is quantized in a micro-batch.

    seed, step:  of the run
    row:         global row of the micro-batch's first token
    """

    seed: int
    step: int = 0
    row: int = 0

    def key(self, tensor: str, slot: str, *, tokens: bool = True, column: int = 0) -> RandomKey:
        """Key of one operand; `tokens` False for weights, whose rows are numbered from 0 (or by their own offset)."""
        row = self.row if tokens else 0
        return RandomKey(seed=self.seed, tensor=tensor, slot=slot, step=self.step, row=row, column=column)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10. Counter words and results: int64 tensors holding 0 .. 2^32 - 1, of broadcastable shapes."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap, which keeps all 64 bits of an unsigned 32 x 32 product
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> 32) & _LOW ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) & _LOW ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def random_bits(
    key: RandomKey, rows: int, cols: int, bits: Literal[8, 16, 32] = 8, device: torch.device | str = "cpu"
) -> Tensor:
    """Random bits of the matrix [rows, cols] whose corner is (key.row, key.column).

    Returns uint8 [rows, cols] for 8 bits, int32 in 0 .. 2^16 - 1 for 16, int64 in 0 .. 2^32 - 1 for 32.
    """
    assert bits in (8, 16, 32) and 0 <= key.step <= _LOW, (bits, key.step)
    each = 128 // bits
    first, last = key.column // each, -(-(key.column + cols) // each)
    row = torch.arange(key.row, key.row + rows, dtype=torch.int64, device=device)[:, None]
    column = torch.arange(first, last, dtype=torch.int64, device=device)[None, :]
    step = torch.full((), key.step, dtype=torch.int64, device=device)
    words = philox((column, row & _LOW, row >> 32, step), key.words())
    out = torch.stack(words, dim=-1).reshape(rows, -1)
    if bits == 8:
        # the low half of each int64; on a big-endian machine the bytes would come reversed, torch has none
        out = out.to(torch.int32).view(torch.uint8)
    elif bits == 16:
        out = out.to(torch.int32).view(torch.int16).to(torch.int32) & 0xFFFF
    start = key.column - first * each
    return out[:, start : start + cols]


def random_signs(key: RandomKey, size: int, *, fresh: bool, device: torch.device | str = "cpu") -> Tensor:
    """[size] float32 of +1 and -1 for a rotation: bit j of the output words, counted from the lowest, is set for -1.

    fresh False: one vector for the run, key "seed//signs", counter 0. True: one for each tensor name, GEMM and step,
    key "seed/tensor/gemm/signs", counter (0, 0, 0, step): both operands of a GEMM get the same vector, and so do all
    micro-batches of a step, because weights are quantized once for all of them.
    """
    assert 1 <= size <= 128, size
    gemm = key.slot.partition(".")[0]
    text = f"{key.seed}/{key.tensor}/{gemm}/signs" if fresh else f"{key.seed}//signs"
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = torch.stack(philox((zero, zero, zero, zero + (key.step if fresh else 0)), key_words(text)))
    j = torch.arange(size, dtype=torch.int64, device=device)
    return 1.0 - 2.0 * ((words[j // 32] >> (j % 32)) & 1).float()
