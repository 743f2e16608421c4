"""The gradient contract and the ZeRO stages against plain AdamW in one process."""

from __future__ import annotations

import ast
import importlib
import inspect

import pytest
import torch
from torch import nn

from lowprec import zero_sources
from lowprec.engine import Engine
from lowprec.optim import OptimizerConfig
from lowprec.patching import PatchError
from lowprec.zero import ZeroConfig, ZeroPlan, build_engine
from tests.launch import ROOT
from tests.spawn import run_ranks

pytestmark = pytest.mark.xdist_group("zero")  # what its fixtures compute is computed once

STAGES = (0, 1, 2, 3)
BATCH = 24  # whole micro-batches of 2 on 1, 2, 3 and 4 ranks
MICRO_GRADIENT = 1 + 2**-9  # not a BF16 number: one BF16 rounding anywhere loses it


class ExactGradient(torch.autograd.Function):
    """A linear whose weight gradient is MICRO_GRADIENT everywhere, in FP32, as a low-precision linear gives it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        return dy @ weight, torch.full(weight.shape, MICRO_GRADIENT, dtype=torch.float32)


class Toy(nn.Module):
    """Two layers of awkward sizes, so that partition borders fall inside parameters."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.first = nn.Linear(6, 7, bias=True, dtype=dtype)
        self.second = nn.Linear(7, 5, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).float().square().mean()


class ExactToy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ExactGradient.apply(x, self.weight).float().sum()


def simple_plan(stage: int) -> ZeroPlan:
    """One sample, one micro-batch."""
    return ZeroPlan(zero=ZeroConfig(stage=stage), optimizer=OptimizerConfig(), micro_batch=1, accumulation=1)


def _fill(engine: Engine, seed: int) -> None:
    """The same FP32 masters whatever the partitioning."""

    def values(fragment):
        generator = torch.Generator().manual_seed(seed + len(fragment.name))
        whole = torch.randn(fragment.shape, generator=generator).flatten() * 0.3
        count = fragment.tensors["weight"].numel()
        return whole[fragment.offset : fragment.offset + count]

    engine.fill_weights(values)


def _gather(engine: Engine) -> dict[str, list]:
    """name -> [(offset, values)] of this rank."""
    out: dict[str, list] = {}
    for fragment in engine.fragments():
        out.setdefault(fragment.name, []).append((fragment.offset, {k: t.clone() for k, t in fragment.tensors.items()}))
    return out


def _whole(per_rank: list[dict[str, list]], kind: str) -> dict[str, torch.Tensor]:
    """Assemble the flattened logical tensors from all ranks' fragments; overlaps must agree."""
    out: dict[str, dict[int, float]] = {}
    for rank in per_rank:
        for name, pieces in rank.items():
            cells = out.setdefault(name, {})
            for offset, tensors in pieces:
                for index, value in enumerate(tensors[kind].tolist()):
                    assert cells.setdefault(offset + index, value) == value
    return {name: torch.tensor([cells[i] for i in range(len(cells))]) for name, cells in out.items()}


