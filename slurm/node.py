"""What Slurm starts on each node of a job: the node's checks, or the run's torchrun agent. Called by train.sbatch.

    python -P -m slurm.node RUN --host n1 --address 10.0.0.1 --port 20417 --nodes 2 --per-node 8 --restarts 3 [--check]

The agents meet over torchrun's c10d rendezvous at the first node, which is told that it is the host: its name need not
be its own idea of an address. Signals that ask a run to stop are blocked here and so, by inheritance, in the agent and
in the workers until these take them (run/signals.py): the agent is not killed by a signal that is meant for the run,
and one that comes while a worker still imports is not lost.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from errors import UserError
from run.signals import STOP_SIGNALS

CODE = Path(__file__).resolve().parent.parent
# What a cluster's environment, or the user's, says stays.
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # tensor parallelism: kernels start in the order in which they were issued
    "HF_HUB_OFFLINE": "1",  # compute nodes may have no way out; nothing here needs one
    "NCCL_DEBUG": "WARN",
    "NCCL_IB_TIMEOUT": "22",  # 4 us x 2^22: a link that comes back within seconds is no error
    "PYTHONFAULTHANDLER": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # less fragmentation over weeks
    "TORCH_FR_BUFFER_SIZE": "2000",  # the last collectives of each rank, which a timeout writes down
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "WANDB_MODE": "offline",
}


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of the agent: `given`, then what it does not say."""
    return ENVIRONMENT | dict(given)


def agent(options: argparse.Namespace, given: Mapping[str, str]) -> list[str]:
    """The command line of this node's torchrun agent."""
    is_host = int(given.get("SLURMD_NODENAME") == options.host)
    attempt = f"{given['SLURM_JOB_ID']}.{given.get('SLURM_RESTART_COUNT', 0)}.{given['SLURM_STEP_ID']}"
    words = [sys.executable, "-P", "-m", "torch.distributed.run"]
    words += [f"--nnodes={options.nodes}", f"--nproc-per-node={options.per_node}", "--rdzv-backend=c10d"]
    words += [f"--rdzv-endpoint={options.address}:{options.port}", f"--rdzv-conf=is_host={is_host}"]
    words += [f"--rdzv-id={attempt}", f"--max-restarts={0 if options.check else options.restarts}"]
    if options.check:
        return [*words, str(CODE / "slurm" / "ping.py"), str(options.run)]
    return [*words, str(CODE / "train.py"), "--recipe", str(options.run / "resolved.yaml")]


def check(run_dir: Path, processes: int) -> int:
    """0 if this node is fit; else it has been reported."""
    from slurm import health  # reads recipes, which takes seconds that an agent need not wait

    node = os.environ.get("SLURMD_NODENAME", "this node")
    try:
        found = health.problems(run_dir, processes, node)
    except UserError as error:
        print(f"{node}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if found:
        health.report(run_dir, node, found)
    return int(bool(found))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m slurm.node", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the run directory, with resolved.yaml")
    parser.add_argument("--host", required=True, help="name of the node at which the agents meet")
    parser.add_argument("--address", required=True, help="of that node")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--nodes", required=True, type=int)
    parser.add_argument("--per-node", required=True, type=int, help="processes")
    parser.add_argument("--restarts", required=True, type=int, help="of all workers after a crash")
    parser.add_argument("--check", action="store_true", help="this node, then that all processes reach each other")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Check this node, or become its agent; returns the exit code of a check that failed."""
    options = parse(argv)
    if options.check and (code := check(options.run, options.per_node)):
        return code
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    sys.stdout.flush()
    words = agent(options, os.environ)
    os.execve(words[0], words, environment(os.environ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
