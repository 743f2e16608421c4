"""The AdamW update of one fragment, whatever its states are stored as: pure functions, in plain torch and fused.

    g = grad_scale grad                                              FP32, as everything below but Collage's moments
    m = m + (1 - b1) (g - m)                      v = b2 v + ((1 - b2) g) g
    d = -(lr / (1 - b1^t)) m / (sqrt(v) / sqrt(1 - b2^t) + eps)      from the new moments, before they are stored
    w = (1 - lr weight_decay) w + d

master  what holds w: "fp32"; "fp16_scaled", FP16 and a power-of-two scale (FP8-LM); "bf16"; "none", the BF16 weight of
        the forward itself. (The last two compute the same.)
update  how w is written:
    nearest        rounded to the master's format
    stochastic     BF16, 16 random bits: unbiased
    kahan          BF16 and its compensation c: Kahan(w, c, u), u = BF16(d - lr weight_decay w)
    collage_light  BF16 pair (w, low): Grow, the same u;  m = b1 m + (1 - b1) g and v = b2 v + (1 - b2) (g g) in BF16,
                   each operation rounded, with FP32 coefficients
    collage_plus   also v a pair, and b2 in its decay a pair (bf16(.999) is 1: a plain BF16 v would never decay)

A second moment "factor" keeps EMAs R, C of the means of g^2 over columns and rows: v_ij = R_i / mean(R) C_j
(Adafactor's factors, the "4-bit Factor" of lpmm); tensors of one dimension take linear4_b128.

Scales of whole tensors take two stages, as FP8-LM's: `statistics` computes the new values and returns their maxima, the
caller MAX-reduces over all holders of the tensor, `apply` computes the values again and stores them. "factor" has one
stage before: `sums`, SUM-reduced, then `advance`.

Sources: Loshchilov and Hutter (arXiv 1711.05101); Peng et al., "FP8-LM" (arXiv 2310.18313); Li, Chen, Zhu (arXiv
2309.01507); Yu et al., "Collage" (arXiv 2405.03637). Ours: d and u of BF16 rules are computed in FP32 and rounded once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from errors import UsageError
from lowprec.codecs import NAMES, Codec, Extent, Part, choose, codec, round_bf16
from lowprec.compensated import grow, kahan_add, scale_pair
from lowprec.kernels import adamw as fused
from lowprec.philox import RandomKey
from lowprec.stepping import Hyper, Tally

__all__ = ["Hyper", "Master", "Rule", "Tally", "Update"]

log = logging.getLogger(__name__)

Master = Literal["fp32", "fp16_scaled", "bf16", "none"]
Rule = Literal["nearest", "stochastic", "kahan", "collage_light", "collage_plus"]
FACTOR = "factor"
_CHUNK, _CHUNK_OF_GPU = 1 << 15, 1 << 24  # elements: a processor's cache holds them; a GPU wants few calls


@dataclass(frozen=True)
class _Step:
    """FP32 [count]: the new moments, the new weight before it is rounded, and the change that is intended."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight: Tensor
    change: Tensor


