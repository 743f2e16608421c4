"""Which run is compared with which, and whether it may be.

Runs are paired by seed where every one tells its seed, else in the order given. A pair must have the same initial
weights, data, order and batch; resolved.yaml and manifest.json decide it where both runs have them. For any other log
the curves tell: two runs on the same batches share every batch's own difficulty, so the changes of the loss from step
to step go together (correlation 0.98 to 0.995 between the recipes of this repository, about -0.07 on another order).
Initial weights cannot be seen in a text log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from errors import UsageError
from report.compare.curves import Curve

MIN_STEPS = 30  # logged steps in common: below, no length of a block can be estimated
SAME_ORDER = 0.5  # rank correlation; see above for both sides of it
IGNORED = {"model.dtype", "model.recompute", "data.cache", "data.workers", "data.validation"}
HASHED = {"data.train", "data.tokenizer", "data.documents"}  # what a hash of the tokens says better
NOT_COMPARED = ("name", "description", "run", "metrics", "checkpoint", "watch", "probe")


class NotComparable(UsageError):
    """The runs were read, and differ in what a pair must share, or are too short."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A baseline and its candidate. order: rank correlation of the changes of their losses; notes: for the reader."""

    label: str
    baseline: Curve
    candidate: Curve
    order: float
    differences: tuple[str, ...]
    notes: tuple[str, ...]


def pair(baselines: Sequence[Curve], candidates: Sequence[Curve], same_data: bool = False) -> list[Pair]:
    """Pairs of comparable runs. same_data: the user vouches for data and order that no file tells.

    Raises NotComparable with every reason at once.
    """
    matched = list(_match(baselines, candidates))
    problems = [f"{label}: {problem}" for label, b, c in matched for problem in _problems(b, c, same_data)]
    if problems:
        raise NotComparable("not comparable:\n  " + "\n  ".join(problems))
    return [_pair(label, b, c) for label, b, c in matched]


def _match(baselines: Sequence[Curve], candidates: Sequence[Curve]) -> Iterator[tuple[str, Curve, Curve]]:
    if any(curve.seed is None for curve in (*baselines, *candidates)):
        if len(baselines) != len(candidates):
            raise NotComparable(
                f"{len(baselines)} baselines and {len(candidates)} candidates: not every run tells its seed, so"
                " they are paired in the order given, and the numbers must be equal"
            )
        yield from ((f"pair {i}", b, c) for i, (b, c) in enumerate(zip(baselines, candidates, strict=True), 1))
        return
    left, right = _by_seed(baselines, "baselines"), _by_seed(candidates, "candidates")
    if alone := sorted(left.keys() ^ right.keys()):
        raise NotComparable(
            f"seeds {', '.join(map(str, alone))} have a run on one side only (baselines: {_listed(left)};"
            f" candidates: {_listed(right)}); leave them out, or run the missing ones"
        )
    yield from ((f"seed {seed}", left[seed], right[seed]) for seed in sorted(left))


def _by_seed(curves: Sequence[Curve], side: str) -> dict[int, Curve]:
    found: dict[int, Curve] = {}
    for curve in curves:
        assert curve.seed is not None
        if curve.seed in found:
            raise NotComparable(f"two {side} have seed {curve.seed}: {found[curve.seed].source} and {curve.source}")
        found[curve.seed] = curve
    return found


def _listed(curves: Mapping[int, Curve]) -> str:
    return ", ".join(map(str, sorted(curves)))


def disagreements(baseline: Mapping[str, Any], candidate: Mapping[str, Any], same_tokens: bool = False) -> list[str]:
    """What two resolved recipes must share and do not; same_tokens: their token files are known to be equal.

    A key that one of them lacks was written by another version, and is not compared.
    """
    decisive = {"train.seed", "train.global_batch", "train.seq_len"}
    left, right = flat(baseline), flat(candidate)
    return [
        f"{key} is {left[key]} against {right[key]}"
        for key in left
        if key in right and left[key] != right[key]
        if key in decisive or key.startswith(("model.", "data."))
        if key not in IGNORED and not (same_tokens and key in HASHED)
    ]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} for every leaf of nested maps."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + str(key): value}
    return leaves


def _problems(baseline: Curve, candidate: Curve, same_data: bool) -> Iterator[str]:
    same_tokens = bool(baseline.data) and baseline.data == candidate.data
    yield from disagreements(baseline.recipe, candidate.recipe, same_tokens)
    if baseline.data and candidate.data and not same_tokens:
        yield "other data: the hashes of the training tokens in manifest.json differ"
    if baseline.spacing != candidate.spacing:
        yield f"one line each {baseline.spacing} steps against each {candidate.spacing}; log both alike"
        return
    _, left, right = np.intersect1d(baseline.step, candidate.step, return_indices=True)
    if len(left) < MIN_STEPS:
        yield f"{len(left)} logged steps in common; at least {MIN_STEPS} are needed"
        return
    for unit in ("tokens", "samples"):
        ours, theirs = getattr(baseline, unit)[left], getattr(candidate, unit)[right]
        other = np.isfinite(ours) & np.isfinite(theirs) & (ours != theirs)
        if other.any():
            at = int(np.argmax(other))
            yield f"other batch: {ours[at]:,.0f} against {theirs[at]:,.0f} {unit} at step {baseline.step[left[at]]}"
            return
    order = same_order(baseline, candidate)
    if not same_data and not _known(baseline, candidate) and not order >= SAME_ORDER:
        yield (
            f"the losses do not change together from step to step (rank correlation {order:.2f}, at least {SAME_ORDER}"
            " on the same batches): other data, order or batch; --same-data if you know that it is the same"
        )


def _known(baseline: Curve, candidate: Curve) -> bool:
    """Whether files, not the curves, say that data and order are the same."""
    return bool(baseline.recipe and candidate.recipe)


def same_order(baseline: Curve, candidate: Curve) -> float:
    """Rank correlation of the step-to-step changes of two losses over their common steps; NaN when none is finite."""
    _, left, right = np.intersect1d(baseline.step, candidate.step, return_indices=True)
    changes = np.diff(np.stack([baseline.loss[left], candidate.loss[right]]))
    changes = changes[:, np.isfinite(changes).all(axis=0)]
    ranks = changes.argsort(axis=1).argsort(axis=1)
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if ranks.shape[1] > 2 else float("nan")


def _pair(label: str, baseline: Curve, candidate: Curve) -> Pair:
    order = same_order(baseline, candidate)
    notes = []
    if not order >= SAME_ORDER:
        notes.append(
            f"{label}: the losses do not change together (rank correlation {order:.2f}), whatever the files say"
        )
    if not _known(baseline, candidate):
        notes.append(f"{label}: no resolved.yaml on both sides, so equal initial weights are taken on trust")
    left, right = flat(baseline.recipe), flat(candidate.recipe)
    differences = [
        f"{key}: {left.get(key)} -> {right.get(key)}"
        for key in dict.fromkeys((*left, *right))
        if left.get(key) != right.get(key) and key.partition(".")[0] not in NOT_COMPARED
    ]
    return Pair(
        label=label,
        baseline=baseline,
        candidate=candidate,
        order=order,
        differences=tuple(differences) if left and right else (),
        notes=tuple(notes),
    )
