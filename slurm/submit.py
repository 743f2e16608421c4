"""Submit a run to Slurm: `python -m slurm.submit --recipe R --nodes N [options of sbatch] [section.key=value]`.

    python -m slurm.submit --recipe nvfp4_12b --nodes 46 --gpu b200 --partition=gpu --time=24:00:00 run.dir=/scratch/r1
    python -m slurm.submit --recipe bf16_125m --nodes 1 --seeds 0,1,2 --time=8:00:00     a job array
    python -m slurm.submit --recipe nvfp4_12b --nodes 46 --min-nodes 23 --chain 5        fewer nodes will do; 5 jobs

First the recipe is resolved and one rank of it is built without memory, as by `train.py --dry-run`: what does not
divide is refused here, not after hours in the queue; and with --gpu, what does not fit into its memory, as by
`train.py --plan`. Then the code and resolved.yaml are copied into the run directory
and train.sbatch is submitted with it. The job's working directory is this one, so relative paths mean the same.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import recipe as recipes
from errors import UsageError, UserError
from recipe import Recipe
from report.plan.hardware import Machine, find_machine
from report.plan.plan import Planner
from report.plan.report import misfit
from run import exits
from run.dry_run import dry_run
from run.records import write_resolved
from slurm.health import UNHEALTHY, UNMET
from slurm.jobs import job_states, read_jobs, remember_job, submit_job
from slurm.snapshot import take_snapshot

OVERRIDE = re.compile(r"(--)?[a-z_]\w*(\.\w+)*=", re.ASCII)
SBATCH_OPTION = re.compile(r"--[a-z][a-z-]*(=.*)?", re.ASCII | re.DOTALL)
OURS = {  # options of sbatch that train.sbatch relies on
    "--array": "--seeds makes the array",
    "--chdir": "the job runs in the directory where it is submitted",
    "--error": "the log is RUN/slurm-JOB.log",
    "--no-requeue": "the job is requeued until the run is done",
    "--ntasks": "--per-node says how many processes a node has",
    "--ntasks-per-node": "--per-node says how many processes a node has",
    "--open-mode": "the log is appended to",
    "--output": "the log is RUN/slurm-JOB.log",
    "--signal": "run.stop_before_s says when the run stops",
    "--wrap": "the script is slurm/train.sbatch",
}
GPUS = 8  # a node, where --per-node does not say
UNSAFE = set("%,:\n\\\"'")  # Slurm's patterns, separators of mounts


@dataclass(frozen=True)
class Plan:
    """What is to be submitted. runs: seed (None: the recipe's) and recipe of each; sizes: node counts it can use."""

    root: Path
    runs: tuple[tuple[int | None, Recipe], ...]
    nodes: int
    per_node: int
    sizes: tuple[int, ...]

    @property
    def recipe(self) -> Recipe:
        return self.runs[0][1]


def refuse_what_does_not_fit(plan: Plan) -> str:
    """What one rank would hold; raises UsageError with everything that does not divide or fit, on any of its sizes."""
    report = dry_run(plan.recipe, plan.nodes * plan.per_node)
    for nodes in plan.sizes[1:]:
        try:
            dry_run(plan.recipe, nodes * plan.per_node)
        except UsageError as error:
            raise UsageError(f"on {nodes} nodes, which --min-nodes allows: {error}") from None
    return report


def machine_of(options: argparse.Namespace, recipe: Recipe) -> Machine | None:
    """The GPU that --gpu names; None without it. Raises UsageError."""
    if options.gpu is None:
        return None
    if recipe.device == "cpu":
        raise UsageError(f"--gpu is {options.gpu}, but device is cpu in recipe {recipe.name}; drop one of them")
    return find_machine(options.gpu)


def leave_what_fits(plan: Plan, machine: Machine) -> tuple[Plan, str]:
    """(the plan with the numbers of nodes on which the layout fits, a line about it).

    Raises UsageError if it does not fit on all of them.
    """
    recipe, planner = plan.recipe, Planner(plan.recipe, machine, plan.per_node)
    planned = {nodes: planner.in_bytes(recipe, nodes * plan.per_node) for nodes in plan.sizes}
    if (why := misfit(planned[plan.nodes])) is not None:
        raise UsageError(
            f"{recipe.name} on {plan.nodes} x {plan.per_node} {machine.name} {why}; `python train.py --recipe ... "
            f"--plan --gpu {machine.name} --nodes {plan.nodes} --gpus-per-node {plan.per_node}` shows layouts that do"
        )
    timed = planner.timed(planned[plan.nodes])
    line = (
        f"planned on {timed.layout.world} {machine.name}: {timed.fullest.peak / 2**30:,.1f} of "
        f"{timed.limit / 2**30:,.1f} GiB on the fullest rank, {timed.tokens_per_second:,.0f} tokens/s (a roofline)"
    )
    return replace(plan, sizes=tuple(nodes for nodes, each in planned.items() if each.fits)), line


def make_plan(options: argparse.Namespace, overrides: Sequence[str]) -> Plan:
    """Resolve the recipe and its layouts. Raises UsageError for whatever a job would fail of."""
    recipe = recipes.resolve(options.recipe, tuple(overrides))
    root = Path(recipe.run.dir).resolve()
    if bad := UNSAFE & set(str(root)):
        raise UsageError(f"run.dir {root} holds {sorted(bad)}, which Slurm would read as its own; choose another name")
    per_node = options.per_node or (1 if recipe.device == "cpu" else GPUS)
    least = options.min_nodes or options.nodes
    if not 1 <= least <= options.nodes:
        raise UsageError(f"--min-nodes is {least}; it must be between 1 and --nodes ({options.nodes})")
    seeds = [None] if options.seeds is None else _seeds(options.seeds)
    placed = [(seed, _placed(recipe, root, seed)) for seed in seeds]
    sizes = [n for n in range(options.nodes, least - 1, -1) if n == options.nodes or not recipe.problems(n * per_node)]
    if least < options.nodes and sizes == [options.nodes]:
        below = next((n for n in range(least - 1, 0, -1) if not recipe.problems(n * per_node)), None)
        raise UsageError(
            f"--min-nodes is {least}, but the run can use no number of nodes from {least} to {options.nodes - 1} with "
            f"{per_node} processes each; " + (f"use --min-nodes={below}" if below else "drop --min-nodes")
        )
    return Plan(root, tuple(placed), options.nodes, per_node, tuple(sizes))


def _seeds(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() for word in words) or len(set(map(int, words))) < len(words):
        raise UsageError(f"--seeds is {text!r}; write different whole numbers, as in 0,1,2")
    return [int(word) for word in words]


def _placed(recipe: Recipe, root: Path, seed: int | None) -> Recipe:
    """The recipe with an absolute run directory, and perhaps another seed in a directory of its own."""
    folder = root if seed is None else root / f"seed-{seed}"
    train = recipe.train if seed is None else replace(recipe.train, seed=seed)
    return replace(recipe, train=train, run=replace(recipe.run, dir=str(folder)))


def check_time(options: Sequence[str], before_s: int) -> None:
    """Refuse a --time in which a run would stop before it has begun."""
    for word in options:
        name, _, value = word.partition("=")
        if name == "--time" and (seconds := seconds_of(value)) is not None and seconds < 2 * before_s:
            raise UsageError(
                f"--time={value} is {seconds} s, and the run stops run.stop_before_s={before_s} s before its end; "
                "ask for more time, or stop later"
            )


def seconds_of(text: str) -> int | None:
    """Slurm's M, M:S, H:M:S, D-H, D-H:M or D-H:M:S in seconds; None for what is none of them (Slurm will say so)."""
    if not (match := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)):
        return None
    days, *rest = match.groups()
    first, *parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = first, *parts, *[0] * (2 - len(parts))
    elif len(parts) == 2:
        hours, minutes, seconds = first, *parts
    else:
        hours, minutes, seconds = 0, first, *parts, *[0] * (1 - len(parts))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def commands(plan: Plan, options: argparse.Namespace, sbatch_options: Sequence[str], code: Path) -> Iterator[list[str]]:
    """The sbatch call of each job of the chain; jobs after the first still lack their dependency."""
    recipe, seeds = plan.recipe, [seed for seed, _ in plan.runs if seed is not None]
    words = ["sbatch", "--parsable", f"--job-name={recipe.name}"]
    least = min(plan.sizes)
    words.append(f"--nodes={least}-{plan.nodes}" if least < plan.nodes else f"--nodes={plan.nodes}")
    if recipe.device != "cpu":
        words.append(f"--gpus-per-node={plan.per_node}")
    log = f"{plan.root}/slurm-{'%A_%a' if seeds else '%j'}.log"
    words += [f"--signal=USR1@{recipe.run.stop_before_s}", f"--output={log}"]
    if seeds:
        words.append(f"--array={','.join(map(str, seeds))}")
    words += [*sbatch_options, str(code / "slurm" / "train.sbatch"), str(plan.root), str(code), options.python]
    words += [str(plan.per_node), " ".join(map(str, plan.sizes)), str(options.restarts), str(int(options.check))]
    for link in range(options.chain):
        then = "next" if link < options.chain - 1 else "requeue"
        yield [*words, then, *_container(plan, options)]


