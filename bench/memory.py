"""Bytes that a block of a model saves for its backward, by precision policy, against BF16.

    python -m bench.memory [--recipe bf16_10m] [--json FILE|-] [section.key=value ...]

Counted are the tensors that autograd saves in one eager forward of the first block, each storage once, parameters left
out. `_linears` are the copies that the block's linears keep for their weight gradients (codes, scales and amax),
`_block` is everything: attention, norms and activation functions keep BF16 in every policy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.common import parser, report
from lowprec.apply import Precision, RunFacts
from lowprec.policy import PrecisionConfig
from model.attention import rotary_table
from model.block import Block
from recipe import load, load_policy

POLICIES = ("bf16", "mxfp8", "nvfp4", "fp8_current", "mxfp4")


class _Holder(nn.Module):
    """One block under the name that policies speak of."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])


def saved(holder: nn.Module, x: Tensor, rope: Tensor | None) -> tuple[int, int]:
    """(bytes that linears save, bytes that the whole block saves)."""
    parameters = {p.untyped_storage().data_ptr() for p in holder.parameters()}
    storages: dict[int, int] = {}
    linears: dict[int, int] = {}
    inside = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            if inside:
                linears[storage.data_ptr()] = storage.nbytes()
        return tensor

    def enter(*_: object) -> None:
        nonlocal inside
        inside += 1

    def leave(*_: object) -> None:
        nonlocal inside
        inside -= 1

    for module in holder.modules():
        if hasattr(module, "out_features"):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = holder.layers[0](x, rope, None)  # pyright: ignore[reportIndexIssue, reportCallIssue]
    assert y.requires_grad  # the graph is alive, so no storage was freed and counted twice
    return sum(linears.values()), sum(storages.values())


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--recipe", default="bf16_10m")
    made.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = made.parse_args()
    recipe = load(options.recipe, tuple(options.overrides))
    train, model = recipe.train, recipe.model
    figures: dict[str, float | int | str] = {"recipe": options.recipe, "tokens": train.micro_batch * train.seq_len}
    for policy in POLICIES:
        torch.manual_seed(0)
        holder = _Holder(Block(model, sublayers=model.blocks[0]))
        for parameter in holder.parameters():
            nn.init.normal_(parameter, std=0.02)
        facts = RunFacts(seed=0, steps=10, tokens_per_step=train.micro_batch * train.seq_len)
        precision = Precision([holder], load_policy(policy), PrecisionConfig(policy=policy), facts)
        precision.begin_step(0)
        x = torch.randn(train.micro_batch, train.seq_len, model.hidden_size).bfloat16().requires_grad_()
        rope = rotary_table(torch.arange(train.seq_len), model.head_size, model.rope_theta)
        linears, block = saved(holder, x, rope)
        figures |= {f"{policy}_linears_mib": linears / 2**20, f"{policy}_block_mib": block / 2**20}
        figures[f"{policy}_linears"] = linears / 2**20 / float(figures["bf16_linears_mib"])
        figures[f"{policy}_block"] = block / 2**20 / float(figures["bf16_block_mib"])
    report(figures, options.json)


if __name__ == "__main__":
    main()
