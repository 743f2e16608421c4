"""A linear whose three GEMMs multiply quantized operands, over the six slots.

    fprop   y  = Q(x)  Q(w)^T     x and w along K (in features)
    dgrad   dx = Q(dy) Q(w)       dy and w along N (out features)
    wgrad   dw = Q(dy)^T Q(x)     dy and x along T (tokens)

Each Q quantizes the high-precision matrix along its own GEMM's reduction axis. A quantized operand is exact in BF16,
so a BF16 GEMM with FP32 accumulation multiplies the very numbers that a tensor core would; tensor scales are applied to
the FP32 accumulator (GEMM alpha), rounded once. Operands that BF16 cannot hold exactly take an FP32 GEMM.

Under tensor parallelism a rank has some columns of x and w, or some rows of w and columns of dy (`Place`). Every rank
then quantizes as the whole matrix would be: tensor amaxes are those of all ranks, random bits those of the global
element, and blocks must not be cut.

The weight's copies are made once a step (`prepare`) and shared by all micro-batches. Of the input only the wgrad copy
is saved, packed. Random bits depend on the position of the micro-batch, not on a generator: recomputation gives the
same. The weight gradient goes to autograd, whose accumulator is FP32 (lowprec/zero.py), or into the queue of a split
backward.

Where a CPU multiplies in FP32, all of it is one operator if that can compute the same (lowprec/kernels/linear.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import UsageError
from lowprec import dispatch
from lowprec.delayed import DelayedScale
from lowprec.formats import QuantSpec
from lowprec.kernels.linear import Stream
from lowprec.philox import RandomKey, StepContext
from lowprec.policy import GEMMS, Slots
from lowprec.quantized import Operand, QuantizedTensor
from lowprec.slots import SLOT_AXES, Place, same_amax, same_both_ways, specs_of


class Quantizers(Protocol):
    """The functions of lowprec/dispatch.py that a linear calls."""

    path: Callable[..., str]
    operand: Callable[..., Operand]
    save: Callable[..., QuantizedTensor]
    amax: Callable[..., Tensor]
    decode: Callable[..., Operand]


@dataclass
class Shared:
    """What all low-precision linears of a model share: one object, changed between micro-batches by its owner.

    position:      step and first token of the micro-batch, for random bits
    gemm_dtype:    BF16, or FP32 on machines whose BF16 GEMMs are slower (the products are exact in both)
    wgrad_dtype:   of a weight gradient as it leaves its GEMM
    pack_saved:    save the wgrad copy of the input packed; else decoded
    keep_weights:  keep the weight's quantized copies for the whole step (False: made anew at each use, for ZeRO 3)
    deferred:      None, or the queue of weight gradients of a split backward
    quantizers:    what answers in the place of lowprec/dispatch.py (report/plan, without numbers); None: that itself
    counts:        GEMMs run, by (gemm, element of a and what quantized it, the same of b, dtype of the product)
    """

    position: StepContext
    gemm_dtype: torch.dtype = torch.bfloat16
    wgrad_dtype: torch.dtype = torch.bfloat16
    pack_saved: bool = True
    keep_weights: bool = True
    deferred: list[tuple[nn.Parameter, Callable[[], Tensor]]] | None = None
    quantizers: Quantizers | None = None  # not the module itself: a TE recipe, which holds this, must survive a pickle
    counts: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)

    @property
    def kernels(self) -> Quantizers:
        """What quantizes."""
        return dispatch if self.quantizers is None else self.quantizers


class LowPrecisionLinear(nn.Module):
    """Drop-in for an nn.Linear: same parameters under the same names."""

    shares = True  # one operand for two GEMMs, where it is the same numbers
    streams = True  # all may run in one operator: False where `operand` or `multiply` are watched or replaced

    def __init__(self, linear: nn.Linear, name: str, slots: Slots, shared: Shared, place: Place | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.name, self.shared, self.place = name, shared, place
        self.skip_bias = False  # whoever uses the output adds the bias
        self.delayed: dict[str, DelayedScale] = {}
        self.ran: set[str] = set()  # its GEMMs that have run at least once
        self._copies: dict[str, Operand] = {}
        self._receipts: dict[tuple[str, torch.dtype], tuple[str, str, str, str]] = {}
        self._made: Stream | Literal[False] | None = None  # of `_stream`; False: there is none; None: not known yet
        self.same: dict[str, bool] = {}  # whether both operands made of a matrix are the same numbers
        self.same_amax: dict[str, bool] = {}  # or are scaled by the same amax
        self.use(slots)

    def use(self, slots: Slots) -> None:
        """Take other slots from now on; histories of delayed scaling go on where the format stays."""
        self.settle()
        self.slots = slots
        self.specs = specs_of(slots)
        for kind in ("x", "w", "dy"):
            one, other = (self.specs[slot] for slot, (of, _) in SLOT_AXES.items() if of == kind)
            self.same[kind] = self.shares and same_both_ways(one, other)
            self.same_amax[kind] = same_amax(one, other)
        for slot, spec in self.specs.items():
            if spec is not None and spec.amax_history:
                kind = SLOT_AXES[slot][0]
                state = self.delayed.setdefault(kind, DelayedScale(spec, device=self.weight.device))
                if (spec.element, spec.hadamard) != (state.spec.element, state.spec.hadamard):
                    raise UsageError(
                        f"{self.name}: delayed scaling keeps one amax history of {kind}, but {slot} quantizes it to "
                        f"{spec.element} (hadamard {spec.hadamard}) and another slot to {state.spec.element} "
                        f"(hadamard {state.spec.hadamard}); give both slots the same format"
                    )
        self._copies.clear()
        self._receipts.clear()
        self._made = None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, scheme={self.slots.scheme}"

    @torch.compiler.disable  # the step and the caches are Python state; the rest of a block is compiled around it
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.skip_bias else self.bias
        if (stream := self._stream_for(x)) is not None:
            weights = self.weight_operand("fprop.b"), self.weight_operand("dgrad.b")
            return stream(x, self.weight, bias, weights, self._key, self.wgrad_dtype)
        return _Linear.apply(x, self.weight, bias, self, torch.is_grad_enabled())

    def _stream_for(self, x: Tensor) -> Stream | None:
        """What computes `forward` and its backward in one operator, where it can; that is faster."""
        trains = x.requires_grad and self.weight.requires_grad
        if self.shared.deferred is not None or x.dtype != torch.bfloat16 or torch.is_grad_enabled() and not trains:
            return None
        return self._stream()

    def _stream(self) -> Stream | None:
        shared = self.shared
        if not (self.streams and shared.keep_weights and shared.quantizers is None):
            return None
        if self._made is None:
            self._made = self._new_stream() or False
        return self._made or None

    def _new_stream(self) -> Stream | None:
        weight, split = self.weight, self.place.split if self.place else frozenset()
        if (self.shared.gemm_dtype, weight.dtype, weight.device.type) != (torch.float32, torch.bfloat16, "cpu"):
            return None
        specs: dict[str, QuantSpec] = {}
        for slot, (kind, axis) in SLOT_AXES.items():
            spec = self.specs[slot]
            if spec is None or spec.amax_history or kind in split and (spec.draws or spec.takes_amax):
                return None
            if dispatch.path(spec, axis, weight.dtype, "cpu") != dispatch.FUSED:
                return None
            specs[slot] = spec
        return Stream(specs, packs=self.shared.pack_saved)

    def _key(self, slot: str) -> RandomKey:
        return self.shared.position.key(self.name, slot, tokens=SLOT_AXES[slot][0] != "w")

    @torch.no_grad()
    def prepare(self) -> None:
        """Make the weight's copies of this step; to be called when the weight has changed."""
        self._copies.clear()
        if not self.shared.keep_weights:
            return
        if not self.same["w"] and (stream := self._stream()) is not None:
            self._copies["fprop.b"], self._copies["dgrad.b"] = stream.weights(self.weight.detach(), self._key)
            return
        for slot in ("fprop.b", "dgrad.b"):
            self._copies[slot] = self.weight_operand(slot)

    def weight_operand(self, slot: str) -> Operand:
        """Q(w) for fprop.b or dgrad.b; the two are one where blocks are square or the whole tensor."""
        if slot in self._copies:
            return self._copies[slot]
        if slot == "dgrad.b" and "fprop.b" in self._copies and self.same["w"]:
            return self._copies["fprop.b"]
        return self.operand(slot, self.weight.detach(), self.shared.position)

    def operand(
        self, slot: str, matrix: Tensor, position: StepContext, *, training: bool = True, amax: Tensor | None = None
    ) -> Operand:
        """Quantize and decode a matrix for its slot; what is seen outside training enters no amax history.

        amax: what the matrix's other slot has found, where that is the `same_amax`
        """
        spec, (kind, axis) = self.specs[slot], SLOT_AXES[slot]
        if spec is None:
            return Operand(matrix, None, None)
        if amax is None:
            amax = self._amax(slot, matrix, position)
        scale, dtype = self._encode_scale(kind, spec), self.decoded(spec)
        pieces = [
            self.shared.kernels.operand(piece, spec, axis, key, scale, dtype, amax)
            for piece, key in self._pieces(slot, matrix, position)
        ]
        found = pieces[0]
        if len(pieces) > 1:
            found = found._replace(values=torch.cat([piece.values for piece in pieces], 0 if kind == "w" else 1))
        if training:
            self._record(kind, spec, found.amax)
        return found

    def pack(self, slot: str, matrix: Tensor, position: StepContext, amax: Tensor | None = None) -> QuantizedTensor:
        """Quantize a matrix for its slot, to be decoded later; amax as of `operand`."""
        spec, (kind, axis) = self.specs[slot], SLOT_AXES[slot]
        assert spec is not None
        ((piece, key),) = self._pieces(slot, matrix, position)  # x, whose columns are one run
        if amax is None:
            amax = self._amax(slot, matrix, position)
        packed = self.shared.kernels.save(piece, spec, axis, key, self._encode_scale(kind, spec), amax)
        self._record(kind, spec, packed.amax)
        return packed

    def _amax(self, slot: str, matrix: Tensor, position: StepContext) -> Tensor | None:
        """The amax of a matrix of which ranks have parts, if its format scales by it; else None: found on the way."""
        spec, (kind, axis), place = self.specs[slot], SLOT_AXES[slot], self.place
        if place is None or kind not in place.split or spec is None or not spec.takes_amax or spec.amax_history:
            return None
        key = position.key(self.name, slot, tokens=kind != "w")
        amax = self.shared.kernels.amax(matrix, spec, axis, key)
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=place.group)
        return amax

    def _pieces(self, slot: str, matrix: Tensor, position: StepContext) -> Sequence[tuple[Tensor, RandomKey | None]]:
        """The matrix and its key, if it needs one; in pieces where random bits need the numbers of features in runs."""
        spec, (kind, _), place = self.specs[slot], SLOT_AXES[slot], self.place
        assert spec is not None
        if not spec.draws:
            return [(matrix, None)]
        key = position.key(self.name, slot, tokens=kind != "w")
        if place is None or spec.rounding != "stochastic":
            return [(matrix, key)]
        if kind == "w":
            rows = matrix.split([count for _, count in place.outputs], 0)
            firsts = [first for first, _ in place.outputs]
            return [
                (piece, replace(key, row=first, column=place.inputs[0]))
                for piece, first in zip(rows, firsts, strict=True)
            ]
        runs = place.columns(kind)
        columns = matrix.split([count for _, count in runs], 1)
        return [(piece, replace(key, column=first)) for piece, (first, _) in zip(columns, runs, strict=True)]

    def decoded(self, spec: QuantSpec) -> torch.dtype:
        """Of an operand's numbers: what its GEMM multiplies in, if it holds them exactly."""
        return self.shared.gemm_dtype if spec.exact_in_bf16 else torch.float32

    def _encode_scale(self, kind: str, spec: QuantSpec) -> Tensor | None:
        return self.delayed[kind].scale if spec.amax_history else None

    def _record(self, kind: str, spec: QuantSpec, amax: Tensor | None) -> None:
        if spec.amax_history:
            assert amax is not None
            self.delayed[kind].record(amax)

    def multiply(self, gemm: str, a: Operand, b: Operand, bias: Tensor | None = None) -> Tensor:
        """The product of two operands, ordered by `gemm`; scales and bias meet the FP32 accumulator; one rounding."""
        left = a.values.T if gemm == "wgrad" else a.values
        right = b.values.T if gemm == "fprop" else b.values
        scales = [
            scale.T if turned and scale.ndim == 2 else scale
            for scale, turned in ((a.scale, gemm == "wgrad"), (b.scale, gemm == "fprop"))
            if scale is not None
        ]
        out = self.wgrad_dtype if gemm == "wgrad" else self.weight.dtype
        exact = left.dtype == right.dtype == torch.bfloat16
        dtype = self.shared.gemm_dtype if exact else torch.float32
        self.count(gemm, dtype)
        scalars = all(scale.ndim == 0 for scale in scales)
        alpha = float(math.prod(scales[1:], start=scales[0])) if scales and scalars else 1.0
        if dtype == out == torch.bfloat16 and scalars:
            if not scales and bias is None:
                return left @ right
            added, beta = (left.new_zeros(1), 0) if bias is None else (bias, 1)
            return torch.addmm(added, left, right, beta=beta, alpha=alpha)
        if scales and scalars:
            nothing = left.new_zeros(1, dtype=torch.float32)
            product = torch.addmm(nothing, left.float(), right.float(), beta=0, alpha=alpha)
        else:
            product = left.float() @ right.float()
            for scale in scales:
                product *= scale
        if bias is not None:
            product += bias
        return product.to(out)

    @property
    def wgrad_dtype(self) -> torch.dtype:
        """Of the weight gradient as it leaves its GEMM: never less than an FP32 weight has."""
        return torch.promote_types(self.weight.dtype, self.shared.wgrad_dtype)

    def count(self, gemm: str, product: torch.dtype, times: int = 1) -> None:
        """Note GEMMs for the receipt: their operands' elements, what quantized them, and the products' dtype."""
        if (gemm, product) not in self._receipts:
            words, place = [], (self.weight.dtype, self.weight.device.type)
            for side in ("a", "b"):
                spec, axis = self.specs[f"{gemm}.{side}"], SLOT_AXES[f"{gemm}.{side}"][1]
                path = "" if spec is None else self.shared.kernels.path(spec, axis, *place)
                words.append("high" if spec is None else f"{spec.element} ({path})")
            self._receipts[gemm, product] = (gemm, words[0], words[1], str(product).removeprefix("torch."))
        self.shared.counts[self._receipts[gemm, product]] += times
        self.ran.add(gemm)

    def settle(self) -> None:
        """Note the GEMMs that one operator ran; to be called before anyone looks at the counts."""
        if not self._made:
            return
        for gemm, times in zip(GEMMS, self._made.ran.tolist(), strict=True):
            if times:
                self.count(gemm, torch.float32, times)
        self._made.ran.zero_()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, layer: LowPrecisionLinear, training: bool
    ) -> Tensor:
        shared, matrix = layer.shared, x.reshape(-1, layer.in_features)
        ctx.layer, ctx.position, ctx.shape = layer, shared.position, x.shape
        ctx.deferred, ctx.has_bias = shared.deferred, bias is not None
        found = layer.operand("fprop.a", matrix, shared.position, training=training)
        y = layer.multiply("fprop", found, layer.weight_operand("fprop.b"), bias)
        amax = found.amax if layer.same_amax["x"] else None
        ctx.packed = None
        if not (training and weight.requires_grad):
            return y.view(*x.shape[:-1], layer.out_features)
        if layer.specs["wgrad.b"] is not None and shared.pack_saved:
            del found  # memory for the codes
            packed = layer.pack("wgrad.b", matrix, shared.position, amax)
            # Tensors go through save_for_backward, so that activation recomputation can drop them.
            ctx.packed = (packed.spec, packed.axis, packed.shape, packed.upright)
            ctx.save_for_backward(packed.codes, packed.scales, packed.amax)
        else:
            if not layer.same["x"]:
                del found
                found = layer.operand("wgrad.b", matrix, shared.position, amax=amax)
            ctx.save_for_backward(*found)
        return y.view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        layer: LowPrecisionLinear = ctx.layer
        dy = gradients[0].reshape(-1, layer.out_features)
        dx = dw = db = amax = found = None
        if ctx.needs_input_grad[0]:
            found = layer.operand("dgrad.a", dy, ctx.position)
            dx = layer.multiply("dgrad", found, layer.weight_operand("dgrad.b")).view(ctx.shape)
            amax = found.amax if layer.same_amax["dy"] else None
            if not layer.same["dy"] or ctx.deferred is not None:  # a queue keeps dy rather than what is decoded of it
                found = None
        if ctx.needs_input_grad[1]:
            saved, packed, position = ctx.saved_tensors, ctx.packed, ctx.position

            def weight_gradient() -> Tensor:
                x = Operand(*saved)
                if packed is not None:
                    whole = QuantizedTensor(*saved, *packed)
                    x = layer.shared.kernels.decode(whole, layer.decoded(whole.spec), layer.weight.dtype)
                a = layer.operand("wgrad.a", dy, position, amax=amax) if found is None else found
                return layer.multiply("wgrad", a, x)

            if ctx.deferred is None:
                dw = weight_gradient()
            else:
                ctx.deferred.append((layer.weight, weight_gradient))
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = dy.sum(0, dtype=torch.float32)
        return dx, dw, db, None, None
