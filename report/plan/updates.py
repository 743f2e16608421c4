"""What the optimizer's step costs for one element: its seconds and its temporary bytes.

On a CPU one fused kernel does it, whose rate is measured. On a GPU a fused kernel reads and writes each tensor once,
and reads them once more where scales of whole tensors need their maxima first. What no kernel takes
(lowprec/kernels/adamw.py says what) runs in plain torch, which is traced as the model is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowprec.adamw import Hyper
from lowprec.codecs import UNIT, Extent
from lowprec.kernels.adamw import Job
from lowprec.optim import OptimizerConfig
from lowprec.philox import RandomKey
from report.plan.costs import Pricing
from report.plan.engine import Costs
from report.plan.hardware import Machine
from report.plan.steps import Updating
from report.plan.trace import Phase, Trace
from report.plan.traffic import Link

ELEMENTS = 1 << 24
SAMPLE = 1 << 16  # of a tensor that has memory
NORM = 8.0  # torch sums the norm in FP64 over a copy of the gradient in FP64, on either device


def updating(machine: Machine, config: OptimizerConfig) -> Updating:
    """Of the optimizer's storage on a machine."""
    if machine.cores:
        rate = machine.rate("update", ELEMENTS)
        assert rate is not None
        return Updating(1.0 / rate, Costs(norm=NORM, update=0.0))
    if (moved := fused_bytes(config)) is not None:
        return Updating(moved / (machine.bandwidth * machine.attained_memory), Costs(norm=NORM, update=0.0))
    phase = traced_update(config)
    seconds = Pricing(machine, False, Link(1, 1, machine)).phase(phase) / ELEMENTS
    return Updating(seconds, Costs(norm=NORM, update=phase.peak / ELEMENTS))


def fused_bytes(config: OptimizerConfig) -> float | None:
    """Bytes that a GPU's kernels move for one element, writing the BF16 weight included; None where there is none."""
    extent, grad, tensors, hyper = _fragment(config, SAMPLE)
    codecs = config.storage.codecs(extent.shape)
    if Job(codecs, config.storage.update, extent, tensors, grad, hyper.numbers).unsuited() is not None:
        return None
    held = sum(tensor.nbytes for tensor in tensors.values())
    first = any(part.per == 0 for codec in codecs.values() for part in codec.parts(extent.shape).values())
    working = 0 if config.master == "none" else tensors["weight"].nbytes + 2 * SAMPLE
    return ((1 + first) * (grad.nbytes + held) + held + working) / SAMPLE


def traced_update(config: OptimizerConfig) -> Phase:
    """The plain update of one fragment of ELEMENTS."""
    _plain(config, *_fragment(config, SAMPLE))  # makes the codebooks, which are numbers
    trace = Trace()
    with FakeTensorMode(allow_non_fake_inputs=True):
        extent, grad, tensors, hyper = _fragment(config, ELEMENTS)
        trace.known([grad, *tensors.values()])
        with trace, trace.phase() as found:
            _plain(config, extent, grad, tensors, hyper)
    return found[0]


def _plain(config: OptimizerConfig, extent: Extent, grad: Tensor, tensors: dict[str, Tensor], hyper: Hyper) -> None:
    """A step as lowprec/updater.py makes it where no kernel does."""
    update = config.storage
    if (sums := update.sums(extent, grad, hyper)) is not None:
        update.advance(extent, tensors, sums, hyper)
    statistics = update.statistics_plain(extent, tensors, grad, hyper)
    update.apply_plain(extent, tensors, grad, hyper, statistics, RandomKey(seed=0), update.measured)
    if config.master != "none":
        update.write_working(tensors, torch.empty(extent.count, dtype=torch.bfloat16))


def _fragment(config: OptimizerConfig, elements: int) -> tuple[Extent, Tensor, dict[str, Tensor], Hyper]:
    """A matrix: its FP32 gradient, its master and states, the numbers of a step."""
    extent = Extent((elements // UNIT, UNIT), 0, elements)
    dtype = {"fp32": torch.float32, "fp16_scaled": torch.float16}.get(config.master, torch.bfloat16)
    master = torch.ones(elements, dtype=dtype)
    tensors = {"weight": master} | config.storage.allocate(extent, master)
    hyper = Hyper(lr=1e-4, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, step=1)
    return extent, torch.ones(elements), tensors, hyper
