"""The Mamba-2 mixer: a linear recurrence over time, computed as matrix products (Dao and Gu, arXiv:2405.21060).

Shapes: B batch, S sequence, G groups, R heads of a group, P head size, N state size; C chunks of Q tokens.

    z, x, B, C, dt = in_proj(u)                      the rows of in_proj are [G, z | x | B | C | dt of the group]
    x, B, C = silu(conv(x, B, C))                    depthwise and causal
    dt = softplus(dt + dt_bias),  a = -exp(A_log)    one of each a head
    h_t = exp(dt_t a) h_(t-1) + dt_t x_t B_t^T       the state of a head, [P, N]; B and C are those of its group
    y_t = h_t C_t + D x_t
    out_proj(norm(y silu(z)))                        RMSNorm over each group's channels, after the gate

`scan` is the state-space-dual form: within a chunk y is a masked matrix product as in attention, between chunks states
travel by a C x C matrix of decays. Everything between the two projections is FP32, whatever the model's dtype, and
rounded once, as in the hybrids of the NVFP4 paper (arXiv:2509.25149). With documents in a sequence neither the
convolution nor the state crosses a border.

All parameters are ordered by group, so that a tensor-parallel rank's part is a range of rows (in_proj, conv, norm,
A_log, D, dt_bias) or of columns (out_proj). The number of groups is read from the projection's output, so the module
works unchanged on such a part. Megatron-LM orders the rows of a rank [z | x | B | C | dt], each of all its groups, and
keeps A_log and D in FP32, where ours have the model's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.linear import Linear


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Sizes of the Mamba-2 blocks of model.pattern; the defaults are those of the NVFP4 paper's hybrids.

    state: numbers that each channel of a head remembers.
    groups: of heads that share B and C, and one normalisation.
    head_dim: channels of a head.
    expand: inner width, in hidden sizes.
    conv: tokens that the causal convolution sees.
    chunk: most tokens that the scan treats as one matrix; it changes speed, and results in the last digits.
    """

    state: int = 128
    groups: int = 8
    head_dim: int = 64
    expand: int = 2
    conv: int = 4
    chunk: int = 128

    def inner(self, hidden: int) -> int:
        """Channels of all heads."""
        return self.expand * hidden

    def heads(self, hidden: int) -> int:
        """Heads of all groups."""
        return self.inner(hidden) // self.head_dim

    def group_sizes(self, hidden: int) -> tuple[int, int, int, int, int]:
        """Rows of in_proj for one group: z, x, B, C, dt."""
        channels = self.inner(hidden) // self.groups
        return channels, channels, self.state, self.state, channels // self.head_dim

    def conv_rows(self, hidden: int) -> int:
        """Channels of the convolution for one group: x, B, C."""
        return sum(self.group_sizes(hidden)[1:4])

    def parameter_count(self, hidden: int, bias: bool) -> int:
        """Number of parameters of one mixer; `bias` on its two projections."""
        rows, inner = self.groups * sum(self.group_sizes(hidden)), self.inner(hidden)
        conv = self.groups * self.conv_rows(hidden) * (self.conv + 1)
        return hidden * (rows + inner) + (rows + hidden) * bias + conv + inner + 3 * self.heads(hidden)

    def flops_per_token(self, hidden: int) -> int:
        """FLOPs to train one mixer on one token, by Megatron-LM's convention: the two projections, and 7 inner state
        for the recurrence's forward. The convolution is not counted, nor what the chunked form adds.
        """
        rows, inner = self.groups * sum(self.group_sizes(hidden)), self.inner(hidden)
        return 6 * hidden * (rows + inner) + 21 * inner * self.state

    def problems(self, hidden: int) -> list[str]:
        """One message for each invalid value of a model with `hidden` features; empty if it can be built."""
        found = [f"{name} is {value}: it must be at least 1" for name, value in vars(self).items() if value < 1]
        if found:
            return found
        inner = self.inner(hidden)
        if inner % self.head_dim:
            return [f"head_dim {self.head_dim} does not divide the inner width, expand x hidden_size = {inner}"]
        if self.heads(hidden) % self.groups:
            return [f"groups {self.groups} does not divide the {self.heads(hidden)} heads (inner width {inner})"]
        return []


