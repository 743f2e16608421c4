"""Do all processes of the job reach each other, and do their clocks agree? Started under torchrun by slurm/node.py.

Every process joins the group as the run will (NCCL on GPUs, else gloo); then sums of known numbers are taken over it.
Clocks: after a barrier all read the time within milliseconds of each other, so the readings differ by what the clocks
do. A run itself does not need them equal; logs, caches that go by modification times, and whoever reads both, do.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from errors import UserError
from run.environment import Launch, choose_device, join
from strict_yaml import load_yaml

TIMEOUT_S = 120
ELEMENTS = 1 << 24  # FP32: 64 MiB
REPEATS = 3
SKEW_S = 5.0


def ping(wanted: str, launch: Launch) -> str:
    """A line for the log, about processes on the recipe's device. Raises UserError if they cannot meet or add up."""
    device = choose_device(wanted, launch)
    join(device, launch, TIMEOUT_S)
    elements = ELEMENTS if device.type == "cuda" else ELEMENTS >> 6
    ranks, seconds = dist.get_world_size(), []
    for _ in range(REPEATS):
        data = torch.full((elements,), float(launch.rank + 1), device=device)
        began = time.perf_counter()
        dist.all_reduce(data)
        low, high = (float(value) for value in torch.aminmax(data))  # waits for the device
        seconds.append(time.perf_counter() - began)
        if (low, high) != (ranks * (ranks + 1) / 2,) * 2:
            raise UserError(f"rank {launch.rank}: a sum of 1 to {ranks} over all ranks is {low} to {high}")
    dist.barrier()
    mine = torch.tensor([time.time()], dtype=torch.float64, device=device)
    clocks = torch.empty(ranks, dtype=torch.float64, device=device)
    dist.all_gather_single(clocks, mine)
    skew = float(clocks.max() - clocks.min())
    rate = elements * 4 / min(seconds) / 1e9
    line = f"{ranks} ranks reach each other ({rate:.2f} GB/s in sums); clocks differ by {skew:.3f} s"
    if skew > SKEW_S:
        node = int((clocks - clocks.median()).abs().argmax()) // launch.local_world_size
        line += f", MORE THAN {SKEW_S:.0f} s: set the clock of node {node} of the job"
    dist.barrier()
    dist.destroy_process_group()
    return line


def main(run_dir: Path) -> int:
    launch = Launch(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        meets=True,
    )
    resolved = run_dir / "resolved.yaml"
    try:
        line = ping(load_yaml(resolved.read_text(), str(resolved))["device"], launch)
    except UserError as error:
        print(f"rank {launch.rank}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if launch.rank == 0:
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
