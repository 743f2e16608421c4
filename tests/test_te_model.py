"""The model with Transformer Engine's layers (tests/te_cpu) behind the same names: training, checkpoints, layouts.

One start of Transformer Engine for all cases of one rank, another for those of two.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from errors import UsageError
from lowprec import backend
from lowprec.policy import GEMMS
from run.dry_run import dry_run
from tests import layout_case, te_cpu
from tests.layout_case import Case, Outcome, recipe_of
from tests.spawn import RankError, run_ranks

te_cpu.require()
pytestmark = pytest.mark.xdist_group("te_model")  # its fixtures are made once

SMALL = (
    "model.dtype=bf16",
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.ffn_size=128",
    "model.num_kv_heads=4",
    "model.head_dim=32",
    "train.seq_len=32",
    "train.global_batch=4",
)
WIDE = ("model.hidden_size=128", "model.head_dim=null", "train.seq_len=64")
MXFP4 = ("precision.policy=mxfp4", "train.seq_len=64")
FP8_LM = (
    "precision.policy=fp8_lm",
    "gradients.payload=fp8_lm",
    "gradients.accumulate=fp8",
    "optimizer.master=fp16_scaled",
    "optimizer.exp_avg=fp8_e4m3",
    "optimizer.exp_avg_sq=fp16_scaled",
)
ZERO_BUBBLE = (
    "parallel.pp=2",
    "parallel.schedule=zbv",
    "model.num_layers=4",
    "train.global_batch=8",
)
ALONE = {
    "mxfp8": ("precision.policy=mxfp8", "model.recompute=full", "model.bias=true"),
    "mxfp4": (*MXFP4, "model.recompute=full"),
    "fp8_block": ("precision.policy=fp8_block", *WIDE),
    "fp8_current": ("precision.policy=fp8_current", "model.recompute=selective"),
    "nvfp4": ("precision.policy=nvfp4", "model.activation=gelu", "model.norm=layernorm", "model.bias=true"),
    "fp8_delayed": ("precision.policy=fp8_delayed", "model.activation=relu2"),
    "main_grad": ("precision.policy=mxfp8", "precision.wgrad_output=fp32"),
    "main_grad, stage 2": ("precision.policy=mxfp8", "precision.wgrad_output=fp32", "zero.stage=2"),
    "FP8-LM": (*FP8_LM, "precision.wgrad_output=fp32"),
    "hybrid": (
        "precision.policy=mxfp8",
        "model.pattern=M*-",
        "model.num_layers=3",
        "model.mamba.groups=2",
        "model.mamba.head_dim=4",
    ),
    "schedule": ("precision.policy=mxfp8", 'precision.schedule=[{"start": 2, "dgrad": "bf16", "wgrad": "bf16"}]'),
}
TWO = {
    "tp": ("precision.policy=mxfp8", "parallel.tp=2", "model.bias=true"),
    "tp, custom": (*MXFP4, "parallel.tp=2"),
    "tp, fp8_current": ("precision.policy=fp8_current", "parallel.tp=2"),
    "tp, sp": ("precision.policy=mxfp8", "parallel.tp=2", "parallel.sp=true", "model.bias=true"),
    "tp, sp, custom": ("precision.policy=mxfp4", "parallel.tp=2", "parallel.sp=true", "train.seq_len=128"),
    "tp, main_grad": ("precision.policy=mxfp8", "parallel.tp=2", "precision.wgrad_output=fp32"),
    "pp": ("precision.policy=mxfp8", "parallel.pp=2", "train.global_batch=8"),
    "zero bubble": ("precision.policy=mxfp8", *ZERO_BUBBLE, "model.bias=true"),
    "zero bubble, custom": (*MXFP4, *ZERO_BUBBLE, "model.bias=true"),
    "zero bubble, main_grad": ("precision.policy=mxfp8", *ZERO_BUBBLE, "precision.wgrad_output=fp32"),
    "FP8-LM": FP8_LM,
}
# Every policy through our quantizers in its layers, whether it has a recipe for it or not.
CUSTOM = {
    "mxfp8": ("precision.policy=mxfp8",),
    "nvfp4": ("precision.policy=nvfp4",),
    "mxfp4": MXFP4,
    "fp8_current": ("precision.policy=fp8_current",),
    "fp8_block": ("precision.policy=fp8_block", *WIDE),
}
MUCH = ("precision.policy=mxfp8", "train.micro_batch=4", "optimizer.lr=3e-3")
STEPS = 50


class Seen(NamedTuple):
    """Of a few steps under one backend. kinds: of layers; receipt: GEMMs run, by what quantized them."""

    kinds: set[str]
    outcome: Outcome
    parameters: list[str]
    receipt: dict[str, int]


class Relay(NamedTuple):
    """Losses of runs in turns and of one hand; whether amax histories were found as they had been left."""

    losses: list[float]
    single: list[float]
    carried: list[bool]


class Alone(NamedTuple):
    """What one rank did.

    curves: losses of our linears, of ours with FP32 GEMMs, of Transformer Engine
    kept:   of "mxfp4" without recomputation
    gemms:  policy -> how often each GEMM of each linear was compared
    """

    pairs: dict[str, tuple[Seen, Seen]]
    curves: list[list[float]]
    kept: Outcome
    gemms: dict[str, list[int]]
    relay: Relay


def case(wanted: str, *overrides: str, fill: bool = True) -> Case:
    """A case on the CPU, which the stand-in makes good enough for Transformer Engine."""
    te_cpu.install()
    backend.DEVICES = ("cpu",)  # in this rank's own process
    return Case((*SMALL, f"precision.backend={wanted}", *overrides), fill=fill)


def _pairs(cases: dict[str, tuple[str, ...]]) -> dict[str, tuple[Seen, Seen]]:
    """For each case: our linears, and Transformer Engine's layers."""
    found = {}
    for name, overrides in cases.items():
        pair = []
        for wanted in ("emulate", "te"):
            run = case(wanted, *overrides)
            outcome, precision = run.run(0, 3), run.local.precision
            precision.check_ran()
            run.assert_copies_equal()
            # Transformer Engine's reference to a buffer would keep it for ever, whatever gradients are stored as.
            assert not any("main_grad" in vars(p) for part in run.local.parts for p in part.parameters())
            kinds = {type(module).__name__ for part in run.local.parts for module in part.modules()}
            names = [name for part in run.local.parts for name, _ in part.named_parameters()]
            pair.append(Seen(kinds, outcome, names, precision.receipt()))
        found[name] = (pair[0], pair[1])
    return found


