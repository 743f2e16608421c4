"""The scan of a Mamba-2 mixer, forward and backward: in chunks as matrix products, against a loop over time.

Both are FP32 and compute the same recurrence with autograd; the loop keeps the state of every token. Repetitions
alternate, the median is shown. `ratio` is the loop's time over that of the model's chunk (128).

    python -m bench.mamba [--threads 2] [--repetitions 5] [--length 1024] [--json FILE|-]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.common import Figures, interleaved, parser, report
from model.mamba import MambaConfig, scan
from run.environment import keep_memory

GROUPS, HEADS = 2, 4  # groups, heads of one; head and state sizes are the model's
CHUNKS = (32, 64, 128, 256)


def loop(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`scan` one token at a time; arguments as there."""
    state, found = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[-1]), []
    decay, x = (dt * a).exp(), x * dt[..., None]
    for t in range(x.shape[1]):
        state = state * decay[:, t, ..., None, None] + x[:, t, ..., None] * b[:, t, :, None, None]
        found.append((state @ c[:, t, :, None, :, None]).squeeze(-1))
    return torch.stack(found, 1)


def step(function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor, *more: int) -> Callable[[], object]:
    """One forward and backward."""
    return lambda: torch.autograd.grad(function(*inputs, *more), inputs, dy)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--repetitions", type=int, default=5)
    made.add_argument("--length", type=int, default=1024, help="tokens of the sequence")
    options = made.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes, length = MambaConfig(), options.length
    shape = (1, length, GROUPS, HEADS)
    inputs = [torch.randn(*shape, sizes.head_dim), torch.rand(shape) * 0.1, -1.0 - 15.0 * torch.rand(GROUPS, HEADS)]
    inputs += [torch.randn(1, length, GROUPS, sizes.state) for _ in "bc"]
    inputs = [each.requires_grad_() for each in inputs]
    dy = torch.randn(*shape, sizes.head_dim)
    variants = {f"chunk_{chunk}": step(scan, inputs, dy, chunk) for chunk in CHUNKS}
    seconds = interleaved({"loop": step(loop, inputs, dy)} | variants, options.repetitions)
    figures: Figures = {"threads": options.threads, "length": length, "heads": GROUPS * HEADS}
    figures |= {f"{name}_ms": 1e3 * value for name, value in seconds.items()}
    figures["ratio"] = seconds["loop"] / seconds[f"chunk_{sizes.chunk}"]
    report(figures, options.json)


if __name__ == "__main__":
    main()
