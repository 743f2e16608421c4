"""`--dry-run`: shapes, groups and sizes as a real run would have them, and every violation at once."""

from __future__ import annotations

import json
import re

import pytest

import recipe as recipes
from errors import UsageError
from run.dry_run import dry_run
from tests.launch import tiny, train
from tests.layout_case import BASE, Case
from tests.spawn import run_ranks


def _report(name: str, *overrides: str, world_size: int | None = None, rank: int = 0) -> str:
    return dry_run(recipes.resolve(name, overrides), world_size, rank)


def _refusal(name: str, *overrides: str, world_size: int | None = None) -> list[str]:
    with pytest.raises(UsageError) as error:
        _report(name, *overrides, world_size=world_size)
    return str(error.value).splitlines()


def test_what_a_rank_of_175_billion_parameters_holds():
    """Rank 77 of 128 = tp 8 x dp 4 x pp 4: tp 5, dp 77 // 8 % 4 = 1, pp 77 // 32 = 2."""
    report = _report("fp8lm_175b", rank=77)
    assert "rank 77 of 128: tp 5 of 8, dp 1 of 4, pp 2 of 4" in report
    assert "tensor group of 8: 72, 73, 74, 75, 76, 77, 78, 79" in report
    assert "data group of 4: 69, 77, 85, 93" in report
    assert "pipeline group of 4: 13, 45, 77, 109" in report
    assert "128 micro-batches a step of 1 x 2,048 tokens" in report
    counts = [int(n) for n in re.findall(r"stage \d on pipeline rank \d: .*?(\d+) blocks", report)]
    assert len(counts) == 4 and sum(counts) == 96
    assert re.search(r"layers\.\{\d+-\d+\}\.attention\.qkv\.weight \[4608, 12288\] of \[96, 3, 128, 12288\]", report)
    assert re.search(r"layers\.\{\d+-\d+\}\.mlp\.down\.weight \[12288, 6144\] of \[12288, 49152\]", report)
    block = 12 * 12288**2 // 8 + (3 + 4) * 12288 // 8 + 6 * 12288  # matrices; split biases; whole ones and norms
    assert f"{counts[2] * block:,} parameters on this rank" in report
    held = int(re.search(r"ZeRO stage 1: states of ([\d,]+) elements", report)[1].replace(",", ""))
    fillers = 4 * 2 * 256 + 256 * sum(1 for _ in range(counts[2] * 12))
    assert 0 <= 4 * held - counts[2] * block <= fillers
    assert "e5m2" in report and "layers.{0-95}.attention.qkv" in report


def test_the_world_is_that_of_the_recipe_unless_it_is_said():
    assert "rank 0 of 64: " in _report("nvfp4_1.2b")
    assert "rank 3 of 4: tp 0 of 1, dp 3 of 4" in _report("nvfp4_1.2b", world_size=4, rank=3)
    assert "rank 0 of 1: " in _report("quickstart")
    for world_size, rank in ((4, 4), (4, -1), (0, 0)):
        with pytest.raises(UsageError, match=f"--rank {rank} of --world-size {world_size}"):
            _report("quickstart", world_size=world_size, rank=rank)


def test_everything_that_is_wrong_is_listed_at_once():
    """Layout, batch and storage; and the precision of the undivided model, which needs no layout."""
    keys = ("parallel.tp=16", "model.vocab_size=50310", "zero.stage=2", "zero.gather=exact", "precision.bf16_last=99")
    lines = _refusal("fp8lm_175b", *keys, "parallel.pp=2", "schedule.warmup=1e6", world_size=64)
    for words in (
        "model.vocab_size 50310 is not divisible by parallel.tp 16",
        "zero.stage 2 with parallel.pp 2",
        "schedule.warmup (1000000 steps)",
        "bf16_last 99 exceed the model's 96 blocks",
    ):
        assert any(words in line for line in lines), (words, lines)
    several = _refusal("fp8lm_175b", "train.steps=0", "optimizer.lr=-1", "precision.bf16_last=-1")
    assert len(several) == 4