@dataclass(frozen=True, kw_only=True)
class Update:
    """What the states are stored as and how the weight is written; see the page above.

    exp_avg, exp_avg_sq: a codec's name (lowprec/codecs.py), exp_avg_sq also "factor"
    """

    exp_avg: str = "fp32"
    exp_avg_sq: str = "fp32"
    master: Master = "fp32"
    update: Rule = "nearest"

    def problems(self) -> list[str]:
        """What is wrong, in words; empty if nothing is."""
        found = [
            f"{key} is {getattr(self, key)!r}; use one of {', '.join(choices)}"
            for key, choices in (
                ("exp_avg", NAMES),
                ("exp_avg_sq", (*NAMES, FACTOR)),
                ("master", get_args(Master)),
                ("update", get_args(Rule)),
            )
            if getattr(self, key) not in choices
        ]
        if self.update != "nearest" and self.master not in ("bf16", "none"):
            found.append(f"update {self.update} writes BF16 weights, but master is {self.master}; use bf16 or none")
        if self.collage and (self.exp_avg, self.exp_avg_sq) != ("bf16", "bf16"):
            found.append(
                f"update {self.update} computes with BF16 moments, but exp_avg is {self.exp_avg} and exp_avg_sq is "
                f"{self.exp_avg_sq}; use bf16 for both"
            )
        return found

    @property
    def collage(self) -> bool:
        return self.update.startswith("collage")

    @property
    def weight_codec(self) -> Codec:
        """How the master is stored; its state is {"": tensors["weight"], "scale": tensors["weight.scale"]}."""
        return codec("bf16" if self.master == "none" else self.master, signed=True)

    def factored(self, shape: tuple[int, ...]) -> bool:
        return self.exp_avg_sq == FACTOR and choose("linear4_rank1", shape, signed=False).name == "linear4_rank1"

    def codecs(self, shape: tuple[int, ...]) -> dict[str, Codec]:
        """Of "exp_avg", "exp_avg_sq" (unless it is factored) and "weight", in the order of their statistics."""
        found = {}
        if self.collage:
            found = {name: codec("bf16", signed=name == "exp_avg") for name in ("exp_avg", "exp_avg_sq")}
        else:
            found["exp_avg"] = choose(self.exp_avg, shape, signed=True)
            if not self.factored(shape):
                name = "linear4_b128" if self.exp_avg_sq == FACTOR else self.exp_avg_sq
                found["exp_avg_sq"] = choose(name, shape, signed=False)
        return found | {"weight": self.weight_codec}

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """Every state tensor by its key; "weight" itself, which the caller has, is not among them."""
        found = {
            _key(name, suffix): part
            for name, how in self.codecs(shape).items()
            for suffix, part in how.parts(shape).items()
        }
        del found["weight"]
        if self.factored(shape):
            rows = math.prod(shape[:-1])
            found["exp_avg_sq.rows"] = Part(torch.float32, 0, rows)
            found["exp_avg_sq.columns"] = Part(torch.float32, 0, shape[-1])
        if self.update == "kahan":
            found["compensation"] = Part(torch.bfloat16, 1)
        if self.collage:
            found["weight.low"] = Part(torch.bfloat16, 1)
        if self.update == "collage_plus":
            found["exp_avg_sq.low"] = Part(torch.bfloat16, 1)
        return found

    def allocate(self, extent: Extent, weight: Tensor) -> dict[str, Tensor]:
        """States before the first step, by key, on the device of `weight`, the working weight or the master."""
        if self.master == "none" and weight.dtype != torch.bfloat16:
            raise UsageError(f"master none updates BF16 weights in place, but they are {weight.dtype}; use master fp32")
        states = {
            key: torch.zeros(part.size(extent.count), dtype=part.dtype, device=weight.device)
            for key, part in self.parts(extent.shape).items()
        }
        for name, how in self.codecs(extent.shape).items():
            for suffix, tensor in how.allocate(extent, weight.device).items():
                if (key := _key(name, suffix)) != "weight":
                    states[key] = tensor
        return states

    @property
    def measured(self) -> bool:
        """Whether updates can be lost: weights, or their masters, are written in BF16."""
        return self.master in ("bf16", "none")

    def sums_length(self, shape: tuple[int, ...]) -> int:
        """Length of what `sums` returns for a tensor of `shape`; 0: nothing."""
        return math.prod(shape[:-1]) + shape[-1] if self.factored(shape) else 0

    def statistics_length(self, shape: tuple[int, ...]) -> int:
        """Length of what `statistics` returns for a tensor of `shape`; 0: nothing."""
        return sum(how.statistics_length(shape) for how in self.codecs(shape).values())

    @torch.no_grad()
    def set_weights(
        self, extent: Extent, tensors: Mapping[str, Tensor], values: Tensor, statistics: Tensor | None = None
    ) -> None:
        """Store FP32 values [count] as the master; statistics: those of `weight_codec`, reduced over all holders."""
        self.weight_codec.encode(values, extent, _state(tensors, "weight"), statistics, None)

    def weights(self, extent: Extent, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the master holds, FP32 [count]."""
        return self.weight_codec.decode(_state(tensors, "weight"), extent)

    @torch.no_grad()
    def write_working(self, tensors: Mapping[str, Tensor], working: Tensor) -> None:
        """Round what the master holds into the working weights [count], a chunk at a time."""
        master, scale = tensors["weight"], tensors.get("weight.scale")
        if scale is None:
            working.copy_(master)
            return
        chunk = _CHUNK if working.is_cpu else _CHUNK_OF_GPU
        for into, part in zip(working.split(chunk), master.split(chunk), strict=True):
            into.copy_(part.float().mul_(scale))

    @torch.no_grad()
    def sums(self, extent: Extent, grad: Tensor, hyper: Hyper) -> Tensor | None:
        """Sums of g^2 over columns and over rows, float64 [rows + columns], to be SUM-reduced; None if not factored."""
        if not self.factored(extent.shape):
            return None
        squares = extent.matrix(_gradient(grad, hyper).double().square())
        rows = squares.new_zeros(extent.numel // extent.columns)
        rows[extent.rows] = squares.sum(dim=1)
        return torch.cat((rows, squares.sum(dim=0)))

    @torch.no_grad()
    def advance(self, extent: Extent, tensors: Mapping[str, Tensor], sums: Tensor, hyper: Hyper) -> None:
        """Move the factors by one step, in place: once, before `statistics` and `apply`."""
        rows, columns = tensors["exp_avg_sq.rows"], tensors["exp_avg_sq.columns"]
        beta = hyper.betas[1]
        for factor, total in ((rows, sums[: len(rows)]), (columns, sums[len(rows) :])):
            factor.mul_(beta).add_((total / (extent.numel // len(factor))).float() * (1.0 - beta))

    @torch.no_grad()
    def statistics(self, extent: Extent, tensors: Mapping[str, Tensor], grad: Tensor, hyper: Hyper) -> Tensor | None:
        """Maxima that scales of the whole tensor need, FP32 1-D, to be MAX-reduced; None if there are none."""
        if not self.statistics_length(extent.shape):
            return None
        if (job := self._fused(extent, tensors, grad, hyper)) is not None:
            return job.statistics()
        return self.statistics_plain(extent, tensors, grad, hyper)

    @torch.no_grad()
    def statistics_plain(
        self, extent: Extent, tensors: Mapping[str, Tensor], grad: Tensor, hyper: Hyper
    ) -> Tensor | None:
        """`statistics` in plain torch, the truth."""
        codecs = self.codecs(extent.shape)
        step = self._compute(extent, tensors, grad, hyper)
        found = [how.statistics(getattr(step, name), extent) for name, how in codecs.items()]
        found = [each for each in found if each is not None]
        return torch.cat(found) if found else None

    @torch.no_grad()
    def apply(
        self,
        extent: Extent,
        tensors: Mapping[str, Tensor],
        grad: Tensor,
        hyper: Hyper,
        statistics: Tensor | None = None,
        key: RandomKey | None = None,
        measure: bool = False,
    ) -> Tally:
        """One step, in place.

        tensors:    what `allocate` made, and "weight": the master as stored; all 1-D, [count] or as their parts say
        grad:       FP32 or BF16 [count], finite
        statistics: the reduced ones
        key:        seed, name of the parameter, step; for stochastic rounding
        measure:    whether to tally
        """
        if (job := self._fused(extent, tensors, grad, hyper)) is None:
            return self.apply_plain(extent, tensors, grad, hyper, statistics, key, measure)
        random = None
        if self.update == "stochastic":
            assert key is not None, "stochastic rounding needs a key"
            random = replace(key, slot="weight")
        sums = job.apply(statistics, random, measure)
        return Tally(torch.cat((sums, sums.new_tensor([extent.count])))) if measure else Tally.nothing()

    @torch.no_grad()
    def apply_plain(
        self,
        extent: Extent,
        tensors: Mapping[str, Tensor],
        grad: Tensor,
        hyper: Hyper,
        statistics: Tensor | None = None,
        key: RandomKey | None = None,
        measure: bool = False,
    ) -> Tally:
        """`apply` in plain torch, the truth."""
        if self.collage:
            return self._collage(tensors, _gradient(grad, hyper), hyper, measure)
        step = self._compute(extent, tensors, grad, hyper)
        before = self._represented(extent, tensors) if measure else None
        for name, how in self.codecs(extent.shape).items():
            mine = None
            if statistics is not None and (length := how.statistics_length(extent.shape)):
                mine, statistics = statistics[:length], statistics[length:]
            if name != "weight":
                random = replace(key, slot=name) if key is not None else None
                how.encode(getattr(step, name), extent, _state(tensors, name), mine, random)
            elif self.update == "stochastic":
                assert key is not None, "stochastic rounding needs a key"
                bits = extent.uniform(replace(key, slot=name)).to(grad.device)
                tensors[name].copy_(round_bf16(step.weight, bits))
            elif self.update == "kahan":
                pair = kahan_add(tensors[name], tensors["compensation"], step.change.bfloat16())
                tensors[name].copy_(pair[0])
                tensors["compensation"].copy_(pair[1])
            else:
                how.encode(step.weight, extent, _state(tensors, name), mine, None)
        if before is None:
            return Tally.nothing()
        return Tally.of(step.change, self._represented(extent, tensors) - before)

    def _fused(self, extent: Extent, tensors: Mapping[str, Tensor], grad: Tensor, hyper: Hyper) -> fused.Job | None:
        """The kernel's job, or None if there is no kernel for this; said once in the log."""
        job = fused.Job(self.codecs(extent.shape), self.update, extent, tensors, grad, hyper.numbers)
        if (reason := job.problem()) is None:
            return job
        _say_once(self, reason)
        return None

    def _compute(self, extent: Extent, tensors: Mapping[str, Tensor], grad: Tensor, hyper: Hyper) -> _Step:
        codecs = self.codecs(extent.shape)
        old = {name: how.decode(_state(tensors, name), extent) for name, how in codecs.items()}
        gradient = _gradient(grad, hyper)
        beta1, beta2 = hyper.betas
        exp_avg = old["exp_avg"] + (gradient - old["exp_avg"]) * (1.0 - beta1)
        if "exp_avg_sq" in codecs:
            exp_avg_sq = old["exp_avg_sq"] * beta2 + gradient * (1.0 - beta2) * gradient
        else:
            rows, columns = tensors["exp_avg_sq.rows"], tensors["exp_avg_sq.columns"]
            mean = rows.double().mean().float()
            share = rows[extent.rows, None] / torch.where(mean > 0, mean, 1.0)
            exp_avg_sq = extent.flat(share * columns)
        change = _change(exp_avg, exp_avg_sq, hyper)
        weight = old["weight"] * (1.0 - hyper.decay) + change
        return _Step(exp_avg, exp_avg_sq, weight, change - old["weight"] * hyper.decay)

    def _represented(self, extent: Extent, tensors: Mapping[str, Tensor]) -> Tensor:
        """float64 [count]: the weight with what its rule keeps beside it."""
        weight = self.weights(extent, tensors).double()
        if self.update == "kahan":
            weight -= tensors["compensation"]
        if self.collage:
            weight += tensors["weight.low"]
        return weight

    def _collage(self, tensors: Mapping[str, Tensor], gradient: Tensor, hyper: Hyper, measure: bool) -> Tally:
        weight, low, exp_avg = tensors["weight"], tensors["weight.low"], tensors["exp_avg"]
        exp_avg_sq = tensors["exp_avg_sq"]
        beta1, beta2 = hyper.betas
        exp_avg.copy_((exp_avg.float() * beta1).bfloat16() + (gradient * (1.0 - beta1)).bfloat16())
        added = ((gradient * gradient).bfloat16().float() * (1.0 - beta2)).bfloat16()
        if self.update == "collage_plus":
            pair = grow(scale_pair((exp_avg_sq, tensors["exp_avg_sq.low"]), beta2), added)
            exp_avg_sq.copy_(pair[0])
            tensors["exp_avg_sq.low"].copy_(pair[1])
        else:
            exp_avg_sq.copy_((exp_avg_sq.float() * beta2).bfloat16() + added)
        change = _change(exp_avg.float(), exp_avg_sq.float(), hyper) - weight.float() * hyper.decay
        pair = grow((weight, low), change.bfloat16())
        before = weight.double() + low.double() if measure else None
        weight.copy_(pair[0])
        low.copy_(pair[1])
        return Tally.nothing() if before is None else Tally.of(change, weight.double() + low.double() - before)


@cache
def _say_once(update: Update, reason: str) -> None:
    log.warning("AdamW of %s takes the plain path: no kernel for %s", vars(update), reason)


def _gradient(grad: Tensor, hyper: Hyper) -> Tensor:
    return grad.float() * hyper.grad_scale


def _change(exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper) -> Tensor:
    """Adam's change of the weight. The root is taken in FP64: torch's FP32 one (MKL) is not the nearest number."""
    root = exp_avg_sq.double().sqrt().float()
    return exp_avg * -hyper.step_size / (root * hyper.root_correction + hyper.eps)


def _key(name: str, suffix: str) -> str:
    return f"{name}.{suffix}" if suffix else name


def _state(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state `name` by suffix."""
    return {key[len(name) :].lstrip("."): t for key, t in tensors.items() if key == name or key.startswith(name + ".")}
