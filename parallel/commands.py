"""python -m parallel.checkpoint verify|inspect|prune|convert: look at checkpoints, without the run that wrote them.

    verify PATH                 hash every file; PATH is a run (all its checkpoints) or one checkpoint
    inspect PATH                step, layout, precision and what is stored, by kind
    prune RUN --keep N          delete all but the N newest
    convert PATH OUT            all weights as one safetensors file with the model's names (--dtype fp32|bf16)

Exit codes: 0, 2 usage, 4 damaged or not a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from errors import CheckpointError, UsageError, UserError
from parallel import catalog
from parallel.checkpoint import Checkpoint, load_weights, locate, open_checkpoint
from parallel.dcp_index import tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m parallel.checkpoint", description="Look at checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="verify|inspect|prune|convert")
    for name, function in (("verify", _verify), ("inspect", _inspect), ("prune", _prune), ("convert", _convert)):
        command = commands.add_parser(name)
        command.set_defaults(run=function)
        command.add_argument("path", type=Path, help="a run's directory, or one checkpoint")
        if name == "inspect":
            command.add_argument("--json", action="store_true", help="print what was saved with it, as JSON")
        if name == "prune":
            command.add_argument("--keep", type=int, required=True, help="how many of the newest stay")
        if name == "convert":
            command.add_argument("out", type=Path, help="the safetensors file to write")
            command.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights written")
    return parser


def _found(path: Path) -> list[Path]:
    """The checkpoints that a user's path means, newest first."""
    paths = catalog.by_age(path / catalog.FOLDER) or [path]
    if not paths[0].is_dir():
        raise CheckpointError(f"{path} is neither a run with checkpoints nor a checkpoint")
    return paths


def _verify(options: argparse.Namespace) -> int:
    code = 0
    for path in _found(options.path):
        try:
            checkpoint = open_checkpoint(path)
            print(f"ok       {path} (step {checkpoint.step})")
        except CheckpointError as error:
            code = error.exit_code
            print(f"DAMAGED  {error}")
    return code


def _inspect(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(locate(options.path))
    if options.json:
        print(json.dumps(checkpoint.meta, indent=1))
        return 0
    meta = checkpoint.meta
    print(f"{checkpoint.path}: step {checkpoint.step}, {meta.get('samples')} samples, {checkpoint.saved_ranks} ranks")
    print(f"recipe {meta['recipe'].get('name')}, policy {meta['recipe'].get('precision', {}).get('policy')}")
    print(f"layout {meta.get('layout')}")
    elements = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    print(f"{elements:,} elements in {len(checkpoint.shapes)} tensors")
    for kind, (count, size) in _kinds(checkpoint).items():
        print(f"  {kind:<22} {count:5d} tensors  {size:>15,} bytes")
    return 0


def _kinds(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Kind -> (tensors, bytes), largest first."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for key, entry in tensors(checkpoint.index).items():
        kind = key.split("/")[0]
        count[kind] += 1
        size[kind] += math.prod(entry.size) * entry.properties.dtype.itemsize
    return {kind: (count[kind], total) for kind, total in size.most_common()}


def _prune(options: argparse.Namespace) -> int:
    if options.keep < 1:
        raise UsageError(f"--keep is {options.keep}; at least 1 checkpoint must stay")
    root = options.path / catalog.FOLDER
    before = catalog.by_age(root)
    if not before:
        raise CheckpointError(f"{root} holds no checkpoints")
    catalog.prune(root, options.keep)
    after = catalog.by_age(root)
    print(f"{len(before) - len(after)} deleted, {len(after)} left in {root}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    weights = load_weights(options.path)
    dtype = DTYPES[options.dtype]
    partial = options.out.with_name(options.out.name + ".tmp")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}, partial)
        partial.replace(options.out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {options.out}: {error}") from None
    print(f"{len(weights)} tensors, {options.dtype}, in {options.out}")
    return 0