def run_numbers(document_ids: Tensor) -> Tensor:
    """document_ids [B, S] -> int64 [B, S]: the number of the run of equal ids that each token is in."""
    return F.pad((document_ids.diff(dim=1) != 0).cumsum(1), (1, 0))


def segment_sums(logs: Tensor) -> Tensor:
    """[..., T] -> [..., T, T]: at (t, s) the sum over s < k <= t, zero for s >= t.

    Not as differences of prefix sums: those cancel, and their gradients even more.
    """
    later = logs.new_ones(logs.shape[-1], logs.shape[-1], dtype=torch.bool).tril(-1)
    return torch.where(later, logs[..., :, None], 0.0).cumsum(-2)


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int, runs: Tensor | None = None) -> Tensor:
    """y_t = h_t c_t with h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t^T, for every head of every group; all FP32.

    x [B, S, G, R, P], dt [B, S, G, R] >= 0, a [G, R] < 0, b and c [B, S, G, N] -> y as x. chunk: most tokens a chunk;
    runs [B, S]: of `run_numbers`, the state begins anew with each; None: one run.
    """
    length = x.shape[1]
    count = -(-length // chunk)
    size = -(-length // count)  # as equal as can be, so that little is padded

    def cut(tensor: Tensor) -> Tensor:
        """[B, S, ...] -> [B, C, Q, ...]; zeros at the end leave states as they are."""
        padding = (0, 0) * (tensor.ndim - 2) + (0, count * size - length)
        return F.pad(tensor, padding).unflatten(1, (count, size))

    dt = cut(dt).permute(0, 1, 3, 4, 2).contiguous()  # [B, C, G, R, Q]
    logs = dt * a[..., None]  # of each token's decay
    # Multiplied with tokens last: the gradient of dt, summed over P with R last, would be written past its end by what
    # torch.compile makes for CPUs (github.com/pytorch/pytorch/issues/196681).
    x = cut(x).permute(0, 1, 3, 4, 5, 2).contiguous() * dt[..., None, :]  # [B, C, G, R, P, Q]
    b, c = cut(b).transpose(2, 3), cut(c).transpose(2, 3)  # [B, C, G, Q, N]
    seen = x.new_ones(size, size, dtype=torch.bool).tril()
    if runs is not None:
        runs = cut(runs)
        seen = (seen & (runs[..., :, None] == runs[..., None, :]))[:, :, None, None]
    sums = segment_sums(logs)
    y = x @ ((c @ b.mT)[:, :, :, None] * sums.masked_fill(~seen, -math.inf).exp()).mT
    if count > 1:
        y = y + _from_earlier_chunks(x * sums[..., None, -1, :].exp(), logs.cumsum(-1), b, c, runs)
    return y.permute(0, 1, 5, 2, 3, 4).flatten(1, 2)[:, :length]


def _from_earlier_chunks(x: Tensor, logs: Tensor, b: Tensor, c: Tensor, runs: Tensor | None) -> Tensor:
    """What the states at the chunks' beginnings give to y [B, C, G, R, P, Q].

    x: decayed up to the chunk's end; logs [B, C, G, R, Q]: of the decay from the chunk's start; others as `scan` cuts.
    """
    heads, count = x.shape[3:5], x.shape[1]
    from_start = logs.exp()
    earlier = x.new_ones(count, count, dtype=torch.bool).tril(-1)
    if runs is not None:
        last = runs[..., -1:]
        before = F.pad(last[:, :-1], (0, 0, 1, 0), value=-1)  # [B, C, 1]: the run that ends, or goes on, at the start
        x = x * (runs == last)[:, :, None, None, None]
        from_start = from_start * (runs == before)[:, :, None, None]
        earlier = (earlier & (before == last.mT))[:, None, None]
    between = segment_sums(logs[..., -1].permute(0, 2, 3, 1))  # [B, G, R, C, C]
    between = F.pad(between, (0, 0, 1, -1))  # at (i, j): from the end of chunk j to the start of i
    between = between.masked_fill(~earlier, -math.inf).exp()
    states = x.flatten(3, 4) @ b  # [B, C, G, R P, N]: what each chunk adds
    states = states.unflatten(3, heads).permute(0, 2, 3, 1, 4, 5)
    states = (between @ states.flatten(4)).unflatten(4, states.shape[4:]).permute(0, 3, 1, 2, 4, 5)
    return (states.flatten(3, 4) @ c.mT).unflatten(3, heads) * from_start[..., None, :]


class CausalConv(nn.Module):
    """Depthwise: y_t = bias + sum_j weight[:, width - 1 - j] x_(t-j), in FP32. Weight [channels, width]."""

    def __init__(self, channels: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, dtype=dtype))

    def forward(self, x: Tensor, runs: Tensor | None) -> Tensor:
        """x FP32 [B, S, channels]; tokens of other runs [B, S] count as zeros."""
        length, y = x.shape[1], self.bias.float()
        for back, tap in enumerate(self.weight.float().flip(1).unbind(1)):
            past = F.pad(x, (0, 0, back, 0))[:, :length]
            if runs is not None:
                past = past * (F.pad(runs, (back, 0), value=-1)[:, :length] == runs)[..., None]
            y = y + past * tap
        return y


class GroupRMSNorm(nn.Module):
    """RMSNorm over the last dimension of FP32 [..., groups, size], with a weight [groups size] of its own for each."""

    def __init__(self, channels: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        return F.rms_norm(x, (size,), eps=self.eps) * self.weight.float().unflatten(0, (-1, size))


class Mamba(nn.Module):
    """u [B, S, hidden] -> [B, S, hidden]. recompute: the backward computes all between the projections again."""

    def __init__(
        self,
        config: MambaConfig,
        hidden: int,
        *,
        bias: bool,
        norm_eps: float,
        dtype: torch.dtype,
        gemm_dtype: torch.dtype | None,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.sizes, self.chunk, self.recompute = config.group_sizes(hidden), config.chunk, recompute
        inner, heads = config.inner(hidden), config.heads(hidden)
        rows = config.groups * sum(self.sizes)
        self.in_proj = Linear(hidden, rows, bias=bias, dtype=dtype, gemm_dtype=gemm_dtype)
        self.conv = CausalConv(config.groups * config.conv_rows(hidden), config.conv, dtype)
        self.A_log = nn.Parameter(torch.empty(heads, dtype=dtype))
        self.D = nn.Parameter(torch.empty(heads, dtype=dtype))
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=dtype))
        self.norm = GroupRMSNorm(inner, norm_eps, dtype)
        self.out_proj = Linear(inner, hidden, bias=bias, dtype=dtype, gemm_dtype=gemm_dtype)

    def forward(self, u: Tensor, document_ids: Tensor | None) -> Tensor:
        """document_ids [B, S]: state and convolution stay within runs of equal ids; None: one document."""
        projected = self.in_proj(u)
        if self.recompute:
            y = checkpoint(self._mix, projected, document_ids, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self._mix(projected, document_ids)
        return self.out_proj(y)

    def _mix(self, projected: Tensor, document_ids: Tensor | None) -> Tensor:
        """[B, S, rows of in_proj] -> [B, S, inner], both in the model's dtype."""
        channels, _, state, _, heads = self.sizes
        runs = None if document_ids is None else run_numbers(document_ids)
        groups = projected.float().unflatten(-1, (-1, sum(self.sizes)))  # [B, S, G, ...]
        z, xbc, dt = groups.split((channels, channels + 2 * state, heads), dim=-1)
        xbc = F.silu(self.conv(xbc.flatten(2), runs)).unflatten(-1, (-1, channels + 2 * state))
        x, b, c = xbc.split((channels, state, state), dim=-1)
        x = x.unflatten(-1, (heads, -1))
        a_log, d, dt_bias = (each.float().unflatten(0, (-1, heads)) for each in (self.A_log, self.D, self.dt_bias))
        y = scan(x, F.softplus(dt + dt_bias), -a_log.exp(), b, c, self.chunk, runs) + d[..., None] * x
        return self.norm(y.flatten(3) * F.silu(z)).flatten(2).to(projected.dtype)
