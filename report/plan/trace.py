"""Run a model's own code on tensors without memory, and note every operation: FLOPs, bytes, and what is alive when.

Modules of a real rank run on torch's fake tensors, which have shapes, dtypes and lifetimes but no numbers. A dispatch
mode sees each operation that they come to, forward and backward, recomputation and collectives included, so nothing of
the model is described a second time here. Quantizers are the exception: `Quantizers` answers in their place, since a
kernel needs numbers (and a compiler).

    live   bytes of all tensors that the traced code has made and that something still holds; storages count once
    peak   the largest value of `live` since the phase began
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowprec.formats import QuantSpec
from lowprec.philox import RandomKey
from lowprec.quantized import Axis, Operand, QuantizedTensor
from report.plan.copies import kind_of, packed_shapes

Touched = tuple[tuple[int, int], ...]  # (number of a tensor's storage, bytes of it), ...

# What operations are like, by their names in ATen; an operation that is not named is pointwise.
_NAMES = {
    "gemm": "mm addmm bmm baddbmm",
    "attention": "_scaled_dot_product_flash_attention_for_cpu",
    "attention backward": "_scaled_dot_product_flash_attention_for_cpu_backward",
    "transcendental": (
        "exp log rsqrt sqrt pow silu silu_backward sigmoid tanh gelu gelu_backward softplus softplus_backward cos sin "
        "_softmax _softmax_backward_data logsumexp"
    ),
    "reduction": "sum mean amax max any all cumsum linalg_vector_norm native_layer_norm native_layer_norm_backward",
    "gather": "embedding embedding_dense_backward gather index",
    "copy": (
        "_to_copy copy clone cat stack constant_pad_nd repeat flip tril slice_backward select_backward scatter "
        "scatter_add index_put masked_fill fill zero arange full full_like zeros zeros_like ones ones_like new_zeros "
        "new_ones new_full scalar_tensor"
    ),
    "free": "_unsafe_view empty empty_like empty_strided new_empty new_empty_strided lift_fresh set_ resize",
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
COLLECTIVES = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}


@dataclass(frozen=True)
class Product:
    """A GEMM of a low-precision linear: fprop, dgrad or wgrad, and the kinds of its operands (None: not quantized)."""

    leg: str
    a: str | None
    b: str | None


@dataclass(frozen=True)
class Op:
    """One operation.

    kind:    gemm, attention, attention backward, quantize, decode, a collective, or what else it is like: pointwise,
             transcendental, reduction, gather, copy
    width:   bytes of its widest floating-point element
    flops:   of its products; 0 where bytes decide
    shape:   of a GEMM (batch, m, k, n); of attention (batch, heads, key heads, positions, head size)
    product: of a low-precision linear's GEMM
    spec, axis: of a quantization
    packed:  bytes of a quantization's result as native kernels would write it; of what a collective is given, where
             it travels in a payload
    """

    kind: str
    width: int
    reads: Touched
    writes: Touched
    flops: float = 0.0
    shape: tuple[int, ...] = ()
    product: Product | None = None
    spec: QuantSpec | None = None
    axis: Axis = -1
    packed: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return sum(count for _, count in self.reads) + sum(count for _, count in self.writes)


@dataclass(frozen=True)
class Phase:
    """A stretch of a trace.

    ops:   in order
    peak:  most bytes alive at once
    kept:  bytes alive at its end
    alive: numbers of the storages alive at its end
    """

    ops: tuple[Op, ...]
    peak: int
    kept: int
    alive: frozenset[int] = frozenset()


class Trace(TorchDispatchMode):
    """Active within `with`, inside a FakeTensorMode. Tensors given to `known` are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.live = self.peak = 0
        self._numbers: dict[int, int] = {}  # id of a storage's C++ object, while it lives -> its number
        self._sizes: dict[int, int] = {}  # number -> bytes counted, while it lives
        self._next = 0
        self._label: Product | None = None

    def known(self, tensors: Iterator[Tensor] | Sequence[Tensor]) -> None:
        """Tensors of somebody else: parameters, inputs."""
        for tensor in tensors:
            self._number(tensor, counted=False)

    @contextmanager
    def phase(self) -> Iterator[list[Phase]]:
        """Note what happens inside; the list holds one `Phase` afterwards."""
        found: list[Phase] = []
        self.ops, self.peak = [], self.live
        yield found
        found.append(Phase(tuple(self.ops), self.peak, self.live, frozenset(self._sizes)))

    def announce(self, product: Product) -> None:
        """The next GEMM is this one."""
        self._label = product

    def note(self, kind: str, reads: Sequence[Tensor], writes: Sequence[Tensor], **more: Any) -> None:
        """Note an operation that answers without torch's."""
        width = max(t.element_size() for t in (*reads, *writes))
        self.ops.append(Op(kind, width, self._touched(reads), self._touched(writes), **more))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._number(tensor)
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self._collective(name, args)
        elif func.namespace == "aten" and not func.is_view and _kind(name) != "free":
            self._operation(func, name, args, kwargs, outputs)
        return result

    def _operation(self, func: Any, name: str, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func._schema.is_mutable and "out" not in kwargs:
            outputs = outputs or inputs[:1]
        kind, label = _kind(name), None
        # Attention's sums are FP32, whatever it multiplies.
        wide = inputs[:1] if kind.startswith("attention") else [*inputs, *outputs]
        floats = [t.element_size() for t in wide if t.is_floating_point()]
        if kind == "gemm":
            label, self._label = self._label, None
        reads = self._touched(inputs)
        if name in ("embedding", "gather", "index"):  # reads what it writes, wherever that lies
            reads = tuple((number, sum(map(_nbytes, outputs))) for number, _ in reads[:1]) + reads[1:]
        self.ops.append(
            Op(kind, max(floats, default=8), reads, self._touched(outputs), *_product(name, args, outputs), label)
        )

    def _collective(self, name: str, args: Any) -> None:
        if name not in COLLECTIVES:
            return
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        given = tensors[-1]  # all-gather and reduce-scatter name their output first
        self.note(COLLECTIVES[name], [given], tensors[:1])

    def _touched(self, tensors: Sequence[Tensor]) -> Touched:
        found: dict[int, int] = {}
        for tensor in tensors:
            number = self._number(tensor)
            found[number] = max(found.get(number, 0), _nbytes(tensor))
        return tuple(found.items())

    def _number(self, tensor: Tensor, counted: bool = True) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            number = self._numbers[key] = self._next
            self._next += 1
            if counted:
                self._sizes[number] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, number)
        return self._numbers[key]

    def _forget(self, key: int, number: int) -> None:
        self._numbers.pop(key, None)
        self.live -= self._sizes.pop(number, 0)


