"""What hurts most, from the records of a probe (RUN/probe.jsonl), and which GEMMs to keep in BF16.

    leg       a linear's GEMM: the relative error of its product on the held micro-batch
    weight    its gradient over quantization noise, |g| / |Q(g) - g|: g is the micro-batch's in high precision, Q(g) as
              it trains, with the errors of all layers in it

Each is the median over the samples, because stochastic rounding draws anew each time. "FP4 All the Way" (arXiv
2505.19115) finds that training stalls where a gradient falls below sqrt(3) times its quantization noise.

A leg is proposed for BF16 where its signal over noise is below sqrt(3), or its error is above `NOTICEABLE` and
`OUTLIER` times the median of the same GEMM over all layers; the worst first, no more than `budget` of all quantized
legs. Where weights fall below sqrt(3) although no leg does, the noise is everybody's: a finer format, fewer FP4 GEMMs
or a larger batch help, a list does not. The rule is ours; the NVFP4 paper (arXiv 2509.25149) keeps 15 to 20 % of its
linears.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowprec.policy import GEMMS

THRESHOLD = math.sqrt(3.0)
NOTICEABLE, OUTLIER = 0.1, 2.0
BUDGET = 0.15


@dataclass(frozen=True)
class Leg:
    """error: relative, of the product; typical: the median of that GEMM over all layers."""

    layer: str
    gemm: str
    error: float
    typical: float

    @property
    def why(self) -> str | None:
        """Why it should be kept in BF16; None if nothing speaks for it."""
        if self.error > 1.0 / THRESHOLD:
            return f"error {self.error:.1%}, signal below sqrt(3) times the noise"
        if self.error > max(NOTICEABLE, OUTLIER * self.typical):
            return f"error {self.error:.1%}, {self.error / self.typical:.1f} times the median of {self.gemm}"
        return None


@dataclass(frozen=True)
class Weight:
    """A weight's gradient: its norm over that of its quantization noise, and its cosine to the high-precision one."""

    name: str
    ratio: float
    cosine: float

    @property
    def drowned(self) -> bool:
        return self.ratio < THRESHOLD


def legs(records: Iterable[Mapping[str, Any]]) -> list[Leg]:
    """All quantized GEMMs, the worst first."""
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        if record["kind"] == "gemm":
            errors[record["layer"], record["gemm"]].append(_number(record["relative_error"]))
    middle = {key: statistics.median(values) for key, values in errors.items()}
    typical = {gemm: statistics.median([e for (_, g), e in middle.items() if g == gemm] or [0.0]) for gemm in GEMMS}
    found = [Leg(layer, gemm, error, typical[gemm]) for (layer, gemm), error in middle.items()]
    return sorted(found, key=lambda leg: -leg.error)


def weights(records: Iterable[Mapping[str, Any]]) -> list[Weight]:
    """All parameters whose gradients were compared, the noisiest first."""
    ratios: dict[str, list[float]] = defaultdict(list)
    cosines: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record["kind"] == "gradient":
            ratios[record["parameter"]].append(_number(record["gradient_to_noise"]))
            cosines[record["parameter"]].append(_number(record["cosine"]))
    found = [Weight(name, statistics.median(ratios[name]), statistics.median(cosines[name])) for name in ratios]
    return sorted(found, key=lambda weight: weight.ratio)


def proposal(ranked: Sequence[Leg], budget: float = BUDGET) -> list[Leg]:
    """The legs to keep in BF16, the worst first: those for which something speaks, within the budget."""
    return [leg for leg in ranked if leg.why is not None][: math.ceil(budget * len(ranked))]


def as_yaml(chosen: Sequence[Leg]) -> str:
    """The proposal as a section of a recipe; empty where there is none."""
    by_layer: dict[str, list[Leg]] = defaultdict(list)
    for leg in chosen:
        by_layer[leg.layer].append(leg)
    lines = ["precision:", "  keep:"] if chosen else []
    for layer, members in by_layer.items():
        gemms = [gemm for gemm in GEMMS if any(leg.gemm == gemm for leg in members)]
        some = "" if len(gemms) == len(GEMMS) else f", gemms: [{', '.join(gemms)}]"
        lines.append(f"    - {{match: {layer}{some}}}  # {'; '.join(f'{leg.gemm}: {leg.why}' for leg in members)}")
    return "\n".join([*lines, ""]) if lines else ""


def shown(value: float | None, form: str) -> str:
    """A figure in words; one that JSON has no number for is null there."""
    return "not finite" if value is None else format(value, form)


def _number(value: float | None) -> float:
    """JSON has no infinity: no noise at all is written as null."""
    return math.inf if value is None else value
