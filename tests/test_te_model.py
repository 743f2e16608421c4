"""The model with Transformer Engine's linears (tests/te_cpu) behind the same names: training, checkpoints, layouts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from errors import UsageError
from lowprec import backend
from run.dry_run import dry_run
from tests import te_cpu
from tests.layout_case import Case, Outcome, recipe_of
from tests.spawn import RankError, run_ranks

SMALL = (
    "model.dtype=bf16",
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.ffn_size=128",
    "model.num_kv_heads=4",
    "model.head_dim=32",
    "train.seq_len=32",
)


class Seen(NamedTuple):
    """Of a few steps under one backend."""

    layers: set[str]
    outcome: Outcome
    parameters: list[str]
    gemms: int


def case(wanted: str, *overrides: str, fill: bool = True) -> Case:
    """A case on the CPU, which the stand-in makes good enough for Transformer Engine."""
    te_cpu.install()
    backend.DEVICES = ("cpu",)  # in this rank's own process
    return Case((*SMALL, f"precision.backend={wanted}", *overrides), fill=fill)


def _both(rank: int, cases: list[tuple[str, ...]]) -> list[tuple[Seen, Seen]]:
    """For each case: our linears, and Transformer Engine's."""
    found = []
    for overrides in cases:
        pair = []
        for wanted in ("emulate", "te"):
            run = case(wanted, *overrides)
            outcome, precision = run.run(0, 3), run.local.precision
            precision.check_ran()
            run.assert_copies_equal()
            pair.append(
                Seen(
                    {type(layer).__name__ for layer in precision.layers.values()},
                    outcome,
                    [name for part in run.local.parts for name, _ in part.named_parameters()],
                    sum(precision.receipt().values()),
                )
            )
        found.append((pair[0], pair[1]))
    return found


def compare(ours: Seen, theirs: Seen) -> None:
    assert ours.layers == {"LowPrecisionLinear"} and theirs.layers == {"TeLinear"}
    assert ours.parameters == theirs.parameters
    assert theirs.outcome.losses == pytest.approx(ours.outcome.losses, rel=2e-3)
    assert theirs.outcome.norms == pytest.approx(ours.outcome.norms, rel=2e-2)


def test_training_follows_the_emulated_run():
    wide = ("model.hidden_size=128", "model.head_dim=null", "model.bias=true", "train.seq_len=64")
    cases = [
        ("precision.policy=mxfp8",),
        ("precision.policy=mxfp4",),
        ("precision.policy=fp8_block", *wide),
        ("precision.policy=mxfp8", "model.recompute=full"),
    ]
    (pairs,) = run_ranks(_both, 1, cases)
    for pair in pairs:
        compare(*pair)
    assert all(ours.gemms == theirs.gemms for ours, theirs in pairs[:3])


def test_layouts():
    common = ("precision.policy=mxfp8", "model.bias=true")
    layouts = [("parallel.tp=2",), ("parallel.tp=2", "parallel.sp=true"), ("parallel.pp=2",)]
    for pairs in run_ranks(_both, 2, [(*common, *layout) for layout in layouts]):
        for pair in pairs:
            compare(*pair)


def _relay(rank: int, folder: Path) -> tuple[list[float], list[float]]:
    """Six steps that change hands, emulated, Transformer Engine, emulated; and six of one hand."""
    losses = []
    for turn, wanted in enumerate(("emulate", "te", "emulate")):
        run = case(wanted, "precision.policy=mxfp8", fill=turn == 0)
        if turn:
            assert run.load(folder) == 2 * turn
        losses += run.run(2 * turn, 2).losses
        run.save(folder, 2 * turn + 2)
    return losses, case("emulate", "precision.policy=mxfp8").run(0, 6).losses


def test_checkpoints_pass_between_backends(tmp_path):
    ((relayed, alone),) = run_ranks(_relay, 1, tmp_path)
    assert relayed[:2] == alone[:2]
    assert relayed == pytest.approx(alone, rel=2e-3)


def test_a_dry_run_says_what_its_layers_do_not_join_in():
    wrong = ("train.seq_len=20", "model.ffn_size=80", "zero.stage=3", "precision.wgrad_output=fp32")
    with pytest.raises(UsageError) as error:
        dry_run(recipe_of((*SMALL, "precision.policy=mxfp8", "precision.backend=te", *wrong), 1))
    for words in (
        "a micro-batch has 40 tokens, no multiple of 32",
        "layers.{0-1}.mlp.down: 80 in features on a rank, no multiple of 32",
        "zero.stage is 3, which frees weights",
        "precision.wgrad_output is fp32",
    ):
        assert words in str(error.value)
    assert "mxfp8" in dry_run(recipe_of((*SMALL, "precision.policy=mxfp8", "precision.backend=te"), 1))


def _plain(rank: int) -> None:
    try:
        Case((*SMALL, "precision.policy=mxfp8", "precision.backend=te"))
    except UsageError as error:
        raise RuntimeError(str(error)) from None


def test_a_cpu_is_no_gpu():
    with pytest.raises(RankError, match="device is cpu; Transformer Engine runs on cuda"):
        run_ranks(_plain, 1)
