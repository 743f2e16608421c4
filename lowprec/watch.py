"""Where the first number that is not finite comes from: module and GEMM leg, for one repeated step.

    with watching(parts, shared) as watch:      hooks everywhere, for as long as this lasts
        ...                                     forward and backward of all micro-batches
    watch.first                                 the first Finding of this rank, or None

A finding names what made the number, not where it passed: inputs are looked at before outputs, parameters between
them. A linear is watched at its three GEMMs and their operands, before any sum over tensor-parallel ranks, so that of
ranks that share a layer only the one that made it has it at the GEMM. What a part of the model was given by another
pipeline rank is marked `received`. Blocks must run uncompiled: a compiled region runs no hooks.

A layer of a backend that computes several of the model's modules in one (joints.Computes) is watched from outside, as
one: what it makes of finite numbers is named after the layer, forward or backward. Where it multiplies what our
quantizers made, these are looked at, too. Where its GEMM adds a weight gradient to `main_grad` itself, that is what is
looked at: autograd hands over a dummy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.joints import Computes, Passed
from lowprec.linear import LowPrecisionLinear, Shared
from lowprec.philox import StepContext
from lowprec.quantized import Operand
from lowprec.slots import SLOT_AXES


@dataclass(frozen=True, order=True)
class Finding:
    """Ordered as things happened on a rank; ranks that share layers go through the same order.

    order:    checks before it
    module:   logical name
    leg:      fprop, dgrad or wgrad of a linear; else forward or backward
    what:     in words
    row:      global row of the micro-batch's first token; None where that is not known
    received: it came from another pipeline rank
    """

    order: int
    module: str = field(compare=False)
    leg: str = field(compare=False)
    what: str = field(compare=False)
    row: int | None = field(compare=False)
    received: bool = field(default=False, compare=False)


class Watch:
    """Checks tensors in the order in which they are made, until one is not finite."""

    def __init__(self, shared: Shared) -> None:
        self.first: Finding | None = None
        self._shared = shared
        self._checks = 0

    @property
    def row(self) -> int:
        """Global row of the micro-batch whose forward runs."""
        return self._shared.position.row

    def check(self, tensors: Any, module: str, leg: str, what: str, row: int | None, received: bool = False) -> None:
        """Look at the floating-point tensors among `tensors`, unless something has been found already."""
        self._checks += 1
        if self.first is not None:
            return
        for tensor in tensors if isinstance(tensors, (tuple, list)) else (tensors,):
            # Detached: recomputation counts what autograd saves, which must not depend on what has been found.
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.detach().isfinite().all():
                self.first = Finding(self._checks, module, leg, what, row, received)
                return


@contextmanager
def watching(parts: Sequence[Any], shared: Shared) -> Iterator[Watch]:
    """Watch every leaf module of the parts, every gradient of a parameter, and what comes from other stages.

    parts:  the model, or this rank's stages of it (Transformer), with the whole model's names
    shared: of their low-precision linears: says which micro-batch runs
    """
    watch = Watch(shared)
    with ExitStack() as stack:
        for part in parts:
            _watch_borders(watch, part, stack)
            layers = {name: module for name, module in part.named_modules() if isinstance(module, Computes)}
            inside = {id(linear) for layer in layers.values() for linear in layer.parts}
            made = {id(p): name for name, layer in layers.items() if not _is_linear(layer) for p in _makes(layer)}
            for name, module in part.named_modules():
                _watch_parameters(watch, name, module, made, stack)
                if name in layers:
                    for linear in layers[name].parts:
                        stack.enter_context(_watched_gemms(watch, linear, name))
                elif isinstance(module, LowPrecisionLinear) and id(module) not in inside:
                    stack.enter_context(_watched_gemms(watch, module, None))
                if name in layers or id(module) not in inside and not any(True for _ in module.children()):
                    _watch_leaf(watch, name, module, stack)
        yield watch


def _is_linear(module: Any) -> bool:
    if isinstance(module, Computes):
        return len(module.parts) == 1 and not module.norm
    return isinstance(module, (nn.Linear, LowPrecisionLinear))


def _makes(layer: Computes) -> Iterator[nn.Parameter]:
    """Parameters whose gradients a layer's backward makes."""
    for linear in layer.parts:
        yield from linear.parameters(recurse=False)
    yield from layer.norm


def _watch_borders(watch: Watch, part: Any, stack: ExitStack) -> None:
    """What a stage gets from others: activations from the one before, gradients from the one after."""

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not part.first:
            watch.check(inputs[0], "", "forward", "activations of the stage before", watch.row, received=True)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if not part.last and isinstance(output, Tensor) and output.requires_grad:
            row, words = watch.row, "gradient of the stage after"
            output.register_hook(lambda g: watch.check(g, "", "backward", words, row, received=True))

    stack.callback(part.register_forward_pre_hook(before, prepend=True).remove)
    stack.callback(part.register_forward_hook(after).remove)