def _container(plan: Plan, options: argparse.Namespace) -> list[str]:
    """Options of srun for pyxis: the run and the working directory are mounted where they are."""
    if options.container_image is None:
        return []
    here = str(Path.cwd())
    mounts = [f"{folder}:{folder}" for folder in dict.fromkeys([str(plan.root), here])]
    mounts += [options.container_mounts] if options.container_mounts else []
    return [
        f"--container-image={options.container_image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={here}",
    ]


def after(words: Sequence[str], number: str) -> list[str]:
    """The sbatch call, to start when job `number` has ended, however it did."""
    return [words[0], f"--dependency=afterany:{number}", *words[1:]]


def submit(plan: Plan, options: argparse.Namespace, sbatch_options: Sequence[str]) -> list[str]:
    """Write the run directories and submit the jobs; returns their numbers. Raises UserError."""
    busy = job_states([job["id"] for job in read_jobs(plan.root)])
    if busy:
        raise UsageError(
            f"{plan.root} belongs to {', '.join(f'job {number} ({state})' for number, state in busy.items())}; "
            "scancel it, or choose another run.dir"
        )
    code = take_snapshot(plan.root / "code")
    for _, recipe in plan.runs:
        folder = Path(recipe.run.dir)
        write_resolved(folder, recipe)
        exits.clear(folder)
        for name in (UNHEALTHY, UNMET):
            exits.forget(folder / name)
    numbers: list[str] = []
    for words in commands(plan, options, sbatch_options, code):
        command = after(words, numbers[-1]) if numbers else words
        try:
            numbers.append(submit_job(command))
        except UserError as error:
            before = f" (already submitted of the chain: {', '.join(numbers)})" if numbers else ""
            raise UserError(f"{error}{before}") from None
        remember_job(plan.root, numbers[-1], command)
    return numbers


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Our options, options of sbatch, overrides of the recipe. Raises UsageError for what is none of these."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.submit",
        description="Submit a run to Slurm.",
        epilog="--name=value and --flag that are not listed go to sbatch; section.key=value overrides the recipe.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--recipe", required=True, help="a name in recipes/ or the path of a YAML file")
    add("--nodes", required=True, type=_positive, metavar="N")
    add("--min-nodes", type=_positive, metavar="N", help="start with fewer, if N are to be had and the layout divides")
    add("--per-node", type=_positive, metavar="P", help=f"processes, one a GPU (default {GPUS}; 1 on CPUs)")
    add("--gpu", metavar="KIND", help="plan the layout's memory on it first: b200, h100, ..., or a YAML file")
    add("--seeds", metavar="0,1,2", help="a job array, one run each in RUN/seed-N")
    add("--chain", type=_positive, default=1, metavar="N", help="jobs that follow each other until the run is done")
    add("--restarts", type=int, default=3, metavar="N", help="by torchrun after a crash, within a job (%(default)s)")
    add("--no-check", dest="check", action="store_false", help="do not look at the nodes before the start")
    add("--python", default=sys.executable, metavar="PATH", help="on the nodes (default: this one)")
    add("--container-image", metavar="IMAGE", help="start the nodes' part in it (needs the plugin pyxis)")
    add("--container-mounts", metavar="SRC:DST,...", help="besides the run and the working directory")
    add("--dry-run", action="store_true", help="show the run and the commands; write and submit nothing")
    options, others = parser.parse_known_args(argv)
    sbatch_options, overrides = [], []
    for word in others:
        name = word.partition("=")[0]
        if name in OURS:
            raise UsageError(f"{name}: {OURS[name]}")
        if OVERRIDE.match(word) and (not word.startswith("--") or "." in name):
            overrides.append(word)
        elif SBATCH_OPTION.fullmatch(word):
            sbatch_options.append(word)
        else:
            raise UsageError(
                f"{word!r} is no option of ours; write options of sbatch --name=value, overrides section.key=value"
            )
    if options.chain > 1 and any(word.partition("=")[0] == "--dependency" for word in sbatch_options):
        raise UsageError(
            "--dependency with --chain: each job of a chain waits for the one before it, and would not any more; drop "
            "one of the two"
        )
    if options.container_mounts and not options.container_image:
        raise UsageError("--container-mounts needs --container-image")
    return options, sbatch_options, overrides


def _choice(sizes: Sequence[int]) -> str:
    return " or ".join(map(str, sizes))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    try:
        options, sbatch_options, overrides = parse(argv)
        plan = make_plan(options, overrides)
        check_time(sbatch_options, plan.recipe.run.stop_before_s)
        machine = machine_of(options, plan.recipe)
        report = refuse_what_does_not_fit(plan)
        if machine is not None:
            plan, planned = leave_what_fits(plan, machine)
            report += f"\n{planned}"
        elif plan.recipe.device != "cpu":
            report += "\nwhether it fits into a GPU's memory was not planned: --gpu KIND does"
        if options.dry_run:
            print(report)
            print(f"nodes that it can use: {_choice(plan.sizes)}, with {plan.per_node} processes each")
            for _, each in plan.runs:
                print(f"run directory {each.run.dir}")
            for link, words in enumerate(commands(plan, options, sbatch_options, plan.root / "code" / "HASH")):
                print(shlex.join(after(words, "JOB") if link else words))
            return 0
        for number in submit(plan, options, sbatch_options):
            print(f"job {number}: {plan.root}" + (f", on {_choice(plan.sizes)} nodes" if plan.sizes[1:] else ""))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