def _kind(name: str) -> str:
    return _KINDS.get(name) or _KINDS.get(name.removesuffix("_")) or "pointwise"


def _nbytes(tensor: Tensor) -> int:
    """Bytes that a pass over the tensor moves; what is expanded is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _product(name: str, args: Any, outputs: Sequence[Tensor]) -> tuple[float, tuple[int, ...]]:
    """(FLOPs, shape): two for each multiply-add; causal attention at half of the square, its backward five products."""
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        a, y = args[name.startswith(("add", "badd"))], outputs[0]
        shape = (math.prod(y.shape[:-2]), y.shape[-2], a.shape[-1], y.shape[-1])
        return 2.0 * math.prod(shape), shape
    if not _kind(name).startswith("attention"):
        return 0.0, ()
    backward = name.endswith("backward")
    q, k = args[1:3] if backward else args[:2]
    place = 7 if backward else 4
    causal = args[place] if len(args) > place else False
    square = 2.0 * q.numel() * k.shape[-2] * (0.5 if causal else 1.0)
    return square * (5 if backward else 2), (q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3])


class Receipt(Counter[tuple[str, str, str, str]]):
    """Takes the place of `lowprec.linear.Shared.counts`: tells the trace which GEMM comes next."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __setitem__(self, key: tuple[str, str, str, str], count: int) -> None:
        super().__setitem__(key, count)
        leg, *operands, _ = key
        self._trace.announce(Product(leg, *(_kind_in(word) for word in operands)))