def _exact_rank(rank: int, stage: int, accumulation: int, by_schedule: bool = False) -> dict[str, list]:
    """by_schedule: as pipelines do it, whose backwards the engine does not run."""
    torch.manual_seed(0)
    config = OptimizerConfig(lr=1.0, betas=(0.0, 0.0), weight_decay=0.0, clip=0.0)
    plan = ZeroPlan(zero=ZeroConfig(stage=stage), optimizer=config, micro_batch=1, accumulation=accumulation)
    model = ExactToy()
    engine = build_engine([model], plan)
    x = torch.ones(1, 3, dtype=torch.bfloat16, requires_grad=True)
    if by_schedule:
        engine.run_by_schedule(None, None)
        for _ in range(accumulation // 2):
            model(x).backward()
            # what a split backward leaves to later
            engine.add_gradient(model.weight, torch.full((5, 3), MICRO_GRADIENT))
    for _ in range(0 if by_schedule else accumulation):
        # the engine divides the loss by the micro-batches; this Function ignores its incoming gradient
        engine.backward(engine(x))
    engine.step(lr=1.0)
    return _gather(engine)  # with betas 0, exp_avg is the gradient that the optimizer saw


def _train_rank(rank: int, stage: int, world: int, dtype: torch.dtype, batch: int) -> tuple:
    config = OptimizerConfig(lr=0.05, clip=0.5)
    zero = ZeroConfig(stage=stage, reduce_bucket=1024)
    engine = build_engine(
        [Toy(dtype)], ZeroPlan(zero=zero, optimizer=config, micro_batch=2, accumulation=batch // world // 2)
    )
    _fill(engine, 1)
    _fill(engine, 0)  # the second one must replace the first wholly
    losses, norms = [], []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(batch, 6, generator=generator).to(dtype)
        mine = x.chunk(world)[rank].split(2)
        total = 0.0
        for micro in mine:
            loss = engine(micro)
            engine.backward(loss)
            total += loss.item() / len(mine)
        losses.append(total)
        norms.append(engine.step(lr=0.05).grad_norm)
    return losses, norms, engine.parameter_norm(), _gather(engine), engine.updates


def _reference(batch: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    config = OptimizerConfig(lr=0.05, clip=0.5)
    model = Toy(torch.float32)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    losses, norms = [], []
    for step in range(4):
        x = torch.randn(batch, 6, generator=torch.Generator().manual_seed(step))
        loss = model(x)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: p.detach().flatten() for name, p in model.named_parameters()}


def _every_case(rank: int, world: int) -> dict:
    """All stages in one group of processes: starting a group costs more than the cases."""
    return {
        stage: {
            "exact": _exact_rank(rank, stage, 8),
            "by_schedule": _exact_rank(rank, stage, 8, by_schedule=True) if stage < 2 else None,
            "fp32": _train_rank(rank, stage, world, torch.float32, BATCH),
            "bf16": _train_rank(rank, stage, world, torch.bfloat16, BATCH),
            "nan": _nan_rank(rank, stage),
        }
        for stage in STAGES
    }


@pytest.fixture(scope="module", params=[1, 2, pytest.param(3, marks=pytest.mark.slow), 4])
def outcomes(request) -> tuple[int, list[dict]]:
    return request.param, run_ranks(_every_case, request.param, request.param, timeout=600)


def _of(outcomes: tuple[int, list[dict]], stage: int, case: str) -> list:
    return [rank[stage][case] for rank in outcomes[1]]


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batch_gradients_add_up_exactly_in_fp32(outcomes, stage):
    for case in ("exact", "by_schedule") if stage < 2 else ("exact",):
        gradient = _whole(_of(outcomes, stage, case), "exp_avg")["weight"]
        assert gradient.tolist() == [8 * MICRO_GRADIENT] * 15, case


@pytest.mark.parametrize("stage", STAGES)
def test_fp32_model_follows_plain_adamw(outcomes, stage):
    losses, norms, weights = _reference(BATCH)
    world, results = outcomes[0], _of(outcomes, stage, "fp32")
    mean = [sum(r[0][i] for r in results) / world for i in range(4)]
    torch.testing.assert_close(mean, losses, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(results[0][1], norms, rtol=1e-6, atol=1e-7)
    whole = _whole([r[3] for r in results], "weight")
    assert whole.keys() == weights.keys()
    for name in weights:
        torch.testing.assert_close(whole[name], weights[name], rtol=1e-6, atol=1e-6)
    norm = torch.cat(list(weights.values())).norm().item()
    assert all(r[2] == pytest.approx(norm, rel=1e-6) for r in results)
    assert all(r[4] == 4 for r in results)


def test_bf16_stages_agree_with_each_other(outcomes):
    """What a stage partitions changes at most the order of FP32 additions, never what is added."""
    results = {stage: _of(outcomes, stage, "bf16") for stage in STAGES}
    weights = {stage: _whole([r[3] for r in result], "weight") for stage, result in results.items()}
    for stage in STAGES[1:]:
        assert results[stage][0][0][0] == results[0][0][0][0]  # the first loss: same weights, same batch
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[stage][name], value, rtol=1e-5, atol=1e-6)


def _missing_rank(rank: int) -> list[str]:
    messages = []
    for stage, by_schedule in ((0, False), (1, False), (2, False), (3, False), (0, True), (1, True)):
        model = Toy()
        model.unused = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        engine = build_engine([model], simple_plan(stage))
        x = torch.ones(1, 6, dtype=torch.bfloat16)
        if by_schedule:
            engine.run_by_schedule(None, None)
            model(x).backward()
        else:
            engine.backward(engine(x))
        try:
            engine.step(lr=0.1)
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def test_parameter_without_gradient_is_an_error():
    (messages,) = run_ranks(_missing_rank, 1)
    assert len(messages) == 6 and all("unused" in each and "first" not in each for each in messages), messages


def _nan_rank(rank: int, stage: int) -> tuple:
    engine = build_engine([Toy()], simple_plan(stage))
    _fill(engine, 1)
    before = _gather(engine)
    x = torch.ones(1, 6, dtype=torch.bfloat16)
    poison = x * float("nan") if rank == 0 else x
    engine.backward(engine(poison))
    bad = engine.step(lr=0.1)
    after = _gather(engine)
    engine.backward(engine(x))
    good = engine.step(lr=0.1)
    return bad.skipped, good.skipped, before, after, engine.updates


@pytest.mark.parametrize("stage", STAGES)
def test_non_finite_gradient_on_one_rank_skips_the_step_on_all(outcomes, stage):
    for bad, good, before, after, updates in _of(outcomes, stage, "nan"):
        assert bad and not good and updates == 1
        for name in before:
            for (_, old), (_, new) in zip(before[name], after[name], strict=True):
                assert torch.equal(old["weight"], new["weight"])


# stage, where a patch finds the class, a method that it relies on
PATCHED = [
    (0, "deepspeed.runtime.engine", "DeepSpeedZeroOptimizer", "average_tensor"),
    (3, "deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3", "step"),
    (1, "deepspeed", "DeepSpeedEngine", "_configure_zero_optimizer"),
]


def _drifted_rank(rank: int) -> list[str]:
    messages = []
    for stage, where, name, method in PATCHED:
        upstream = importlib.import_module(where)
        original = getattr(upstream, name)
        drifted = type("Drifted", (original,), {method: lambda self, *_: None})
        setattr(upstream, name, drifted)
        try:
            build_engine([Toy()], simple_plan(stage))
        except PatchError as error:
            assert getattr(upstream, name) is drifted, "nothing was left substituted"
            messages.append(str(error))
        finally:
            setattr(upstream, name, original)
    return messages


def test_drifted_deepspeed_is_a_clear_error():
    (messages,) = run_ranks(_drifted_rank, 1)
    assert len(messages) == len(PATCHED)
    for message, (_, _, name, method) in zip(messages, PATCHED, strict=True):
        assert f"{name}.{method} changed upstream" in message and "read it again" in message


def _substituted_rank(rank: int, stages: tuple[int, ...]) -> list[str]:
    modules = [importlib.import_module(where) for _, where, _, _ in PATCHED]
    before = [dict(vars(module)) for module in modules]
    for stage in stages:
        build_engine([Toy()], simple_plan(stage))
    return [
        f"{module.__name__}.{name}"
        for module, names in zip(modules, before, strict=True)
        for name, value in names.items()
        if vars(module).get(name) is not value and name != "dist"  # which DeepSpeed sets itself
    ]


def test_after_an_engine_is_built_deepspeed_is_as_before():
    assert run_ranks(_substituted_rank, 1, STAGES) == [[]]


def _names(file: str, of: str) -> set[str]:
    """Attributes of the name `of`, or of super(), that a source file reads or calls, and methods that it defines."""
    tree = ast.parse((ROOT / "lowprec" / file).read_text())
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in (of, "super()")}
    return used | {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def test_every_method_of_deepspeed_that_we_override_or_call_is_fingerprinted():
    """Public ones of the engine are its interface."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    ours, engine = _names("zero_optimizer.py", "self"), _names("engine.py", "optimizer") | _names("engine.py", "zero")
    for base, names, known in (
        (DeepSpeedZeroOptimizer, ours, zero_sources.STAGES_0_TO_2),
        (DeepSpeedZeroOptimizer_Stage3, engine | _names("zero_stage3.py", "self"), zero_sources.STAGE_3),
        (DeepSpeedEngine, {n for n in _names("zero.py", "self") if n.startswith("_")}, zero_sources.ENGINE),
    ):
        theirs = {name for name in names if inspect.isfunction(getattr(base, name, None))}
        assert theirs and theirs <= known.keys() | {"backward", "zero_grad"}, (base, theirs - known.keys())
