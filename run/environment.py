"""What a process needs before it can train: a device, threads, an allocator that keeps its memory, a process group."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from errors import UsageError, UserError
from run.meeting import fresh_store


@dataclass(frozen=True)
class Launch:
    """Where this process stands in its launch.

    meets:    ranks meet at the address in the environment (torchrun's, or set by hand); else this process is alone
    torchrun: started by torchrun, which restarts what ends with another code than 0
    threads:  CPU threads that the user asked for (OMP_NUM_THREADS), None if not said
    end_time: when the job's time is over, in seconds since the epoch; None: not known
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    meets: bool = False
    torchrun: bool = False
    threads: int | None = None
    end_time: float | None = None


def choose_device(wanted: str, launch: Launch) -> torch.device:
    """`auto`, `cpu` or `cuda` -> this rank's device. Raises UsageError when it is not there."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if launch.local_rank >= count:
        raise UsageError(
            f"device {wanted}: {launch.local_world_size} processes on this node, {count} CUDA devices found; "
            "start one process a device, or set device=cpu"
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device("cuda", launch.local_rank)


def join(device: torch.device, launch: Launch, timeout_s: int) -> None:
    """Initialise the default process group: gloo on CPU, NCCL on CUDA.

    Raises UsageError if the port is taken, UserError if the others did not come within `timeout_s`.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    if not launch.meets:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    try:
        found, rank, world_size = next(rendezvous("env://", timeout=timeout))
        store = fresh_store(found, rank, world_size, timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        # A taken port is the user's to mend; a rank or a node that did not come may come the next time.
        kind = UsageError if "already in use" in str(error) else UserError
        raise kind(
            f"rank {launch.rank} cannot join the process group: {str(error).splitlines()[0]}; "
            "if the port is taken, choose another (MASTER_PORT, or torchrun --master-port), else check that the nodes "
            "reach each other"
        ) from None


def use_all_cores(device: torch.device, launch: Launch) -> int:
    """Share the CPU's cores among the ranks of this node; return this rank's threads.

    torchrun sets OMP_NUM_THREADS=1 where the user said nothing; any other number is the user's and stays.
    """
    if device.type == "cpu" and launch.torchrun and launch.threads in (None, 1):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_world_size))
    return torch.get_num_threads()


def keep_memory() -> bool:
    """Let glibc keep freed memory instead of returning it to the kernel; true where that was possible.

    By default every large tensor is mmapped, page-faulted on first touch and unmapped again at each use, which costs
    a CPU training step a quarter to a half of its time (bench/step.py measures it).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # malloc.h
    return bool(mallopt(mmap_threshold, 2**31 - 1) and mallopt(trim_threshold, 2**31 - 1) and mallopt(top_pad, 2**26))
