"""Reduce-scatter and all-gather in every payload format: time and bytes on the wire against FP32 in the same run.

Processes on this machine talk over gloo, so the wire is the loopback device and shares the cores with the quantizers: a
payload that saves bytes saves more time on a real network. `--mbps` adds what a link of so many megabits a second would
take for the bytes beside the time measured here. Numbers are those of rank 0:

    rs_NAME_ms, ag_NAME_ms      median time of a reduce-scatter, an all-gather (BF16 weights)
    rs_NAME_mb, ag_NAME_mb      what the rank sent, 10^6 bytes, scales included
    rs_NAME_bytes_ratio         bytes over those of FP32
    rs_NAME_time_ratio          time over that of FP32
    rs_torch_fp32_ms            torch's own reduce_scatter_single, which rounds nothing, either

    python -m bench.collectives [--elements N] [--ranks N] [--threads N] [--mbps N] [--json FILE|-]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from bench.common import Figures, interleaved, on_ranks, parser, report
from lowprec.collectives import all_gather, reduce_scatter
from lowprec.payload import PAYLOADS


def measure(rank: int, options: argparse.Namespace) -> Figures:
    """All figures of this rank; the ranks run the same variants in step."""
    world, elements = options.ranks, options.elements
    splits = [elements // world] * world
    tensors = 16  # logical ones, each with its own shared scale
    segments = [elements // tensors] * tensors
    x = torch.randn(elements, generator=torch.Generator().manual_seed(rank)).mul_(1e-3)
    weights = x[: splits[0]].bfloat16()
    variants: dict[str, Callable[[], object]] = {}
    sent: dict[str, int] = {}
    for name, payload in PAYLOADS.items():
        reduce = partial(reduce_scatter, x, splits, None, payload, segments=segments)
        gather = partial(all_gather, weights, splits, None, payload, segments=segments)
        variants[f"rs_{name}"], variants[f"ag_{name}"] = reduce, gather
        sent[f"rs_{name}"], sent[f"ag_{name}"] = reduce().sent_bytes, gather().sent_bytes
    output = torch.empty(splits[rank])
    variants["rs_torch_fp32"] = lambda: dist.reduce_scatter_single(output, x.clone())
    seconds = interleaved(variants, options.repetitions)

    figures: Figures = {"elements": elements, "ranks": world, "threads": options.threads}
    for variant, time_s in seconds.items():
        figures[f"{variant}_ms"] = time_s * 1e3
        if variant not in sent:
            continue
        which = variant[:2]
        figures[f"{variant}_mb"] = sent[variant] / 1e6
        figures[f"{variant}_bytes_ratio"] = sent[variant] / sent[f"{which}_fp32"]
        figures[f"{variant}_time_ratio"] = time_s / seconds[f"{which}_fp32"]
        if options.mbps:
            figures[f"{variant}_link_ms"] = time_s * 1e3 + sent[variant] * 8 / options.mbps / 1e3
    return figures


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--elements", type=int, default=1 << 23, help="of the gradient; a multiple of 16 * ranks")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--threads", type=int, default=1, help="of each rank")
    options.add_argument("--repetitions", type=int, default=7)
    options.add_argument(
        "--mbps", type=float, default=0.0, help="also the time with a link of so many megabits a second"
    )
    arguments = options.parse_args()
    if arguments.elements % (16 * arguments.ranks):
        raise SystemExit(f"--elements is {arguments.elements}; use a multiple of {16 * arguments.ranks}")
    report(on_ranks(measure, arguments.ranks, arguments.threads, arguments), arguments.json)


if __name__ == "__main__":
    main()
