"""The model's linears a second time, observed: they take the place of the model's own for one forward and backward.

    lab = Lab(parts, precision, places, layers, table)
    with lab.high():                 every linear multiplies in BF16
    with lab.low(step) as sample:    they quantize as `table` says; each operand and product is measured

What the run itself holds is left alone: its linears, their quantized copies, amax histories, counts and random bits
(these are functions of names and positions). Nothing is hooked outside the two contexts. Blocks must run uncompiled.

A GEMM's error is taken on part of its product, at most `LINES` rows (of wgrad columns), against the same GEMM of the
high-precision operands: |Q(a) Q(b) - a b| / |a b|. It includes the rounding of the product to BF16, about 0.002. Where
tensor parallelism splits the reduction, each rank's summand is compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import UsageError
from lowprec import dispatch
from lowprec.apply import Precision, refuse_misfits
from lowprec.formats import QuantSpec
from lowprec.linear import LowPrecisionLinear, Shared
from lowprec.philox import StepContext
from lowprec.policy import GEMMS, HIGH, Slots
from lowprec.probe.statistics import OperandSums, TensorSums, blockwise_range
from lowprec.quantized import Operand
from lowprec.slots import SLOT_AXES, Place

LINES = 64
# tensor of Transformer Engine's features -> the slot, or the GEMM, where it is seen
TENSORS = {"activation": "fprop.a", "weight": "fprop.b", "gradient": "dgrad.a"}
PRODUCTS = {"output": "fprop", "dgrad": "dgrad", "wgrad": "wgrad"}


@dataclass
class Sample:
    """What one forward and backward showed of this rank's shards.

    operands: (layer, slot) -> sums of a quantized operand
    specs:    (layer, slot) -> how it is quantized
    products: (layer, GEMM) -> float64 [2]: squares of the sampled product in high precision, and of its error
    tensors:  (layer, tensor of TENSORS or PRODUCTS) -> sums of the tensor as it is, where asked for
    ranges:   (layer, tensor, block size, dims) -> float64 scalar, where asked for
    others:   (layer, slot, specification's name) -> sums as another specification would quantize it, where asked for
    """

    operands: dict[tuple[str, str], OperandSums] = field(default_factory=dict)
    specs: dict[tuple[str, str], QuantSpec] = field(default_factory=dict)
    products: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    tensors: dict[tuple[str, str], TensorSums] = field(default_factory=dict)
    ranges: dict[tuple[str, str, int, int], Tensor] = field(default_factory=dict)
    others: dict[tuple[str, str, str], OperandSums] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """What a sample shall hold beside operands and products: keys of Sample's last three, and specifications."""

    tensors: frozenset[tuple[str, str]] = frozenset()
    ranges: frozenset[tuple[str, str, int, int]] = frozenset()
    others: Mapping[tuple[str, str, str], QuantSpec] = field(default_factory=dict)
    layers: frozenset[str] = frozenset()  # of which anything is asked for


class Observed(LowPrecisionLinear):
    """Computes as the linear that it is made from would under `slots`, and measures. Records no amax."""

    shares = streams = False  # every slot is looked at
    sample: Sample
    wanted: Wanted
    packs: bool  # whether the run keeps inputs packed

    def __init__(self, linear: Any, name: str, shared: Shared, place: Place | None) -> None:
        super().__init__(linear, name, Slots(HIGH), shared, place)
        self._exact: dict[str, Tensor] = {}

    def operand(
        self, slot: str, matrix: Tensor, position: StepContext, *, training: bool = True, amax: Tensor | None = None
    ) -> Operand:
        kind, axis = SLOT_AXES[slot]
        matrix, spec = matrix.detach(), self.specs[slot]
        self._look(slot, matrix, position)
        if spec is None:
            found = Operand(matrix, None, None)
        else:
            found = self._quantized(slot, matrix, spec, position, amax)
        self._exact[slot] = matrix[:, _lines(matrix.shape[1])].clone() if slot == "wgrad.b" else matrix
        return found

    def multiply(self, gemm: str, a: Operand, b: Operand, bias: Tensor | None = None) -> Tensor:
        product = super().multiply(gemm, a, b, bias)
        left, right = self._exact.pop(f"{gemm}.a"), self._exact[f"{gemm}.b"]
        for tensor, which in PRODUCTS.items():
            if which == gemm and self._wants(tensor):
                self._look_at(tensor, self._whole(gemm, product))
        if self.specs[f"{gemm}.a"] is None and self.specs[f"{gemm}.b"] is None:
            return product
        lines = _lines(product.shape[1 if gemm == "wgrad" else 0])
        if gemm == "wgrad":
            exact, rounded = left.T.float() @ right.float(), product[:, lines].float()
        else:
            right = right.T if gemm == "fprop" else right
            exact, rounded = left[lines].float() @ right.float(), product[lines].float()
            rounded = rounded if bias is None else rounded - bias.float()
        squares = [torch.linalg.vector_norm(t).double().square() for t in (exact, rounded - exact)]
        self.sample.products[self.name, gemm] = torch.stack(squares)
        return product

    def forget(self) -> None:
        """Let go of the tensors of the last forward and backward."""
        self._exact.clear()
        self.sample = Sample()

    def _quantized(self, slot: str, matrix: Tensor, spec: Any, position: StepContext, amax: Tensor | None) -> Operand:
        kind, axis = SLOT_AXES[slot]
        if amax is None:
            amax = self._amax(slot, matrix, position)
        scale = self._encode_scale(kind, spec)
        pieces, sums = [], []
        for piece, key in self._pieces(slot, matrix, position):
            packed = dispatch.save(piece, spec, axis, key, scale, amax)
            found = dispatch.decode(packed, self.decoded(spec), piece.dtype)
            # In memory as in the run, whose GEMM adds in the same order then: packed inputs may be decoded transposed.
            if slot != "wgrad.b" or not self.packs:
                found = found._replace(values=found.values.contiguous())
            pieces.append(found)
            sums.append(OperandSums.of(piece, packed, pieces[-1], key))
        self.sample.specs[self.name, slot] = spec
        self.sample.operands[self.name, slot] = OperandSums(
            torch.stack([each.sums for each in sums]).sum(0), torch.stack([each.maxima for each in sums]).amax(0)
        )
        if len(pieces) == 1:
            return pieces[0]
        return pieces[0]._replace(values=torch.cat([each.values for each in pieces], 0 if kind == "w" else 1))

    def _look(self, slot: str, matrix: Tensor, position: StepContext) -> None:
        """What was asked for of the matrix as it is, and of other specifications."""
        for tensor, where in TENSORS.items():
            if where == slot:
                self._look_at(tensor, matrix)
        axis = SLOT_AXES[slot][1]
        for (layer, where, name), spec in self.wanted.others.items():
            if (layer, where) == (self.name, slot):
                key = position.key(self.name, slot, tokens=SLOT_AXES[slot][0] != "w")
                packed = dispatch.quantize(matrix, spec, axis, key, None)
                found = dispatch.decode(packed, self.decoded(spec), matrix.dtype)
                self.sample.others[layer, slot, name] = OperandSums.of(matrix, packed, found, key)

    def _wants(self, tensor: str) -> bool:
        keys = (*self.wanted.tensors, *self.wanted.ranges)
        return any((layer, which) == (self.name, tensor) for layer, which, *_ in keys)

    def _whole(self, gemm: str, product: Tensor) -> Tensor:
        """The product, added up over the ranks among which its reduction is split. Collective over them."""
        reduced = {"fprop": "x", "dgrad": "dy"}.get(gemm)
        if self.place is None or reduced not in self.place.split:
            return product
        total = product.to(torch.float32, copy=True)
        dist.all_reduce(total, group=self.place.group)
        return total.to(product.dtype)

    def _look_at(self, tensor: str, matrix: Tensor) -> None:
        if (self.name, tensor) in self.wanted.tensors:
            self.sample.tensors[self.name, tensor] = TensorSums.of(matrix)
        for layer, which, size, dims in self.wanted.ranges:
            if (layer, which) == (self.name, tensor):
                both = [matrix, matrix.T.contiguous()] if tensor in ("activation", "weight") else [matrix]
                found = torch.stack([blockwise_range(each, size, dims) for each in both]).amax()
                self.sample.ranges[layer, which, size, dims] = found.double()


def _lines(count: int) -> slice:
    """At most LINES evenly spread rows or columns of `count`."""
    return slice(0, None, max(1, -(-count // LINES)))


class Lab:
    """Observed linears of this rank's parts of the model.

    precision: of the run
    places:    linear name -> which part of it this rank has (tensor parallelism)
    layers:    globs over names: which linears to look at; the others compute as they do
    table:     another policy's slots by name; None: the run's own, phase by phase
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        precision: Precision,
        places: Mapping[str, Place],
        layers: Sequence[str],
        table: Mapping[str, Slots] | None = None,
    ) -> None:
        self._precision, self._table = precision, table
        mine = {"pack_saved": False, "keep_weights": False, "deferred": None, "counts": Counter()}
        self._shared = replace(precision.shared, **mine)
        self._linears: dict[str, tuple[nn.Module, Observed]] = {}
        self._plain: dict[str, LowPrecisionLinear] = {}
        found: dict[str, nn.Module] = {
            name: module
            for part in parts
            for name, module in part.named_modules()
            if isinstance(module, (nn.Linear, LowPrecisionLinear))
        }
        for name, module in found.items():
            place = places.get(name)
            observed = Observed(module, name, self._shared, place)
            observed.packs = precision.shared.pack_saved
            self._plain[name] = LowPrecisionLinear(module, name, Slots(HIGH), self._shared, place)  # pyright: ignore[reportArgumentType]
            for each in (observed, self._plain[name]):
                each.skip_bias = bool(getattr(module, "skip_bias", False))
            self._linears[name] = (module, observed)
        self.chosen = [name for name in found if any(fnmatchcase(name, pattern) for pattern in layers)]
        if table is not None:
            self._refuse_histories(table)
            refuse_misfits([table], found, places)

    def _refuse_histories(self, table: Mapping[str, Slots]) -> None:
        for name in self._linears:
            for gemm in GEMMS:
                if any(spec is not None and spec.amax_history for spec in vars(getattr(table[name], gemm)).values()):
                    raise UsageError(
                        f"probe.policy quantizes {name} {gemm} with delayed scaling, whose amax history only a run "
                        "under that policy has; use a policy with current scaling (fp8_current)"
                    )

    @property
    def table(self) -> Mapping[str, Slots]:
        """The slots that `low` computes in now."""
        return self._precision.now if self._table is None else self._table

    @property
    def tables(self) -> list[Mapping[str, Slots]]:
        """Those that it computes in at any time of the run."""
        return [table for _, table in self._precision.tables] if self._table is None else [self._table]

    @contextmanager
    def high(self) -> Iterator[None]:
        """Every linear multiplies in BF16."""
        with self._in_place(self._plain):
            yield

    @contextmanager
    def low(self, step: int, wanted: Wanted | None = None) -> Iterator[Sample]:
        """Every linear quantizes; those chosen are measured. step: whose random bits."""
        sample, table = Sample(), self.table
        self._shared.position = replace(self._precision.shared.position, step=step, row=0)
        for name, (module, observed) in self._linears.items():
            if observed.slots != table[name]:
                observed.use(table[name])
            if self._table is None and isinstance(module, LowPrecisionLinear):
                observed.delayed = module.delayed
            observed.wanted = wanted or Wanted()
            observed.sample = sample if name in self.chosen or name in observed.wanted.layers else Sample()
        with self._in_place({name: observed for name, (_, observed) in self._linears.items()}):
            yield sample
        for _, observed in self._linears.values():
            observed.forget()

    @contextmanager
    def _in_place(self, others: Mapping[str, LowPrecisionLinear]) -> Iterator[None]:
        """Modules run the forward of their others; hooks, names and parameters stay theirs."""
        held = {name: vars(module).get("forward") for name, (module, _) in self._linears.items()}
        for name, (module, _) in self._linears.items():
            vars(module)["forward"] = others[name].forward
        try:
            yield
        finally:
            for name, (module, _) in self._linears.items():
                del vars(module)["forward"]
                if held[name] is not None:
                    vars(module)["forward"] = held[name]
