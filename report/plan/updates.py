"""What the optimizer's step costs for one element: its seconds and its temporary bytes.

On a CPU one fused kernel does it, whose rate is measured. On a GPU lowprec/adamw.py runs in plain torch: it is traced
as the model is.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowprec.adamw import Hyper
from lowprec.codecs import UNIT, Extent
from lowprec.optim import OptimizerConfig
from lowprec.philox import RandomKey
from report.plan.costs import Pricing
from report.plan.engine import Costs
from report.plan.hardware import Machine
from report.plan.steps import Updating
from report.plan.trace import Phase, Trace
from report.plan.traffic import Link

ELEMENTS = 1 << 24


def updating(machine: Machine, config: OptimizerConfig) -> Updating:
    """Of the optimizer's storage on a machine."""
    if machine.cores:
        rate = machine.rate("update", ELEMENTS)
        assert rate is not None
        return Updating(1.0 / rate, Costs(norm=8.0, update=0.0))
    phase = traced_update(config)
    seconds = Pricing(machine, False, Link(1, 1, machine)).phase(phase) / ELEMENTS
    return Updating(seconds, Costs(norm=0.0, update=phase.peak / ELEMENTS))


def traced_update(config: OptimizerConfig) -> Phase:
    """The plain update of one fragment of ELEMENTS."""
    update, trace = config.storage, Trace()
    with FakeTensorMode(allow_non_fake_inputs=True):
        extent = Extent((ELEMENTS // UNIT, UNIT), 0, ELEMENTS)
        dtype = {"fp32": torch.float32, "fp16_scaled": torch.float16}.get(config.master, torch.bfloat16)
        master, working = torch.empty(ELEMENTS, dtype=dtype), torch.empty(ELEMENTS, dtype=torch.bfloat16)
        grad = torch.empty(ELEMENTS)
        tensors = {"weight": master} | update.allocate(extent, master)
        trace.known([master, working, grad, *tensors.values()])
        hyper = Hyper(lr=1e-4, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, step=1)
        with trace, trace.phase() as (found):
            if (sums := update.sums(extent, grad, hyper)) is not None:
                update.advance(extent, tensors, sums, hyper)
            statistics = update.statistics_plain(extent, tensors, grad, hyper)
            update.apply_plain(extent, tensors, grad, hyper, statistics, RandomKey(seed=0), update.measured)
            if config.master != "none":
                update.write_working(tensors, working)
    return found[0]
