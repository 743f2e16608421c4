"""Saving and loading a checkpoint: the stall of a step, the steps beside a save, and the speed against a raw file.

One process trains a model of about 30 M parameters. In turns: steps alone, then a save behind training and the steps
that run while it writes, then a save that training waits for. All times are medians.

    step_ms                      a step alone
    behind_stall_ms              what the save behind training takes from the step that starts it
    behind_slowdown_ms           by how much all steps beside one save are slower, together
    behind_cost                  (stall + slowdown) / step
    behind_lasts_ms              from its start until it is complete
    waiting_stall_ms             a save that training waits for
    write_mb_per_s, read_mb_per_s    of the checkpoint; hashing, syncing and verifying included
    torch_*, raw_*               torch.save and torch.load of the same tensors; one write and fsync, one read

    python -m bench.checkpoint [--rounds N] [section.key=value ...] [--json FILE|-]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import train
from bench.common import Figures, parser, report
from parallel.checkpoint import load, newest
from parallel.saver import CheckpointConfig, Saver
from recipe import load as load_recipe
from run.build import build
from run.state import Run

BATCH = ("train.global_batch=4", "train.micro_batch=4", "train.seq_len=512", "checkpoint.interval=0", "eval.interval=0")


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def step(run: Run) -> float:
    return seconds(lambda: train.train_step(run))


def save(run: Run, saver: Saver) -> float:
    """Seconds until training can go on."""
    run.saver = saver
    return seconds(run.save)


def measure(run: Run, folder: Path, rounds: int) -> Figures:
    behind = Saver(folder / "behind", CheckpointConfig(behind=True, keep=1), lambda _: None)
    waiting = Saver(folder / "waiting", CheckpointConfig(keep=1), lambda _: None)
    for _ in range(3):
        step(run)
    alone, stalls, slower, lasts, waits = [], [], [], [], []
    for _ in range(rounds):
        mine = [step(run) for _ in range(4)]
        alone += mine
        begun = time.perf_counter()
        stalls.append(save(run, behind))
        beside = []
        while behind.busy:
            beside.append(step(run))
        behind.finish()
        lasts.append(time.perf_counter() - begun)
        slower.append(sum(beside) - len(beside) * statistics.median(mine))
        waits.append(save(run, waiting))
    took = {"step": alone, "behind_stall": stalls, "behind_slowdown": slower, "behind_lasts": lasts}
    took["waiting_stall"] = waits
    figures: Figures = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in took.items()}
    cost = float(figures["behind_stall_ms"]) + float(figures["behind_slowdown_ms"])
    figures["behind_cost"] = cost / float(figures["step_ms"])
    return figures | speeds(run, folder, statistics.median(waits))


def speeds(run: Run, folder: Path, written: float) -> Figures:
    fragments = run.fragments()
    tensors = {f"{part.name}/{kind}": tensor for part in fragments for kind, tensor in part.tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    raw, pickled = folder / "raw", folder / "torch.pt"
    content = b"".join(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values())

    def read() -> None:
        start = newest(folder / "waiting")
        assert start is not None
        load(start, fragments)

    def write_raw() -> None:
        with raw.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    took = {
        "write": written,
        "read": statistics.median(seconds(read) for _ in range(3)),
        "raw_write": statistics.median(seconds(write_raw) for _ in range(3)),
        "raw_read": statistics.median(seconds(raw.read_bytes) for _ in range(3)),
        "torch_write": statistics.median(seconds(lambda: torch.save(tensors, pickled)) for _ in range(3)),
        "torch_read": statistics.median(seconds(lambda: torch.load(pickled, weights_only=True)) for _ in range(3)),
    }
    figures: Figures = {"checkpoint_mb": size}
    return figures | {f"{name}_mb_per_s": size / time_s for name, time_s in took.items()}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("overrides", nargs="*", metavar="section.key=value")
    options: argparse.Namespace = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("bf16_30m", (*BATCH, *options.overrides, f"run.dir={folder}/run"))
        with build(recipe, train.read_launch(), "never") as run:
            figures: Figures = {"parameters": run.engine.parameters, "threads": torch.get_num_threads()}
            figures |= measure(run, Path(folder), options.rounds)
        report(figures, options.json)


if __name__ == "__main__":
    main()