def _alone(rank: int, folder: Path) -> Alone:
    pairs, build = _pairs(ALONE), layout_case.build_local
    curves = [case("emulate", *MUCH).run(0, STEPS).losses, case("te", *MUCH).run(0, STEPS).losses]
    layout_case.build_local = lambda recipe, mesh, device, dtype: build(recipe, mesh, device, torch.float32)
    curves.insert(1, case("emulate", *MUCH).run(0, STEPS).losses)
    layout_case.build_local = build
    kept = case("te", *MXFP4).run(0, 3)
    return Alone(pairs, curves, kept, _every_gemm(), _relay(folder))


def _every_gemm() -> dict[str, list[int]]:
    """One step's forward and backward; each GEMM against our linear's, for the matrices that it was given."""
    from lowprec import te_layers
    from tests.te_case import check_all, ours, products, recipes

    own, counts = te_layers.recipe_of, {}
    te_layers.recipe_of = lambda linears: recipes.CustomRecipe(qfactory=ours.Factory(linears))
    for policy, overrides in CUSTOM.items():
        run = case("te", *overrides)
        with products() as found:
            run.backward(0)
        check_all(found, policy)
        often = Counter((each.name, each.gemm) for each in found)
        counts[policy] = [often[name, gemm] for name in run.local.precision.layers for gemm in GEMMS]
    te_layers.recipe_of = own
    return counts


def _relay(folder: Path) -> Relay:
    """Six steps that change hands, emulated, Transformer Engine, emulated; and six of one hand."""
    losses, left, carried = [], {}, []
    for turn, wanted in enumerate(("emulate", "te", "emulate")):
        run = case(wanted, "precision.policy=fp8_delayed", fill=turn == 0)
        state = run.local.precision.state()
        if turn:
            assert run.load(folder) == 2 * turn
            assert state.keys() == left.keys() and any(name.endswith(".dy.history") for name in state)
            carried += [torch.equal(state[name], left[name]) and bool((left[name] != 1).any()) for name in left]
        losses += run.run(2 * turn, 2).losses
        run.save(folder, 2 * turn + 2)
        left = {name: tensor.clone() for name, tensor in state.items()}
    return Relay(losses, case("emulate", "precision.policy=fp8_delayed").run(0, 6).losses, carried)


