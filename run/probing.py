"""The numerics probe of a run: when it samples, on what, and where the samples go.

A sample is two forwards and backwards of one held micro-batch beside training, with the weights as they are: first in
high precision, then as the policy quantizes, observed (lowprec/probe). The micro-batch is the first of the validation
data, or of the training data if there is none: the same one in every sample, so that what changes is the model. No
accumulator, history or counter of the run sees anything of it.

All data-parallel ranks do the same; those that share layers add up what their shards show; pipeline stages are put
together on rank 0, which writes RUN/probe.jsonl, one JSON object a line:

    {"kind": "sample", "step": 100, "loss_low", "loss_high", "cosine", "gradient_to_noise", "policy", "seconds"}
    {"kind": "operand", "step", "layer", "slot": "dgrad.a", "format", "amax", "underflow", ...}    statistics.py
    {"kind": "gemm", "step", "layer", "gemm": "wgrad", "relative_error"}
    {"kind": "gradient", "step", "parameter", "norm", "cosine", "gradient_to_noise", "relative_error"}
    {"kind": "te", "step", "name", "value"}                                                       te_debug.py
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from data.stream import Batch
from errors import UsageError
from lowprec.policy import words_of
from lowprec.probe.damage import THRESHOLD, legs, shown, weights
from lowprec.probe.lab import Lab, Sample, Wanted
from lowprec.probe.statistics import root_ratio
from lowprec.probe.te_debug import Bound, bind, parse
from lowprec.slots import SLOT_AXES, specs_of
from parallel.tensor import exact_inputs
from recipe import load_policy
from run.local import uncompiled

if TYPE_CHECKING:
    from run.state import Run

Records = list[dict[str, Any]]


class Prober:
    """Made once a run, by all ranks. Raises UsageError for requests that reach nothing."""

    def __init__(self, run: Run) -> None:
        config, precision = run.recipe.probe, run.precision
        self.config, self.gradients = config, config.gradients
        table = None
        if config.policy is not None:
            blocks, ends = run.recipe.model.num_layers, run.recipe.precision
            policy = load_policy(config.policy).with_bf16_blocks(ends.bf16_first, ends.bf16_last)
            table = policy.resolve(list(precision.now), blocks)
        self.lab = Lab(run.local.parts, precision, precision.places, config.layers, table)
        self.bounds: list[Bound] = []
        self.wanted = Wanted()
        if config.te_debug is not None:
            names = list(precision.now)  # of the whole model: a section may be about another pipeline stage
            self.bounds, self.wanted = bind(_requests(config.te_debug), names, self.lab.tables)
        if config.interval and not any(slots.quantized for slots in self.lab.table.values()):
            raise UsageError(
                f"probe.interval is {config.interval}, but policy {run.recipe.precision.policy} quantizes nothing; set "
                "probe.policy to look at what another one would do, or probe.interval=0"
            )
        if dead := [glob for glob in config.layers if not fnmatch.filter(precision.now, glob)]:
            raise UsageError(
                f"probe.layers {dead} match no linear; they are called {', '.join(list(precision.now)[:4])}, ..."
            )
        self._here = {name for part in run.local.parts for name, _ in part.named_modules()}
        self._batch = _held(run)

    def due(self, step: int) -> bool:
        """Whether to sample after `step`."""
        every = self.config.interval
        return every > 0 and step % every == 0 or any(bound.when.due(step) for bound in self.bounds)

    def sample(self, run: Run) -> None:
        """Sample and write. Collective over all ranks."""
        began, step = time.perf_counter(), run.step
        whole = self.config.interval > 0 and step % self.config.interval == 0
        bounds = [bound for bound in self.bounds if bound.when.due(step)]
        with uncompiled(run.local.parts):
            high = None
            if whole and self.gradients:
                with self.lab.high(), exact_inputs(run.local.parts):
                    high = _gradients(run, self._batch)
                high = high[0], {name: gradient.to("cpu") for name, gradient in high[1].items()}
            with self.lab.low(step, self.wanted if bounds else None) as seen:
                low = _gradients(run, self._batch)
        if run.mesh.tp > 1:
            _add_up(seen, run)
        records: Records = []
        if whole:
            records += [r for r in _operands(seen, self.lab.table) + _gemms(seen) if r["layer"] in self.lab.chosen]
        mine = [bound for bound in bounds if bound.layer in self._here]
        records += [{"kind": "te", "name": bound.name, "value": bound.read(seen)} for bound in mine]
        compared = {} if high is None else _compared(run, high[1], low[1])
        records += [{"kind": "gradient", "parameter": name, **_ratios(sums)} for name, sums in compared.items()]
        everyone: list[Any] = [(records, list(compared.values()), _number(low[0]), _number(high and high[0]))]
        if run.mesh.pp > 1:
            everyone *= run.mesh.pp
            dist.all_gather_object(everyone, everyone[0], group=run.mesh.pp_group)
        if run.mesh.rank == 0:
            summary = _summary(everyone, run, self.config.policy, time.perf_counter() - began) if whole else None
            merged = [record for found, *_ in everyone for record in found]
            lines = [*([summary] if summary else []), *merged]
            run.records.probe(step, run.samples, lines, _scalars(merged), _say(merged, summary))


def _requests(path: str) -> Any:
    try:
        text = Path(path).read_text(encoding="utf-8")
        return parse(yaml.safe_load(text), path)  # Transformer Engine's files write booleans as YAML 1.1 does
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read probe.te_debug {path}: {error}") from None


def _held(run: Run) -> Batch:
    """The micro-batch that every sample looks at, the same on all ranks."""
    stream, size = run.data.validation or run.data.train, run.recipe.train.micro_batch
    indices = range(size) if stream.num_samples is None or stream.num_samples >= size else [0] * size
    return stream.batch(indices).to(run.device)


def _gradients(run: Run, batch: Batch) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Cross-entropy (on ranks that have it) and gradients of this rank's parameters, outside the engine."""
    if run.local.pipeline is not None:
        loss, found = run.local.pipeline.gradients(batch)
        _add_tied(run, found)
        return loss, found
    (part,) = run.local.parts
    loss = part(batch.tokens, batch.labels, batch.positions, batch.document_ids)
    names, parameters = zip(*part.named_parameters(), strict=True)
    return loss.cross_entropy.detach(), dict(zip(names, torch.autograd.grad(loss.loss, parameters), strict=True))