def _watch_parameters(watch: Watch, name: str, module: nn.Module, made: dict[int, str], stack: ExitStack) -> None:
    """made: id of a parameter -> the layer whose backward makes its gradient together with those of others."""
    for kind, parameter in module.named_parameters(recurse=False):
        if not parameter.requires_grad:
            continue
        where, leg, what = name, "wgrad" if _is_linear(module) else "backward", f"gradient of the {kind}"
        if id(parameter) in made:
            where, leg, what = made[id(parameter)], "backward", f"gradient of {name}.{kind}"

        def check(gradient: Tensor | None, parameter: Any = parameter, at: tuple[str, str, str] = (where, leg, what)):
            held = vars(parameter).get("main_grad")
            watch.check(gradient if held is None else held, *at, None)  # a split backward hands over None at first

        stack.callback(parameter.register_hook(check).remove)  # pyright: ignore[reportArgumentType]


def _watch_leaf(watch: Watch, name: str, module: nn.Module, stack: ExitStack) -> None:
    """Inputs, parameters and outputs in the forward; gradients of outputs, then of inputs in the backward."""
    forth, back = ("fprop", "dgrad") if _is_linear(module) else ("forward", "backward")
    linears: Sequence[Any] = module.parts if isinstance(module, Computes) else ()
    holders = [(linear, linear.name, "fprop") for linear in linears] or [(module, name, forth)]
    around = name.rpartition(".")[0] or "model"  # what lies between two leaves belongs to their parent

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        watch.check(inputs, around, "forward", f"input of {name}", watch.row)

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        row = watch.row
        for holder, path, leg in holders:
            for kind, parameter in holder.named_parameters(recurse=False):
                watch.check(parameter.detach(), path, leg, f"the {kind} itself", row)
        if isinstance(module, Passed):
            return  # it does nothing: whatever comes back through it, the layer after it made
        watch.check(output, name, forth, "output", row)
        if not torch.is_grad_enabled():
            return
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                what = f"gradient of the output of {name}"
                tensor.register_hook(lambda g, what=what: watch.check(g, around, "backward", what, row))
        for tensor in inputs:
            if isinstance(tensor, Tensor) and tensor.requires_grad and not isinstance(tensor, nn.Parameter):
                tensor.register_hook(lambda g: watch.check(g, name, back, "gradient of the input", row))

    stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
    stack.callback(module.register_forward_hook(after, prepend=True).remove)


@contextmanager
def _watched_gemms(watch: Watch, layer: Any, within: str | None) -> Iterator[None]:
    """The GEMMs of one LowPrecisionLinear and what they multiply, by methods of the instance that end with this.

    within: the layer that multiplies for it, and asks for operands alone; None: it does so itself
    """
    multiply, operand = layer.multiply, layer.operand
    changed = ("multiply", "operand", "streams")
    kept = {key: layer.__dict__[key] for key in changed if key in layer.__dict__}
    rows: dict[str, int] = {}  # GEMM -> row of the micro-batch whose operand was made last

    def watched_multiply(gemm: str, a: Operand, b: Operand, bias: Tensor | None = None) -> Tensor:
        row = rows.get(gemm)
        for side, found in (("a", a), ("b", b)):
            watch.check([found.values, found.scale], layer.name, gemm, f"quantized operand {side}", row)
        product = multiply(gemm, a, b, bias)
        watch.check(product, layer.name, gemm, "product of finite operands", row)
        return product

    def watched_operand(slot: str, matrix: Tensor, position: StepContext, **options: Any) -> Operand:
        gemm, _, side = slot.partition(".")
        kind, rows[gemm] = SLOT_AXES[slot][0], position.row
        if kind == "dy":  # of which there may be one operand for both of its GEMMs
            rows["wgrad"] = position.row
        if kind == "w":
            watch.check(matrix, layer.name, gemm, "the weight itself", None)
        elif within is not None:  # without one, the module's hooks have seen it earlier
            leg, what = ("forward", "input") if kind == "x" else ("backward", "gradient of the output")
            watch.check(matrix, within, leg, f"{what} of {layer.name}", position.row)
        made = operand(slot, matrix, position, **options)
        if within is not None:
            watch.check([made.values, made.scale], layer.name, gemm, f"quantized operand {side}", position.row)
        return made

    layer.multiply, layer.operand, layer.streams = watched_multiply, watched_operand, False
    try:
        yield
    finally:
        for key in changed:
            del layer.__dict__[key]
        layer.__dict__.update(kept)
