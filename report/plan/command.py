"""`train.py --recipe NAME --plan`: what its options mean, and what it prints.

The numbers go to stdout; that the recipe's layout is refused or does not fit is an error after them, and so is a wrong
option or recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.console import Console

from errors import UsageError, UserError
from recipe import Recipe
from report.flops import faster_gemm
from report.plan import calibrate, table
from report.plan.hardware import find_machine
from report.plan.plan import Planner
from report.plan.report import Report, make_report, to_dict, verdict
from report.plan.units import trace_units, view_of
from run.local import DTYPES

SUGGESTIONS = 5
WIDTH = 132  # of what is not a terminal
CPU = "cpu"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of the command line. nodes: None: as many as parallel.ranks need; json: a file, or "-" for nothing but JSON."""

    gpu: str = "b200"
    nodes: int | None = None
    gpus_per_node: int | None = None
    json: str | None = None

    @classmethod
    def of(cls, given: argparse.Namespace) -> Options:
        """From options that are None where they were not given."""
        asked = {field.name: getattr(given, field.name) for field in fields(cls)}
        return cls(**{name: value for name, value in asked.items() if value is not None})


def run(recipe: Recipe, options: Options) -> None:
    """Plan, print, write. Raises UserError; where the layout is refused or does not fit, after that."""
    world, per_node = _size(recipe, options)
    if options.json not in (None, "-") and not (folder := Path(options.json).parent).is_dir():
        raise UsageError(f"--json {options.json}: there is no directory {folder}; name another file, or -")
    report = make_report(_planner(recipe, options.gpu, world, per_node), recipe, world, SUGGESTIONS)
    _write(report, options.json)
    if (problem := verdict(report)) is not None:
        raise UsageError(problem)


def _size(recipe: Recipe, options: Options) -> tuple[int, int]:
    """(ranks, ranks a node)."""
    for name, value in (("--nodes", options.nodes), ("--gpus-per-node", options.gpus_per_node)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    ranks = recipe.parallel.ranks or 1
    per_node = options.gpus_per_node or (ranks if options.gpu == CPU else 8)
    if options.nodes is None and options.gpus_per_node is None:
        return ranks, min(per_node, ranks)
    if options.nodes is None:
        return max(ranks, per_node), per_node
    return options.nodes * per_node, per_node


def _planner(recipe: Recipe, gpu: str, world: int, per_node: int) -> Planner:
    if gpu != CPU:
        return Planner(recipe, find_machine(gpu), per_node)
    if recipe.section_problems() or recipe.problems(world):
        # Nothing can be traced, and so nothing be measured, of a layout that is none: one that asks for less will do.
        raise UsageError(
            f"--gpu cpu measures what the recipe's own layout runs, which {world} ranks refuse:\n"
            + "\n".join(f"  {problem}" for problem in recipe.section_problems() or recipe.problems(world))
        )
    dtype = faster_gemm(DTYPES[recipe.model.dtype], torch.device("cpu"))
    recompute = recipe.model.recompute
    units = trace_units(recipe, view_of(recipe, dtype), [recompute])[recompute]
    return Planner(recipe, calibrate.measure_together(units, recipe.optimizer, world), per_node, dtype)


def _write(report: Report, target: str | None) -> None:
    text = json.dumps(to_dict(report), indent=1)
    if target == "-":
        print(text)
        return
    table.show(report, Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH))
    if target is not None:
        try:
            Path(target).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write --json {target}: {error.strerror}; name another file, or -") from None
