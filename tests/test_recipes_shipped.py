"""The recipes of the literature: their sizes, their clusters, their twins and shrinks, and the table in the docs."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import recipe as recipes
from run.dry_run import dry_run
from tests.launch import ROOT, run_script, steps, tiny, train

TWINS = {
    "nvfp4_12b": "bf16_12b",
    "nvfp4_8b": "bf16_8b_hybrid",
    "nvfp4_1.2b": "bf16_1.2b",
    "mxfp8_8b": "bf16_8b",
    "mxfp8_843m": "bf16_843m",
    "fp8lm_7b": "bf16_7b",
    "fp8lm_13b": "bf16_13b",
    "fp8lm_175b": "bf16_175b",
    "mxfp4_1.3b": "bf16_1.3b",
}
BIG = [name for pair in TWINS.items() for name in pair] + ["fp8_12b"]


def gpt(vocabulary: int, hidden: int, layers: int) -> int:
    """GPT-3: tied embeddings, FFN of 4 x hidden, biases, LayerNorm."""
    return vocabulary * hidden + layers * (12 * hidden**2 + 13 * hidden) + 2 * hidden


def relu2(vocabulary: int, hidden: int, layers: int, q: int, kv: int, ffn: int) -> int:
    """Untied, no biases, RMSNorm; q and kv: width of all query, and of all key heads."""
    return 2 * vocabulary * hidden + layers * (hidden * (2 * q + 2 * kv + 2 * ffn) + 2 * hidden) + hidden


def hybrid(hidden: int, mamba: int, ffn: tuple[int, int], attention: tuple[int, int, int]) -> int:
    """Untied over 131072 words; `mamba` blocks of inner width 2 x hidden, heads of 64, 8 groups with a state of 128 and
    a convolution over 4; (blocks, width) of FFNs; (blocks, width of all query heads, of all key heads).
    """
    inner, heads, both = 2 * hidden, 2 * hidden // 64, 2 * 8 * 128
    mixer = hidden * (2 * inner + both + heads) + 5 * (inner + both) + 3 * heads + inner + inner * hidden
    (ffns, width), (attentions, q, kv) = ffn, attention
    blocks = mamba * mixer + ffns * 2 * hidden * width + attentions * hidden * (2 * q + 2 * kv)
    return 2 * 131072 * hidden + blocks + (mamba + ffns + attentions + 1) * hidden


COUNTS = {
    "nvfp4_12b": hybrid(5120, 28, (28, 20480), (6, 5120, 1024)),
    "nvfp4_8b": hybrid(4096, 24, (24, 21504), (4, 4096, 512)),
    "nvfp4_1.2b": 1_291_929_600,  # arXiv 2609.02846
    "mxfp8_8b": relu2(131072, 4096, 32, 4096, 1024, 21504),
    "mxfp8_843m": relu2(256000, 1024, 24, 1024, 1024, 4096),
    "fp8lm_7b": gpt(50304, 4096, 32),
    "fp8lm_13b": gpt(50304, 5120, 40),
    "fp8lm_175b": gpt(50304, 12288, 96),
    "mxfp4_1.3b": gpt(50304, 2048, 24),
}
# What its paper calls it. The 1.2B model is given by its exact count; FP8-LM's 7B is GPT-3's 6.7B (see the recipe), and
# the 12B hybrid has the shape of a released model of 12.3 B.
NOMINAL = {
    "nvfp4_12b": 12.3e9,
    "nvfp4_8b": 8e9,
    "mxfp8_8b": 8e9,
    "mxfp8_843m": 843e6,
    "fp8lm_7b": 6.7e9,
    "fp8lm_13b": 13e9,
    "fp8lm_175b": 175e9,
    "mxfp4_1.3b": 1.3e9,
}
TOKENS = {
    "nvfp4_12b": 1e13,
    "nvfp4_8b": 1e12,
    "nvfp4_1.2b": 1e12,
    "mxfp8_8b": 15e12,
    "mxfp8_843m": 1e12,
    "fp8lm_7b": 1e11,
    "fp8lm_13b": 1e11,
    "fp8lm_175b": 4e10,
    "mxfp4_1.3b": 20_000 * 1024 * 2048,
}


# What the counts of parameters cannot tell: query and key/value heads, width of a head, position, learning rate, betas,
# warm-up (steps, or a share), where the decay starts and what it ends at, sequences and tokens a step, first and last
# blocks in BF16, where the blends change. arXiv 2509.25149 (hybrids), 2609.02846 (1.2B), 2506.08027, 2310.18313,
# 2502.20586; what no paper says, and the rest of what a value rests on, stands beside it in the recipe.
WSD, COSINE = "wsd", "cosine"
SETTINGS = {
    "nvfp4_12b": (40, 8, 128, "none", 4.5e-4, (0.9, 0.95), (WSD, 2000, 0.2, 0.01), 736, 8192, (2, 8), [0.7, 0.9]),
    "nvfp4_8b": (32, 4, 128, "none", 8e-4, (0.9, 0.95), (WSD, 2000, 0.15, 0.01), 768, 8192, (0, 8), [0.6]),
    "nvfp4_1.2b": (16, 8, 128, "rope", 1.2e-3, (0.9, 0.95), (WSD, 2000, 0.15, 0.01), 768, 8192, (0, 4), []),
    "mxfp8_8b": (32, 8, 128, "rope", 6e-4, (0.9, 0.95), (WSD, 2000, 0.15, 0.01), 768, 8192, (0, 0), [0.6]),
    "mxfp8_843m": (16, 16, 64, "rope", 6e-4, (0.9, 0.95), (WSD, 2000, 0.15, 0.01), 768, 8192, (0, 0), []),
    "fp8lm_7b": (32, 32, 128, "rope", 3e-4, (0.9, 0.95), (COSINE, 1000, None, 0.1), 2048, 2048, (0, 0), []),
    "fp8lm_13b": (40, 40, 128, "rope", 3e-4, (0.9, 0.95), (COSINE, 1000, None, 0.1), 2048, 2048, (0, 0), []),
    "fp8lm_175b": (96, 96, 128, "rope", 3e-5, (0.9, 0.95), (COSINE, 1000, None, 0.1), 512, 2048, (0, 0), []),
    "mxfp4_1.3b": (16, 16, 128, "rope", 2e-4, (0.9, 0.999), (COSINE, 0.01, None, 0.1), 1024, 2048, (0, 0), []),
}
PATTERNS = {"nvfp4_12b": {"M": 28, "-": 28, "*": 6}, "nvfp4_8b": {"M": 24, "-": 24, "*": 4}}


MINIMAL = {"steps": 1, "global_batch": 1, "micro_batch": 1, "seq_len": 1}


@cache
def resolved(name: str, *overrides: str) -> recipes.Recipe:
    return recipes.resolve(name, overrides)


def tokens(recipe: recipes.Recipe) -> int:
    return recipe.train.steps * recipe.train.global_batch * recipe.train.seq_len


@pytest.mark.parametrize("name", TWINS)
def test_size_and_length_are_the_papers(name):
    recipe = resolved(name)
    assert recipe.model.parameter_count() == COUNTS[name]
    assert COUNTS[name] == pytest.approx(NOMINAL.get(name, COUNTS[name]), rel=0.02)
    assert 0 <= tokens(recipe) - TOKENS[name] < recipe.train.global_batch * recipe.train.seq_len


@pytest.mark.parametrize("name", TWINS)
def test_settings_are_the_papers(name):
    for low_or_high in (name, TWINS[name]):
        recipe = resolved(low_or_high)
        model, optimizer, schedule = recipe.model, recipe.optimizer, recipe.schedule
        heads = model.num_heads, model.num_kv_heads or model.num_heads, model.head_size, model.position
        decay = schedule.decay if schedule.kind == WSD else None
        rates = optimizer.lr, optimizer.betas, (schedule.kind, schedule.warmup, decay, schedule.final)
        ends = (recipe.precision.bf16_first, recipe.precision.bf16_last) if low_or_high == name else SETTINGS[name][9]
        batch = recipe.train.global_batch, recipe.train.seq_len, ends, [phase.start for phase in recipe.data.phases]
        assert (*heads, *rates, *batch) == SETTINGS[name]
        assert optimizer.weight_decay == 0.1
        assert Counter(model.pattern or "") == PATTERNS.get(name, {})


@pytest.mark.parametrize("name", BIG)
def test_first_middle_and_last_rank_of_the_cluster_can_be_built(name):
    recipe = resolved(name)
    ranks, tp, pp = recipe.parallel.ranks, recipe.parallel.tp, recipe.parallel.pp
    for rank in (0, ranks // 2, ranks - 1) if name in TWINS else (ranks - 1,):
        report = dry_run(recipe, rank=rank)
        assert f"{COUNTS.get(name) or recipe.model.parameter_count():,} parameters = " in report
        assert f"rank {rank} of {ranks}: tp {rank % tp} of {tp}, " in report
        assert f"stage {rank * pp // ranks} on pipeline rank {rank * pp // ranks}: " in report
        assert ("padded" in report) == (name == "fp8_12b")  # see that recipe


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("name", ["fp8lm_7b", "fp8lm_13b", "fp8lm_175b"])
def test_levels_of_fp8_lm_are_lines_of_its_recipes(name, level):
    line = re.search(rf"^#   {level}  (.*)$", (recipes.RECIPES / f"{name}.yaml").read_text(), re.M)
    recipe = resolved(name, *line[1].split())
    assert "precision policy fp8_lm" in dry_run(recipe)
    assert (recipe.zero.gather, recipe.gradients.payload) == ("exact", "fp8_lm")
    assert recipe.optimizer.exp_avg == ("fp32" if level == "O1" else "fp8_e4m3")


def test_the_late_switch_of_nvfp4_is_a_line_of_its_recipe():
    lines = re.findall(r"(precision\.schedule=.*\])", (recipes.RECIPES / "nvfp4_1.2b.yaml").read_text())
    assert len(lines) == 2
    both, forward = (dry_run(resolved("nvfp4_1.2b", line)) for line in lines)
    assert "from step 130336 on" in both and "fprop bf16, dgrad bf16, wgrad bf16" in both
    assert "(fprop bf16)" in forward


def _differences(a: dict, b: dict, prefix: str = ""):
    for key in a:
        if isinstance(a[key], dict):
            yield from _differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            yield prefix + key


@pytest.mark.parametrize("end", ["", "_tiny"])
@pytest.mark.parametrize("name", TWINS)
def test_a_twin_differs_in_precision_alone(name, end):
    low, high = (resolved(each + end) for each in (name, TWINS[name]))
    allowed = {f"precision.{key}" for key in ("policy", "bf16_first", "bf16_last")} | {"name", "description", "run.dir"}
    allowed |= {"gradients.payload", "gradients.accumulate", "zero.gather"}
    allowed |= {f"optimizer.{key}" for key in ("exp_avg", "exp_avg_sq", "master")}
    assert set(_differences(recipes.to_dict(low), recipes.to_dict(high))) <= allowed
    default = recipes.from_dict({"name": "x", "model": recipes.to_dict(low)["model"], "train": MINIMAL}, "x")
    for section in ("precision", "gradients"):
        assert getattr(high, section) == getattr(default, section)
    assert high.optimizer.storage == default.optimizer.storage and high.zero == default.zero


@pytest.mark.parametrize("name", TWINS)
def test_a_shrink_is_small_and_keeps_structure_policy_and_kinds_of_layout(name):
    big, small = resolved(name), resolved(f"{name}_tiny")
    assert small.model.parameter_count() < 3e6 and 2 <= small.parallel.ranks <= 4
    for key in ("activation", "norm", "position", "bias", "tied_embeddings", "qk_norm", "init"):
        assert getattr(small.model, key) == getattr(big.model, key), key
    assert small.model.q_per_kv == big.model.q_per_kv
    for key in ("tp", "pp"):
        assert (getattr(small.parallel, key) > 1) == (getattr(big.parallel, key) > 1), key
    assert small.parallel.sp == big.parallel.sp and small.parallel.schedule == big.parallel.schedule
    assert small.precision.policy == big.precision.policy and small.zero == big.zero
    assert small.gradients == big.gradients and small.optimizer.storage == big.optimizer.storage
    for end in ("bf16_first", "bf16_last"):
        share = [getattr(each.precision, end) / each.model.num_layers for each in (big, small)]
        assert share[0] == share[1], end
    assert (small.model.pattern is None) == (big.model.pattern is None)
    if big.model.pattern is not None:
        share = [Counter(each.model.pattern)[kind] / each.model.num_layers for kind in "M*-" for each in (big, small)]
        assert share[::2] == share[1::2]
    assert len(small.data.phases) == len(big.data.phases)
    assert small.data.train and not small.problems(small.parallel.ranks)


# (GEMM, elements of its operands) that a receipt must show
RUNS = {
    "nvfp4_12b": [("fprop", "e2m1", "e2m1"), ("dgrad", "e2m1", "e2m1"), ("wgrad", "e2m1", "e2m1")],
    "nvfp4_8b": [("fprop", "e2m1", "e2m1"), ("dgrad", "e2m1", "e2m1"), ("wgrad", "e2m1", "e2m1")],
    "nvfp4_1.2b": [("fprop", "e2m1", "e2m1"), ("dgrad", "e2m1", "e2m1"), ("wgrad", "e2m1", "e2m1")],
    "mxfp8_8b": [("fprop", "e4m3", "e4m3"), ("dgrad", "e4m3", "e4m3"), ("wgrad", "e4m3", "e4m3")],
    "mxfp8_843m": [("fprop", "e4m3", "e4m3"), ("dgrad", "e4m3", "e4m3"), ("wgrad", "e4m3", "e4m3")],
    "fp8lm_7b": [("fprop", "e4m3", "e4m3"), ("dgrad", "e5m2", "e4m3"), ("wgrad", "e5m2", "e4m3")],
    "fp8lm_13b": [("fprop", "e4m3", "e4m3"), ("dgrad", "e5m2", "e4m3"), ("wgrad", "e5m2", "e4m3")],
    "fp8lm_175b": [("fprop", "e4m3", "e4m3"), ("dgrad", "e5m2", "e4m3"), ("wgrad", "e5m2", "e4m3")],
    "mxfp4_1.3b": [("fprop", "high", "high"), ("dgrad", "e2m1", "e2m1"), ("wgrad", "e2m1", "e2m1")],
}


def run_and_resume(tmp_path, name: str) -> Path:
    """20 steps of a shrink on its own layout; a smaller text than the shipped one, which takes longer to prepare."""
    tiny(tmp_path)  # for its corpus
    recipe, corpus, run = resolved(f"{name}_tiny"), str(tmp_path / "corpus.txt"), tmp_path / "run"
    parallel = recipe.parallel
    replicas = parallel.ranks // (parallel.tp * parallel.pp)
    micro_batches = parallel.pp if recipe.model.pattern else 2  # hybrids take long, and need no more than a pipeline
    keys = [
        "train.steps=20",
        f"train.global_batch={recipe.train.micro_batch * replicas * micro_batches}",
        "train.seq_len=64",
        "train.compile=false",
        "model.vocab_size=320",
        "eval.interval=0",
        "checkpoint.interval=10",
    ]
    keys += [f"run.dir={run}", f"data.cache={tmp_path / 'cache'}", f"data.train={corpus}", "data.documents=line"]
    if recipe.data.phases:
        keys += [f"data.phases=[{{start: 0.6, train: {corpus}}}]"]
    for stop, code in (("train.stop_at=10", 75), ("train.stop_at=null", 0)):
        done = train(recipe.name, *keys, stop, ranks=parallel.ranks)
        assert done.returncode == code, done.stderr
    losses = [record["loss"] for record in steps(run)]
    assert len(losses) == 20 and sum(losses[-3:]) < sum(losses[:3])
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS.values())
def test_every_twin_of_a_shrink_trains_and_resumes(tmp_path, name):
    run_and_resume(tmp_path, name)


# Two that take longest; the hybrid with pipelines and the other sizes of FP8-LM have all that is in them.
LONG = ("nvfp4_8b", "fp8lm_13b")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in RUNS])
def test_every_shrink_trains_resumes_and_runs_in_its_formats(tmp_path, name):
    run = run_and_resume(tmp_path, name)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    receipts = [record["gemms"] for record in records if record["kind"] == "receipt"]
    assert len(receipts) == 2
    for gemms in receipts:
        found = {(words[0], words[1], words[words.index("x") + 1]) for words in map(str.split, gemms)}
        assert found == set(RUNS[name])
    memory = next(record for record in records if record["kind"] == "memory")["bytes"]
    if name.startswith("fp8lm"):
        assert memory["exp_avg_sq"] > 1.5 * memory["exp_avg"] and memory["master"] < 1.1 * memory["exp_avg_sq"]


def test_the_list_has_every_recipe():
    shown = run_script(str(ROOT / "train.py"), "--list")
    assert shown.returncode == 0 and "Traceback" not in shown.stderr
    names = [line.split()[0] for line in shown.stdout.splitlines()]
    assert names == [name for name, _ in recipes.names()] and {"quickstart", *TWINS} <= set(names)
    assert all(len(line.split(maxsplit=1)) == 2 for line in shown.stdout.splitlines()), "a line each says what it is"


def test_a_run_without_the_users_data_says_so(tmp_path):
    refused = train("bf16_1.2b", f"run.dir={tmp_path / 'run'}")
    assert refused.returncode == 2 and "data.train is null: this recipe is for data of your own" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "run").exists()


def row(recipe: recipes.Recipe) -> str:
    """The beginning of a recipe's line in docs/recipes.md: what follows from the recipe."""
    parallel, length = recipe.parallel, tokens(recipe)
    cluster = [f"{parallel.ranks or 'any'}", f"tp {parallel.tp}", f"pp {parallel.pp}"] + ["sp"] * parallel.sp
    cluster += [f"ZeRO {recipe.zero.stage}", f"micro-batch {recipe.train.micro_batch}", recipe.model.recompute]
    return f"| `{recipe.name}` | {recipe.model.parameter_count():,} | {length:,} | {', '.join(cluster)} |"


def test_the_table_of_recipes_is_that_of_the_recipes():
    text = (Path(ROOT) / "docs/recipes.md").read_text()
    names = [name for name, _ in recipes.names()]
    wanted = [row(resolved(name)) for name in names]
    assert not [line for line in wanted if line not in text]
    assert sorted(re.findall(r"^\| `(\S+)` \| [\d,]+ \|", text, re.M)) == sorted(names)