def _kind_in(word: str) -> str | None:
    """ "e4m3 (mxfp8)" -> "mxfp8"; "high" -> None."""
    return word.partition("(")[2].rstrip(")") or None


class Quantizers:
    """Takes the place of lowprec/dispatch.py: results of the right shape, each noted as one operation."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def path(self, spec: QuantSpec, axis: Axis, dtype: torch.dtype, device: str) -> str:
        return kind_of(spec)

    def operand(
        self,
        x: Tensor,
        spec: QuantSpec,
        axis: Axis,
        key: RandomKey,
        encode_scale: Tensor | None,
        dtype: torch.dtype,
        amax: Tensor | None = None,
    ) -> Operand:
        x = x.contiguous()
        group = max(spec.hadamard, 1)
        shape = [size + (-size % group if place == axis % 2 else 0) for place, size in enumerate(x.shape)]
        values = x.new_empty(shape, dtype=dtype)
        self._trace.note("quantize", [x], [values], spec=spec, axis=axis, packed=_packed(spec, axis, x))
        return Operand(values, _scale_after(spec, axis, x), self._amax(spec, x))

    def save(
        self,
        x: Tensor,
        spec: QuantSpec,
        axis: Axis,
        key: RandomKey,
        encode_scale: Tensor | None,
        amax: Tensor | None = None,
    ) -> QuantizedTensor:
        x = x.contiguous()
        codes_shape, scales_shape, scale_bytes = packed_shapes(spec, axis, x.shape[0], x.shape[1])
        codes = x.new_empty(codes_shape, dtype=torch.uint8 if spec.format.bits <= 8 else torch.int32)
        scales = x.new_empty(scales_shape, dtype=torch.uint8 if scale_bytes == 1 else torch.float32)
        self._trace.note("quantize", [x], [codes, scales], spec=spec, axis=axis, packed=_packed(spec, axis, x))
        return QuantizedTensor(codes, scales, self._amax(spec, x), spec, axis, (x.shape[0], x.shape[1]))

    def amax(self, x: Tensor, spec: QuantSpec, axis: Axis, key: RandomKey) -> Tensor:
        found = x.new_empty((), dtype=torch.float32)
        self._trace.note("reduction", [x], [found])
        return found

    def decode(self, packed: QuantizedTensor, dtype: torch.dtype, made_from: torch.dtype) -> Operand:
        rows, cols = packed.shape
        group = max(packed.spec.hadamard, 1)
        length = rows + -rows % group if packed.axis == 0 else cols + -cols % group
        values = packed.codes.new_empty((packed.codes.shape[0], length), dtype=dtype)
        self._trace.note(
            "decode", [packed.codes, packed.scales], [values], spec=packed.spec, axis=packed.axis, packed=0
        )
        return Operand(values.T if packed.axis == 0 else values, _scale_after(packed.spec, packed.axis, values), None)

    def _amax(self, spec: QuantSpec, x: Tensor) -> Tensor | None:
        return x.new_empty(x.shape[:1] if spec.row_amax else (), dtype=torch.float32) if spec.takes_amax else None


def _packed(spec: QuantSpec, axis: Axis, x: Tensor) -> int:
    codes, scales, scale_bytes = packed_shapes(spec, axis, x.shape[0], x.shape[1])
    return math.prod(codes) + math.prod(scales) * scale_bytes


def _scale_after(spec: QuantSpec, axis: Axis, x: Tensor) -> Tensor | None:
    """Scales of lines, which go over the product; a scalar is part of the GEMM."""
    if spec.block != "row" and not spec.row_amax:
        return None
    return x.new_empty((x.shape[0], 1) if axis == -1 else (1, x.shape[1]), dtype=torch.float32)
