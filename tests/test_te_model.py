"""The model with Transformer Engine's linears (tests/te_cpu) behind the same names: training, checkpoints, layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from errors import UsageError
from lowprec import backend
from tests import te_cpu
from tests.layout_case import Case, Outcome
from tests.spawn import RankError, run_ranks

SMALL = (
    "model.dtype=bf16",
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.ffn_size=128",
    "model.num_kv_heads=4",
    "model.head_dim=32",
)


def case(policy: str, wanted: str, *overrides: str, fill: bool = True) -> Case:
    """A case on the CPU, which the stand-in makes good enough for Transformer Engine."""
    te_cpu.install()
    backend.DEVICES = ("cpu",)  # in this rank's own process
    return Case((*SMALL, f"precision.policy={policy}", f"precision.backend={wanted}", *overrides), fill=fill)


def layers(of: Case) -> set[str]:
    return {type(layer).__name__ for layer in of.local.precision.layers.values()}


def _backends(rank: int, policy: str, overrides: tuple[str, ...]) -> list[tuple[set[str], Outcome, list[str], dict]]:
    found = []
    for wanted in ("emulate", "te"):
        run = case(policy, wanted, *overrides)
        outcome = run.run(0, 3)
        run.local.precision.check_ran()
        run.assert_copies_equal()
        names = [name for part in run.local.parts for name, _ in part.named_parameters()]
        found.append((layers(run), outcome, names, run.local.precision.receipt()))
    return found


@pytest.mark.parametrize(
    ("policy", "overrides"),
    [
        ("mxfp8", ()),
        ("mxfp4", ()),
        ("fp8_block", ("model.hidden_size=128", "model.head_dim=null", "model.bias=true", "train.seq_len=64")),
        ("mxfp8", ("model.recompute=full",)),
    ],
)
def test_training_follows_the_emulated_run(policy, overrides):
    ((emulated, theirs),) = run_ranks(_backends, 1, policy, ("train.seq_len=32", *overrides))
    assert emulated[0] == {"LowPrecisionLinear"} and theirs[0] == {"TeLinear"}
    assert emulated[2] == theirs[2]  # names of parameters
    assert theirs[1].losses == pytest.approx(emulated[1].losses, rel=2e-3)
    assert theirs[1].norms == pytest.approx(emulated[1].norms, rel=2e-2)
    assert sum(theirs[3].values()) >= sum(emulated[3].values())  # recomputation that is not needed is not skipped


@pytest.mark.parametrize("overrides", [("parallel.tp=2",), ("parallel.tp=2", "parallel.sp=true"), ("parallel.pp=2",)])
def test_layouts(overrides):
    ranks = run_ranks(_backends, 2, "mxfp8", ("train.seq_len=32", "model.bias=true", *overrides))
    for emulated, theirs in ranks:
        assert theirs[0] == {"TeLinear"}
        assert theirs[1].losses == pytest.approx(emulated[1].losses, rel=2e-3)


def _relay(rank: int, folder: Path) -> list[float]:
    """Six steps that change hands: emulated, Transformer Engine, emulated."""
    losses = []
    for turn, wanted in enumerate(("emulate", "te", "emulate")):
        run = case("mxfp8", wanted, "train.seq_len=32", fill=turn == 0)
        if turn:
            assert run.load(folder) == 2 * turn
        losses += run.run(2 * turn, 2).losses
        run.save(folder, 2 * turn + 2)
    return losses


def _alone(rank: int, wanted: str) -> list[float]:
    return case("mxfp8", wanted, "train.seq_len=32").run(0, 6).losses


def test_checkpoints_pass_between_backends(tmp_path):
    (relayed,) = run_ranks(_relay, 1, tmp_path)
    (emulated,) = run_ranks(_alone, 1, "emulate")
    assert relayed[:2] == emulated[:2]
    assert relayed == pytest.approx(emulated, rel=2e-3)


def _refused(rank: int, overrides: tuple[str, ...]) -> None:
    case("mxfp8", "te", *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("train.seq_len=20",), "a micro-batch has 40 tokens, no multiple of 32"),
        (("model.ffn_size=80",), "mlp.gate_up: 160|mlp.down: 80 in features on a rank, no multiple of 32"),
        (("zero.stage=3",), "zero.stage is 3, which frees weights"),
        (("precision.wgrad_output=fp32",), "precision.wgrad_output is fp32"),
    ],
)
def test_what_it_does_not_join_in_is_refused(overrides, words):
    with pytest.raises(RankError, match=words):
        run_ranks(_refused, 1, overrides)


def test_a_cpu_is_no_gpu():
    with pytest.raises(RankError, match="device is cpu; Transformer Engine runs on cuda"):
        run_ranks(_plain, 1)


def _plain(rank: int) -> None:
    try:
        Case((*SMALL, "precision.policy=mxfp8", "precision.backend=te"))
    except UsageError as error:
        raise RuntimeError(str(error)) from None
