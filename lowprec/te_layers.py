"""Transformer Engine's layers in the place of the model's: same parameters, same names, our policies.

    the model's                       Transformer Engine's      where
    norm, then a linear               LayerNormLinear           lowprec/joints.py names the pair; the linear is swapped
    norm, up, activation, down        LayerNormMLP              the same, if both linears have the same slots all along
    a linear                          Linear                    the others that are swapped
    the core of an attention          DotProductAttention       BF16, causal; a mask of documents stays torch's SDPA

Every linear of the policy is a `Part`: our own linear, which is never called but says what its operands are, takes new
slots and keeps the receipt. The layer around it (`Joined`) makes a recipe of the slots of its parts.

Under tensor parallelism Transformer Engine communicates itself (parallel/tensor.py leaves such modules alone). It
gathers along the first dimension, so with sequence parallelism rows are [S, B] inside: stochastic rounding and blocks
along tokens meet the tokens in another order than in our linear, if a micro-batch has several samples.

What is known of Transformer Engine 2.20.2 and is walked around here:
- quantizers are made anew for another *class* of recipe, or another CustomRecipe object, not for the same class with
  other switches: `fp8_meta_tensors_initialized` is cleared for every new recipe;
- `is_first_microbatch=True` makes the first forward overwrite `main_grad` in its backward, whichever comes first:
  weight copies are dropped by us instead, and every micro-batch is "not the first";
- an `_extra_state` (a pickle of the recipe) enters `state_dict()`: not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from lowprec import dispatch
from lowprec.apply import put
from lowprec.joints import Computes, Core, Joint, NormLinear, NormMLP, Passed
from lowprec.linear import LowPrecisionLinear, Shared
from lowprec.philox import StepContext
from lowprec.policy import Slots
from lowprec.slots import SLOT_AXES, Place
from lowprec.te import Part, recipe_of

WGRADS = {"wgrad_gemm": 0, "fc1_wgrad_gemm": 0, "fc2_wgrad_gemm": 1}  # name of its closures -> which part
OPERANDS = {"x": ("scaling_fwd", 0), "w": ("scaling_fwd", 1), "dy": ("scaling_bwd", 0)}  # where its quantizers are
STRIDES = {"scaling_fwd": 3, "scaling_bwd": 2}  # quantizers for each GEMM


class Queue:
    """Takes the place of a layer's WeightGradStore: weight gradients go where a split backward wants them."""

    def __init__(self, layer: Joined) -> None:
        self.layer = layer

    def delay_wgrad_compute(self) -> bool:
        return self.layer.shared.deferred is not None

    def put(self, tensors: list[Any], multiply: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        """Called in a backward: the GEMM is to run later, in the order of the queue."""
        layer, queue = self.layer, self.layer.shared.deferred
        assert queue is not None
        part, biases = layer.parts[WGRADS[multiply.__name__]], []

        def weight_gradient() -> Tensor:
            gradient, bias_gradient = multiply(*tensors)
            layer.note("wgrad", part)
            biases.append(bias_gradient)
            return gradient

        def bias_gradient() -> Tensor:
            if not biases or biases[0] is None:
                raise RuntimeError(f"{part.name}: the GEMM of the weight gradient gave none of the bias")
            return biases.pop()

        weight: Any = part.weight
        queue.append((weight, weight_gradient))
        # Quantized gradients are summed up on their way to a quantizer, others in the GEMM.
        if part.bias is not None and not layer.fp8 and not layer.adds_bias_later(part):
            queue.append((part.bias, bias_gradient))


class Joined(Computes):
    """What is ours of every layer: a mix-in before Transformer Engine's class."""

    communicates = True  # under tensor parallelism, without hooks around it
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    shared: Shared
    linears: dict[str, Part]  # by the name that their `QuantizerRole`s have
    recipe: Any  # of their slots; None: to be made
    fp8: bool
    sequence_parallel: bool
    fuse_wgrad_accumulation: bool
    gemm_bias_unfused_add: bool
    fp8_meta: dict[str, Any]
    fp8_meta_tensors_initialized: bool
    quantizers: dict[str, Any]
    _fp8_workspaces: dict[str, Any]

    def _take(self, shared: Shared, linears: dict[str, Part]) -> None:
        self.shared, self.linears, self.recipe, self.wgrad_store = shared, linears, None, Queue(self)
        for part in linears.values():
            vars(part)["owner"] = self  # which is not a child of its part

    def renew(self) -> None:
        """Slots have changed: another recipe and other quantizers from the next forward on."""
        self.recipe = None
        for part in self.parts:
            part.quantized.clear()
        self.forget_copies()

    def forget_copies(self) -> None:
        self._fp8_workspaces.clear()

    def adds_bias_later(self, part: Part) -> bool:
        """Whether the bias of a part is added after the layer's GEMM, by an operation that autograd sees."""
        return self.gemm_bias_unfused_add and part is self.parts[-1]

    @torch.compiler.disable  # as our own linear: the rest of a block is compiled around it
    def forward(self, x: Tensor) -> Tensor:
        """[B, S, in_features] -> [B, S, out_features]."""
        training, position, shared = torch.is_grad_enabled(), self.shared.position, self.shared
        if self.recipe is None:
            self.recipe, self.fp8_meta_tensors_initialized = recipe_of(self.linears), False
            self.fp8_meta.pop("recipe", None)  # else it warns that this may affect the model's behaviour
        for part in self.parts:
            part.position, part.training_now = position, training
        rows = x.transpose(0, 1).contiguous() if self.sequence_parallel else x
        quantized = any(part.slots.quantized for part in self.parts)
        copies = False if training and shared.keep_weights else None  # None: made for this forward alone
        with self._unseen(training), te.autocast(enabled=quantized, recipe=self.recipe):
            y = super().forward(rows, is_first_microbatch=copies)  # pyright: ignore[reportAttributeAccessIssue]
        if quantized and not self.fp8:
            raise RuntimeError(f"{', '.join(self.linears)} ran without FP8, although its recipe quantizes")
        for part in self.parts:
            self.note("fprop", part)
        if y.requires_grad:
            y.register_hook(partial(self._begin_backward, position))
            node = _node(y)
            node.register_hook(partial(self._end_backward, self._edges(node)))
        return y.transpose(0, 1) if self.sequence_parallel else y

    @contextmanager
    def _unseen(self, training: bool) -> Iterator[None]:
        """What is seen outside training enters no amax history."""
        states = [] if training else [state for part in self.parts for state in part.delayed.values()]
        kept = [state.history[0].clone() for state in states]
        yield
        for state, amax in zip(states, kept, strict=True):
            state.history[0] = amax

    def _begin_backward(self, position: StepContext, _: Tensor) -> None:
        for part in self.parts:
            part.position = position

    def _edges(self, node: Any) -> dict[int, int]:
        """Which gradients of the layer's node are those of which part's weight; of biases: -1."""
        known = {id(part.weight): index for index, part in enumerate(self.parts)}
        known |= {id(part.bias): -1 for part in self.parts if part.bias is not None}
        leaves = [getattr(edge, "variable", None) for edge, _ in node.next_functions]
        return {place: known[id(leaf)] for place, leaf in enumerate(leaves) if leaf is not None and id(leaf) in known}

    def _end_backward(self, edges: dict[int, int], gradients: Sequence[Tensor | None], _: Any) -> None:
        """The layer's backward has run, and gave these gradients: only what is among them was multiplied."""
        inputs = any(gradient is not None for place, gradient in enumerate(gradients) if place not in edges)
        for index, part in enumerate(self.parts):
            if inputs or index:  # the gradient that the first part's weight needs is the second one's dgrad
                self.note("dgrad", part)
        for place, index in edges.items():
            taken = self.fuse_wgrad_accumulation and self.shared.deferred is None  # main_grad has it
            if index >= 0 and (gradients[place] is not None or taken):
                self.note("wgrad", self.parts[index])

    def note(self, gemm: str, part: Part) -> None:
        """One GEMM of a part that has run, for the receipt, with what quantized its operands."""
        words = [self._quantized_by(part, f"{gemm}.{side}") for side in ("a", "b")]
        self.shared.counts[gemm, words[0], words[1], "transformer_engine"] += 1
        part.ran.add(gemm)

    def _quantized_by(self, part: Part, slot: str) -> str:
        spec, (kind, axis) = part.specs[slot], SLOT_AXES[slot]
        if spec is None:
            return "high"
        mode, offset = OPERANDS[kind]
        quantizer = self.quantizers[mode][STRIDES[mode] * self.parts.index(part) + offset]
        if not isinstance(quantizer, te.HybridQuantizer):
            return f"{spec.element} ({type(quantizer).__name__})"
        if slot not in part.quantized:
            raise RuntimeError(f"{part.name}: {slot} was multiplied, but never went through its quantizer")
        return f"{spec.element} ({dispatch.path(spec, axis, part.weight.dtype, part.weight.device.type)})"


def _node(y: Tensor) -> Any:
    """The node of Transformer Engine's own function in the graph of what its layer gave, before a bias is added."""
    node: Any = y.grad_fn
    while not isinstance(node, torch.autograd.function.BackwardCFunction):
        node = node.next_functions[0][0]
    return node


def _options(part: Part, place: Place | None, sp: bool) -> dict[str, Any]:
    """Constructor arguments that all layers share; features are those of the linear before it was split."""
    found = {"bias": part.bias is not None, "params_dtype": part.weight.dtype, "device": "meta"}
    found["fuse_wgrad_accumulation"] = part.shared.wgrad_dtype == torch.float32
    return found if place is None else found | {"tp_group": place.group, "sequence_parallel": sp}


def _mode(place: Place | None) -> tuple[str | None, int, int]:
    """Parallel mode, and by how much out and in features are divided."""
    if place is None:
        return None, 1, 1
    ranks = dist.get_world_size(place.group)
    return ("column", ranks, 1) if "dy" in place.split else ("row", 1, ranks)


class TeLinear(Joined, te.Linear):
    """te.Linear with the parameters of `part`."""

    def __init__(self, part: Part, sp: bool) -> None:
        mode, outs, ins = _mode(part.place)
        te.Linear.__init__(
            self, part.in_features * ins, part.out_features * outs, name=part.name, parallel_mode=mode,
            **_options(part, part.place, sp),
        )  # fmt: skip
        self.weight, self.bias = part.weight, part.bias
        self._take(part.shared, {part.name: part})


class TeNormLinear(Joined, te.LayerNormLinear):
    """te.LayerNormLinear with the parameters of `part`, and those of `norm`, which stay the norm's own."""

    def __init__(self, part: Part, norm: Any, sp: bool) -> None:
        mode, outs, ins = _mode(part.place)
        te.LayerNormLinear.__init__(
            self, part.in_features * ins, part.out_features * outs, name=part.name, parallel_mode=mode, eps=norm.eps,
            normalization=_normalization(norm), **_options(part, part.place, sp),
        )  # fmt: skip
        self.weight, self.bias = part.weight, part.bias
        _borrow(self, **_norm_parameters(norm))
        self.norm = tuple(norm.parameters())
        self._take(part.shared, {part.name: part})


class TeNormMLP(Joined, te.LayerNormMLP):
    """te.LayerNormMLP with the parameters of its children, `up` and `down` by their names, and those of `norm`."""

    def __init__(self, joint: NormMLP, up: Part, down: Part, norm: Any, sp: bool) -> None:
        _, ranks, _ = _mode(up.place)
        te.LayerNormMLP.__init__(
            self, up.in_features, down.in_features * ranks, name=joint.mlp, activation=joint.activation, eps=norm.eps,
            normalization=_normalization(norm), set_parallel_mode=ranks > 1, **_options(up, up.place, sp),
        )  # fmt: skip
        _borrow(self, fc1_weight=up.weight, fc2_weight=down.weight, **_norm_parameters(norm))
        if up.bias is not None:
            _borrow(self, fc1_bias=up.bias, fc2_bias=down.bias)
        self.norm = tuple(norm.parameters())
        self.add_module(joint.up, up)
        self.add_module(joint.down, down)
        self._take(up.shared, {f"{joint.mlp}.fc1": up, f"{joint.mlp}.fc2": down})


def _normalization(norm: nn.Module) -> str:
    return type(norm).__name__  # nn.RMSNorm and nn.LayerNorm; Transformer Engine has the same names


def _norm_parameters(norm: Any) -> dict[str, Tensor]:
    if isinstance(norm, nn.RMSNorm):
        return {"layer_norm_weight": norm.weight}
    bias = torch.zeros_like(norm.weight, requires_grad=False) if norm.bias is None else norm.bias
    return {"layer_norm_weight": norm.weight, "layer_norm_bias": bias}


def _borrow(module: nn.Module, **parameters: Tensor) -> None:
    """Let a module use parameters that another one holds: they have one name."""
    for name, parameter in parameters.items():
        module._parameters.pop(name, None)
        vars(module)[name] = parameter


class TeCore(nn.Module):
    """te.DotProductAttention where the mask is causal; `plain`: what computes any other."""

    def __init__(self, joint: Core, plain: Callable[..., Tensor]) -> None:
        super().__init__()
        self.causal = te.DotProductAttention(
            joint.heads, joint.size, num_gqa_groups=joint.groups, qkv_format="bshd", name=f"{joint.module}.core"
        )
        self.plain = plain

    @torch.compiler.disable
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """As lowprec.joints.Core says."""
        if mask is not None:
            return self.plain(q, k, v, mask, dtype)
        y = self.causal(*(x.transpose(1, 2) for x in (q, k, v)))
        return y.unflatten(-1, q.shape[1:4:2]).transpose(1, 2)


@dataclass(frozen=True)
class TeSwap:
    """Puts Transformer Engine's layers into a model. sp: sequence parallelism."""

    joints: Sequence[Joint]
    sp: bool = False

    def __call__(
        self,
        model: nn.Module,
        names: Sequence[str],
        tables: Sequence[Mapping[str, Slots]],
        shared: Shared,
        places: Mapping[str, Place],
    ) -> dict[str, LowPrecisionLinear]:
        """Linears `names` of `model` -> their parts. tables: slots of each phase, the first one now."""
        found: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        parts = {name: Part(found[name], name, tables[0][name], shared, places.get(name)) for name in names}
        alone = dict(parts)
        for joint in self.joints:
            self._join(model, joint, parts, alone, tables)
        for name, part in alone.items():
            put(model, name, TeLinear(part, self.sp))
        return dict(parts)

    def _join(
        self,
        model: nn.Module,
        joint: Joint,
        parts: Mapping[str, Part],
        alone: dict[str, Part],
        tables: Sequence[Mapping[str, Slots]],
    ) -> None:
        if isinstance(joint, Core):
            if _has(model, joint.module):
                attention: Any = model.get_submodule(joint.module)
                attention.core = TeCore(joint, attention.core)
            return
        if isinstance(joint, NormMLP):
            up, down = joint.linears
            if up not in parts or down not in parts or any(table[up] != table[down] for table in tables):
                joint = NormLinear(joint.norm, up)
        first = joint.linear if isinstance(joint, NormLinear) else up
        if first not in parts:
            return
        norm = model.get_submodule(joint.norm)
        if isinstance(joint, NormLinear):
            put(model, first, TeNormLinear(alone.pop(first), norm, self.sp))
        else:
            put(model, joint.mlp, TeNormMLP(joint, alone.pop(up), alone.pop(down), norm, self.sp))
        put(model, joint.norm, Passed(norm))


def _has(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())
