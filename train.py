"""Train a recipe: recipe -> data -> model -> ZeRO engine -> resume -> step, step, save.

    python train.py --recipe quickstart                       one process
    torchrun --nproc-per-node 2 train.py --recipe quickstart  data-parallel
    python train.py --recipe quickstart train.steps=50 run.dir=runs/try
    python train.py --recipe fp8lm_175b --dry-run             what one rank of its cluster would hold; no GPU, no data
    python train.py --recipe nvfp4_12b --plan --gpu b200      bytes, traffic, time, layouts that fit; no GPU, no data

Exit codes: 0 done, 2 usage, 3 data, 4 checkpoint, 5 does not get on, 75 preempted and saved (start the same command
again), 124 hung, 130 interrupted. Under torchrun, which would take 75 for a failure and restart, a preempted worker
ends with 0 and RUN/exit.json holds the code (docs/slurm.md).
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import re
import socket
import sys
import time
import warnings
from pathlib import Path

import recipe as recipes
from report.metrics import StepRecord
from report.plan import command as plans
from run import exits
from run.build import build
from run.dry_run import dry_run
from run.environment import Launch
from run.recovery import recover
from run.signals import INTERRUPTED, REQUEUE, stop_with_parent
from run.state import Run


def train_step(run: Run) -> StepRecord:
    """One optimizer step over the global batch: accumulate, reduce, clip, update."""
    began = time.perf_counter()
    lr = run.lr()
    run.begin_step()
    loss = run.agree(run.forward_backward())
    update = run.engine.step(lr, run.guard.judge(loss))
    return run.finish_step(loss, lr, update, began)


def train(run: Run) -> int:
    """From where the run stands to its last step, or to a request to stop. Returns the exit code."""
    total, config = run.recipe.train.steps, run.recipe
    while run.step < total:
        run.records.step(train_step(run))
        if recover(run):
            continue
        run.probe()
        if config.eval.due(run.step, total):
            run.validate()
        stopping = run.stop_reason()
        if stopping or config.checkpoint.due(run.step, total):
            run.save()
        if stopping:
            run.records.message(f"{stopping}: stopped after step {run.step}; the same command continues")
            return REQUEUE
    if config.eval.bigram:
        run.compare_with_bigram()
    run.records.message(f"done: {run.step} steps, {run.samples * config.train.seq_len:,} tokens")
    return 0


def main(argv: list[str]) -> int:
    """Run one command line; returns the exit code."""
    launch = read_launch()
    if launch.torchrun:
        stop_with_parent()
    # DeepSpeed calls collectives by names that torch now deprecates; nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    run_dir: Path | None = None
    code, reason = 0, "done"
    try:
        options, overrides = parse(argv)
        if options.list:
            return print_recipes()
        if options.dry_run:
            print(dry_run(recipes.resolve(options.recipe, tuple(overrides)), options.world_size, options.rank))
            return 0
        if options.plan:
            plans.run(recipes.resolve(options.recipe, tuple(overrides)), plans.Options.of(options))
            return 0
        recipe = recipes.load(options.recipe, tuple(overrides), launch.world_size)
        run_dir = Path(recipe.run.dir)
        if (settled := exits.settled(run_dir, launch.attempt)) is not None:
            return settled
        if launch.rank == 0:
            exits.clear(run_dir)
        run = build(
            recipe,
            launch,
            options.resume,
            allow_precision_change=options.allow_precision_change,
            wandb_mode=os.environ.get("WANDB_MODE", "offline"),
        )
        with run:
            code = train(run)
            reason = run.stop_reason() or reason
    except KeyboardInterrupt:
        code, reason = INTERRUPTED, "interrupted"
        print("interrupted; the newest checkpoint is as it was", file=sys.stderr, flush=True)
    except Exception as error:
        code, reason, known = exits.explain(error)
        if not known:
            exits.record(run_dir, code, reason, launch.rank, launch.attempt)
            raise
        # Errors of the recipe are the same on every rank; later ones may be one rank's own.
        prefix = f"rank {launch.rank}: " if launch.rank else ""
        if not launch.rank or run_dir is not None:
            print(f"{prefix}error: {reason}", file=sys.stderr, flush=True)
    if launch.rank == 0 or code not in (0, REQUEUE):
        exits.record(run_dir, code, reason, launch.rank, launch.attempt)
    return 0 if code == REQUEUE and launch.torchrun else code


def read_launch() -> Launch:
    """How this process was started, from what torchrun (or nobody) put into the environment."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also in a single process
    return Launch(
        rank=int(os.environ.get("RANK", 0)),
        local_rank=int(os.environ["LOCAL_RANK"]),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        meets="MASTER_ADDR" in os.environ,
        torchrun="TORCHELASTIC_RUN_ID" in os.environ,
        threads=int(os.environ["OMP_NUM_THREADS"]) if "OMP_NUM_THREADS" in os.environ else None,
        end_time=float(os.environ["SLURM_JOB_END_TIME"]) if "SLURM_JOB_END_TIME" in os.environ else None,
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        attempt=os.environ.get("LOWPREC_ATTEMPT"),
    )


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options and overrides of a command line. Raises UsageError through `recipes.override` for anything else."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train a recipe.", epilog="section.key=value overrides any key of the recipe."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="a name in recipes/ or the path of a YAML file")
    what.add_argument("--list", action="store_true", help="show the recipes")
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="auto: the run's newest checkpoint, if any"
    )
    parser.add_argument(
        "--allow-precision-change",
        action="store_true",
        help="resume under another precision policy than the checkpoint's",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what a rank would hold, and every violation")
    parser.add_argument("--world-size", type=int, metavar="N", help="of a dry run; by default parallel.ranks")
    parser.add_argument("--rank", type=int, metavar="R", help="of a dry run; by default 0")
    parser.add_argument("--plan", action="store_true", help="bytes, FLOPs, traffic and time, and layouts that fit")
    plan = parser.add_argument_group("of a plan")
    plan.add_argument("--gpu", help="b200, h200, h100, a100, ..., cpu (measured), or a YAML file (b200)")
    plan.add_argument("--nodes", type=int, metavar="N", help="by default as many as parallel.ranks needs")
    plan.add_argument("--gpus-per-node", type=int, metavar="N", help="8; of a CPU: parallel.ranks")
    plan.add_argument("--json", metavar="FILE|-", help="also write the plan as JSON; -: print nothing else")
    own = {"--recipe", "--resume", "--rank", "--gpu", "--nodes", "--json"}
    overrides = [word for word in argv if re.match(r"(--)?[a-z_]\w*(\.\w+)*=", word) and word.split("=")[0] not in own]
    options = parser.parse_args([word for word in argv if word not in overrides])
    if not options.dry_run and (options.world_size, options.rank) != (None, None):
        parser.error("--world-size and --rank are for --dry-run; torchrun says them to a run")
    if not options.plan and (options.gpu, options.nodes, options.gpus_per_node, options.json) != (None,) * 4:
        parser.error("--gpu, --nodes, --gpus-per-node and --json are for --plan")
    if options.plan and (options.list or options.dry_run or options.resume != "auto" or options.allow_precision_change):
        parser.error("--plan trains nothing; drop --list, --dry-run, --resume and --allow-precision-change")
    if options.dry_run and (options.list or options.resume != "auto" or options.allow_precision_change):
        parser.error("--dry-run resumes nothing and lists nothing; drop --list, --resume and --allow-precision-change")
    return options, overrides


def print_recipes() -> int:
    for name, description in recipes.names():
        print(f"{name:<20} {description}")
    return 0


if __name__ == "__main__":
    faulthandler.enable()  # a crash in native code, or a mapped file whose disk is gone, says where
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written and closed. A normal exit would tear down libraries whose threads still run, which has
    # aborted a finished run ("terminate called without an active exception", once in about a hundred two-rank runs).
    os._exit(status)