def test_shapes_that_cannot_be_quantized_after_the_split_are_listed_with_states_that_cannot_be_cut():
    lines = _refusal(
        "bf16_125m", "parallel.tp=4", "precision.policy=fp8_block", "optimizer.exp_avg=linear4_rank1", world_size=4
    )
    blocks = [line for line in lines if "blocks of 128 features" in line]
    assert any("layers.{0-11}.attention.qkv: fprop.b" in line and "ends at 576" in line for line in blocks)
    assert any("layers.{0-11}.attention.out: fprop.a" in line and "ends at 192" in line for line in blocks)
    assert any("whole rows and columns" in line for line in lines)
    assert not any("mlp" in line for line in blocks)  # 3072 / 4 = 6 x 128


def test_slices_of_stage_3_that_cut_blocks_of_states_are_listed():
    recipe = recipes.resolve("adam4bit_10m", ("zero.stage=3", "train.global_batch=24"))
    with pytest.raises(UsageError, match="2097152 elements in equal slices on 3 ranks cut blocks of 256"):
        dry_run(recipe, world_size=3)
    assert "rank 0 of 1" in dry_run(recipe, world_size=1)


def test_matrices_that_are_padded_are_named():
    keys = ("precision.policy=mxfp8", "model.hidden_size=720", "model.head_dim=60", "train.micro_batch=1")
    report = _report("bf16_125m", *keys, "train.seq_len=2050")
    assert "x [2050, 720] of attention.qkv (fprop.a, blocks [1, 32])" in report
    assert "dy [2050, 2160] of attention.qkv (wgrad.a, blocks [32, 1])" in report
    assert "padded" not in _report("bf16_125m", "precision.policy=mxfp8")


def test_the_command_writes_nothing_and_needs_no_data(tmp_path):
    run = tmp_path / "run"
    shown = train("mxfp8_8b", "--dry-run", "--rank", "255", f"run.dir={run}")
    assert shown.returncode == 0, shown.stderr
    assert "rank 255 of 256: tp 1 of 2" in shown.stdout and "data from step 1,430,512 on: yours" in shown.stdout
    refused = train("mxfp8_8b", "--dry-run", "--world-size=3", f"run.dir={run}")
    assert refused.returncode == 2 and "does not divide 3 processes" in refused.stderr
    assert "Traceback" not in refused.stderr and not run.exists()
    for stray, words in ((("--rank=1",), "are for --dry-run"), (("--dry-run", "--resume=never"), "resumes nothing")):
        refused = train(tiny(tmp_path), *stray)
        assert refused.returncode == 2 and words in refused.stderr and not run.exists()


def _held(rank: int, overrides: tuple[str, ...]) -> tuple[int, int]:
    """Elements of this rank's partition as DeepSpeed made it, and of its parameters."""
    case = Case(overrides, fill=False)
    engine = case.local.engine
    optimizer = engine._engine.optimizer
    flat = optimizer.fp32_partitioned_groups_flat if case.recipe.zero.stage == 3 else None
    made = sum(map(int, optimizer.partition_size)) if flat is None else sum(part.numel() for part in flat)
    return made, engine.parameters


@pytest.mark.parametrize(
    "overrides",
    [
        ("zero.stage=0",),
        ("zero.stage=2", "model.bias=true"),
        pytest.param(("zero.stage=3",), marks=pytest.mark.slow),
        ("parallel.tp=2", "parallel.pp=2", "parallel.schedule=zbv", "precision.policy=mxfp8", "model.hidden_size=64"),
    ],
)
def test_a_dry_run_shows_what_an_engine_of_that_layout_holds(tmp_path, overrides):
    tree = BASE
    for assignment in overrides:
        tree = recipes.override(tree, assignment)
    (tmp_path / "case.yaml").write_text(json.dumps(tree))
    for rank, (made, parameters) in enumerate(run_ranks(_held, 4, overrides)):
        report = _report(str(tmp_path / "case.yaml"), world_size=4, rank=rank)
        assert f" of {made:,} elements here" in report
        assert f"{parameters:,} parameters on this rank" in report