def _add_tied(run: Run, gradients: dict[str, Tensor]) -> None:
    """The gradient of an embedding of which another pipeline rank holds a copy: the sum, on the one before the last."""
    tied = run.local.tied
    if tied is None or TIED not in gradients:
        return
    dist.all_reduce(gradients[TIED], group=tied)
    if run.mesh.pp_rank:
        del gradients[TIED]


TIED = "embedding.weight"
KINDS = {"activation": "x", "weight": "w", "gradient": "dy", "output": "dy", "dgrad": "x", "wgrad": "w"}


def _add_up(seen: Sample, run: Run) -> None:
    """Sums and maxima over the ranks that share the layers: one collective each."""
    group, places = run.mesh.tp_group, run.precision.places
    kinds = [(layer, SLOT_AXES[slot][0]) for layer, slot, *_ in (*seen.operands, *seen.others)]
    kinds += [(layer, KINDS[tensor]) for layer, tensor in seen.tensors]
    whole = [*seen.operands.values(), *seen.others.values(), *seen.tensors.values()]
    for (layer, kind), each in zip(kinds, whole, strict=True):
        if layer not in places or kind not in places[layer].split:  # every rank has all of it
            each.sums.div_(run.mesh.tp)
    sums = [each.sums for each in whole] + list(seen.products.values())
    maxima = [each.maxima for each in whole] + [each.view(1) for each in seen.ranges.values()]
    for tensors, how in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
        if tensors:
            flat = torch.cat(tensors)
            dist.all_reduce(flat, op=how, group=group)
            for into, found in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                into.copy_(found)


