"""`train.py --recipe NAME --plan`: what its options mean, and what it prints.

Exit code 0 where the recipe's layout fits; 1 where it is refused or does not fit (suggestions are printed all the
same); 2 for a wrong option or recipe.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from errors import UsageError, UserError
from recipe import Recipe
from report.flops import faster_gemm
from report.plan import calibrate, table
from report.plan.hardware import Machine, find_machine
from report.plan.plan import Planner
from report.plan.report import Report, make_report, to_dict
from report.plan.units import trace_units, view_of
from run.local import DTYPES

SUGGESTIONS = 5
DOES_NOT_FIT = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of the command line. nodes: None: as many as parallel.ranks need; json: a file, or "-" for nothing but JSON."""

    gpu: str = "b200"
    nodes: int | None = None
    gpus_per_node: int | None = None
    json: str | None = None


def run(recipe: Recipe, options: Options, console: Console) -> int:
    """Plan, print, write. Raises UserError."""
    world, per_node = _size(recipe, options)
    planner = _planner(recipe, options.gpu, world, per_node)
    report = make_report(planner, recipe, world, SUGGESTIONS)
    _write(report, options.json, console)
    return 0 if report.plan is not None and report.plan.fits else DOES_NOT_FIT


def _size(recipe: Recipe, options: Options) -> tuple[int, int]:
    """(ranks, ranks a node)."""
    for name, value in (("--nodes", options.nodes), ("--gpus-per-node", options.gpus_per_node)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    ranks = recipe.parallel.ranks or 1
    per_node = options.gpus_per_node or (ranks if options.gpu == "cpu" else 8)
    if options.nodes is None and options.gpus_per_node is None:
        return ranks, min(per_node, ranks)
    if options.nodes is None:
        return max(ranks, per_node), per_node
    return options.nodes * per_node, per_node


def _planner(recipe: Recipe, gpu: str, world: int, per_node: int) -> Planner:
    if gpu != "cpu":
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
    machine: Machine = calibrate.measure_together(units, recipe.optimizer, world)
    return Planner(recipe, machine, per_node, dtype)


def _write(report: Report, target: str | None, console: Console) -> None:
    text = json.dumps(to_dict(report), indent=1)
    if target == "-":
        print(text)
        return
    table.show(report, console)
    if target is not None:
        try:
            Path(target).write_text(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write --json {target}: {error.strerror}; name another file, or -") from None
