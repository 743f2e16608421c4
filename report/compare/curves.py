"""Curve: what a run logged, whatever wrote it.

A reader (report/compare/readers.py) gives rows {step: {column: value}} and validations {step: loss}; a later row of the
same step replaces an earlier one, as a resumed run repeats steps. A run directory of this repository also tells its
recipe (resolved.yaml) and the hashes of its data (manifest.json), which decide what may be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from errors import UsageError
from strict_yaml import load_yaml

COLUMNS = ("loss", "grad_norm", "seconds", "tokens", "samples", "skipped", "nan")
Rows = dict[int, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run. Arrays are (n,), one entry a logged step; an unknown value is NaN.

    step: increasing, counted from 1. loss: nats a token, NaN where not finite. grad_norm: before clipping. seconds: of
    one step. tokens, samples: consumed since the start. skipped, nan: steps that this line counts as such.
    validation: {step: nats a token}. recipe: the resolved tree, {} when unknown. data: sha256 of the training tokens.
    """

    source: str
    kind: str
    step: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    seconds: np.ndarray
    tokens: np.ndarray
    samples: np.ndarray
    skipped: np.ndarray
    nan: np.ndarray
    validation: dict[int, float]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[str, ...] = ()

    @property
    def seed(self) -> int | None:
        """train.seed of the recipe, else the number after "seed" in the path, else None."""
        known = self.recipe.get("train", {}).get("seed")
        if isinstance(known, int):
            return known
        named = re.findall(r"seed[-_=]?(\d+)", self.source)
        return int(named[-1]) if named else None

    @property
    def spacing(self) -> int:
        """Steps between two logged lines (the median)."""
        return int(np.median(np.diff(self.step))) if len(self.step) > 1 else 1

    @property
    def seconds_since_start(self) -> np.ndarray:
        """(n,) training time up to each line; each line stands for the steps since the line before."""
        return np.cumsum(self.seconds * np.diff(self.step, prepend=self.step[0] - self.spacing))


def make_curve(path: Path, kind: str, rows: Rows, validation: dict[int, float]) -> Curve:
    """The curve of these rows, with the recipe that lies beside `path`. Raises UsageError when there is no loss."""
    if not any("loss" in row for row in rows.values()):
        raise UsageError(f"{path} ({kind}) holds no training loss")
    steps = sorted(step for step, row in rows.items() if "loss" in row)
    columns = {name: np.array([rows[step].get(name, np.nan) for step in steps], dtype=np.float64) for name in COLUMNS}
    columns["nan"] = np.fmax(np.nan_to_num(columns["nan"]), ~np.isfinite(columns["loss"]))
    columns["skipped"] = np.nan_to_num(columns["skipped"])
    for name in ("loss", "grad_norm"):
        columns[name] = np.where(np.isfinite(columns[name]), columns[name], np.nan)
    folder = path if path.is_dir() else path.parent
    return Curve(
        source=str(path),
        kind=kind,
        step=np.array(steps, dtype=np.int64),
        validation=validation,
        recipe=_recipe(folder / "resolved.yaml"),
        data=_data(folder / "manifest.json"),
        **columns,
    )


def _recipe(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    tree = load_yaml(path.read_text(errors="replace"), str(path))
    sections = ("data", "model", "schedule", "train", "precision")
    if not isinstance(tree, dict) or not all(isinstance(tree.get(name, {}), dict) for name in sections):
        raise UsageError(f"{path} is not a resolved recipe; move it away to compare {path.parent} without one")
    return tree


def _data(path: Path) -> tuple[str, ...]:
    """Hashes of the training tokens of the last start; () when there are none."""
    if not path.is_file():
        return ()
    try:
        entries = json.loads(path.read_text())["starts"][-1]["data"]
        return tuple(sorted(entry["bin_sha256"] for entry in entries if entry["role"] == "train"))
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"{path} is not a manifest ({error!r}); move it away to compare {path.parent} without one"
        ) from None