def _compared(run: Run, high: Mapping[str, Tensor], low: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Parameter -> squares of the high-precision gradient, the other one, their difference; product. Collective."""
    found, mesh = {}, run.mesh
    for name, exact in high.items():
        exact = exact.to(low[name].device).flatten().float()
        rounded = low[name].flatten().float()
        squares = [torch.linalg.vector_norm(t).double().square() for t in (exact, rounded, rounded - exact)]
        found[name] = torch.stack([*squares, torch.dot(exact, rounded).double()])
        if mesh.tp > 1 and not run.engine.updater.shards[name].split:
            found[name] /= mesh.tp  # all of them add the same
    sums = torch.stack(list(found.values()))
    if mesh.tp > 1:
        dist.all_reduce(sums, group=mesh.tp_group)
    return dict(zip(found, sums.tolist(), strict=True))


def _ratios(sums: list[float]) -> dict[str, float | None]:
    exact, rounded, error, product = sums
    relative = root_ratio(error, exact)
    length = math.sqrt(exact * rounded)
    return {
        "norm": math.sqrt(exact),
        "cosine": product / length if length else None,
        "relative_error": relative,
        # None: no noise. A gradient that is not finite has no signal.
        "gradient_to_noise": 0.0 if math.isnan(relative) else 1.0 / relative if relative else None,
    }


def _operands(seen: Sample, table: Mapping[str, Any]) -> Records:
    return [
        {
            "kind": "operand",
            "layer": layer,
            "slot": slot,
            "tensor": SLOT_AXES[slot][0],
            "format": words_of(specs_of(table[layer])[slot]),
            **sums.record(),
        }
        for (layer, slot), sums in seen.operands.items()
    ]


def _gemms(seen: Sample) -> Records:
    return [
        {"kind": "gemm", "layer": layer, "gemm": gemm, "relative_error": root_ratio(*reversed(sums.tolist()))}
        for (layer, gemm), sums in seen.products.items()
    ]


def _number(loss: Tensor | None) -> float | None:
    return None if loss is None else float(loss)


def _summary(everyone: list[Any], run: Run, policy: str | None, seconds: float) -> dict[str, Any]:
    """The gradient of the whole model, and the losses, which one pipeline stage has."""
    sums = [each for _, compared, *_ in everyone for each in compared]
    ratios = _ratios([math.fsum(column) for column in zip(*sums, strict=True)]) if sums else {}
    low, high = (next((each[place] for each in everyone if each[place] is not None), None) for place in (2, 3))
    policy = policy or run.recipe.precision.policy
    return {"kind": "sample", "loss_low": low, "loss_high": high, **ratios, "policy": policy, "seconds": seconds}


def _scalars(records: Records) -> dict[str, float]:
    """For TensorBoard and W&B."""

    def pairs() -> Iterator[tuple[str, float | None]]:
        for record in records:
            if record["kind"] == "operand":
                for key in ("underflow", "overflow", "snr_db", "amax"):
                    yield f"probe {key}/{record['layer']} {record['slot']}", record[key]
            elif record["kind"] == "gemm":
                yield f"probe gemm error/{record['layer']} {record['gemm']}", record["relative_error"]
            elif record["kind"] == "gradient":
                for key in ("cosine", "gradient_to_noise"):
                    yield f"probe {key}/{record['parameter']}", record[key]
            else:
                yield record["name"], record["value"]

    return {name: value for name, value in pairs() if value is not None}


def _say(records: Records, summary: dict[str, Any] | None) -> str | None:
    if summary is None:
        return None
    worst, compared = legs(records)[:1], weights(records)
    text = "".join(f"worst GEMM {leg.layer} {leg.gemm}, error {leg.error:.1%}" for leg in worst)
    if compared:
        drowned = sum(weight.drowned for weight in compared)
        cosine, noise = summary["cosine"], summary["gradient_to_noise"]
        text += f"; gradient cosine {shown(cosine, '.4f')}, over noise {'inf' if noise is None else f'{noise:.1f}'}"
        text += f", below sqrt(3) = {THRESHOLD:.2f} in {drowned} of {len(compared)} parameters"
    return f"probe ({summary['seconds']:.1f} s): {text}"