def _two(rank: int) -> dict[str, tuple[Seen, Seen]]:
    return _pairs(TWO)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Alone:
    return run_ranks(_alone, 1, tmp_path_factory.mktemp("te"), timeout=600)[0]


@pytest.fixture(scope="module")
def two() -> list[dict[str, tuple[Seen, Seen]]]:
    return run_ranks(_two, 2, timeout=600)


def compare(ours: Seen, theirs: Seen) -> None:
    assert "LowPrecisionLinear" in ours.kinds and "LowPrecisionLinear" not in theirs.kinds
    assert ours.parameters == theirs.parameters
    assert theirs.outcome.losses == pytest.approx(ours.outcome.losses, rel=4e-3)
    assert theirs.outcome.norms == pytest.approx(ours.outcome.norms, rel=4e-2)
    assert theirs.outcome.parameter_norm == pytest.approx(ours.outcome.parameter_norm, rel=1e-4)


@pytest.mark.parametrize("name", ALONE)
def test_training_follows_the_emulated_run(alone, name):
    ours, theirs = alone.pairs[name]
    compare(ours, theirs)
    kinds = {"TeNormLinear", "TeLinear", "TeNormMLP", "TeCore"}
    assert kinds <= theirs.kinds
    emulated = any("fused" in words for words in theirs.receipt)
    assert emulated == (name in ("mxfp4", "schedule"))  # the others are its own recipes, in every phase
    if name not in ("mxfp8", "mxfp4"):  # which recompute their forwards
        assert sum(theirs.receipt.values()) == sum(ours.receipt.values())


def test_main_grad_accumulates_as_our_accumulator_does(alone):
    """Reduced once a step, or after each micro-batch: the same FP32 sums."""
    one, other = (alone.pairs[name][1].outcome for name in ("main_grad", "main_grad, stage 2"))
    assert one == other


def test_fifty_steps_stay_within_the_noise_of_another_order_of_additions(alone):
    """Our linears again, but with FP32 GEMMs, add up the same products in another order."""
    ours, reordered, theirs = (torch.tensor(losses) for losses in alone.curves)
    assert len(ours) == STEPS and ours[-5:].mean() < 0.8 * ours[0]
    noise, gap = ((other / ours - 1) for other in (reordered, theirs))
    assert gap.square().mean().sqrt() < 2 * noise.square().mean().sqrt() < 2e-2


@pytest.mark.parametrize("policy", CUSTOM)
def test_every_gemm_of_a_transformer_is_that_of_our_linear(alone, policy):
    """Within the limits of `check_all`, in each of two micro-batches."""
    counts = alone.gemms[policy]
    assert len(counts) == 3 * 4 * 2 and set(counts) == {2}


def test_recomputation_repeats_our_quantizers_bit_for_bit(alone):
    assert alone.pairs["mxfp4"][1].outcome == alone.kept


def test_checkpoints_pass_between_backends(alone):
    """Amax histories and scales of delayed scaling, too."""
    losses, single, carried = alone.relay
    assert losses[:2] == single[:2]
    assert losses == pytest.approx(single, rel=4e-3)
    assert len(carried) == 2 * 2 * 3 * 8 and all(carried)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_layouts(two, name):
    for rank in two:
        compare(*rank[name])


@pytest.mark.slow
def test_ranks_that_share_a_layer_see_the_same(two):
    for name in TWO:
        one, other = (rank[name][1].outcome for rank in two)
        assert one == other, name


def _compiled(rank: int) -> tuple[Outcome, Outcome]:
    cases = (("precision.policy=mxfp8", "model.recompute=full", f"train.compile={word}") for word in ("true", "false"))
    one, other = (case("te", *overrides).run(0, 2) for overrides in cases)
    return one, other


@pytest.mark.slow
def test_blocks_are_compiled_around_its_layers():
    ((compiled, plain),) = run_ranks(_compiled, 1, timeout=400)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert compiled.norms == pytest.approx(plain.norms, rel=1e-4)


def test_a_dry_run_says_what_its_layers_do_not_join_in():
    wrong = ("train.seq_len=20", "model.ffn_size=80", "zero.stage=3", "probe.interval=5")
    with pytest.raises(UsageError) as error:
        dry_run(recipe_of((*SMALL, "precision.policy=mxfp8", "precision.backend=te", *wrong), 1))
    for words in (
        "a micro-batch has 40 tokens, no multiple of 32",
        "layers.{0-1}.mlp.down: 80 in features on a rank, no multiple of 32",
        "zero.stage is 3, which frees weights",
        "probe is on, which watches our own linears",
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
