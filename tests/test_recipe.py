"""Recipes: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import recipe as recipes
from errors import UsageError

MINIMAL = """
model: {vocab_size: 64, hidden_size: 32, num_layers: 1, num_heads: 2, ffn_size: 64}
train: {steps: 4, global_batch: 8, micro_batch: 2, seq_len: 16}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "mine.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def _refusal(*args, **kwargs) -> str:
    with pytest.raises(UsageError) as error:
        recipes.load(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e8", 1e8),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-2", -2),
        ("1_000", 1000),
        ("010", 10),
        ("true", True),
        ("off", "off"),
        ("yes", "yes"),
        ("True", "True"),
        ("2.20.2", "2.20.2"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("null", None),
        ("~", None),
    ],
)
def test_scalars_are_yaml_1_2(text, value):
    loaded = recipes.load_yaml(text, "test")
    assert loaded == value and type(loaded) is type(value)


@pytest.mark.parametrize("text", ["a: 1\na: 2", "{a: 1, a: 2}", "1: 2", "a: {b: 1, b: 1}"])
def test_duplicate_and_non_string_keys_are_errors(text):
    with pytest.raises(UsageError, match="line 1|line 2"):
        recipes.load_yaml(text, "test")


def test_every_shipped_recipe_loads_and_has_a_line():
    for name, description in recipes.names():
        world_size = recipes.resolve(name).parallel.ranks or 2
        assert recipes.load(name, world_size=world_size).name == name
        assert description and "\n" not in description


def test_resolved_recipe_is_the_same_recipe(write):
    loaded = recipes.load("quickstart", ("optimizer.lr=1e-3", "train.stop_at=5"))
    again = recipes.load(write(recipes.to_yaml(loaded), "resolved.yaml"))
    assert again == loaded and again.name == "quickstart" and again.run.dir == "runs/quickstart"
    assert again.optimizer.lr == 1e-3 and again.train.stop_at == 5


def test_resolved_recipe_spells_out_every_key():
    tree = yaml.safe_load(recipes.to_yaml(recipes.load("quickstart")))
    for section in ("train", "optimizer", "schedule", "zero", "checkpoint", "eval", "model", "data", "metrics"):
        assert tree[section].keys() == recipes.to_dict(recipes.load("quickstart"))[section].keys()
    assert tree["zero"]["stage"] == 1 and tree["optimizer"]["betas"] == [0.9, 0.95]


def test_base_merges_maps_and_replaces_the_rest(write):
    write(MINIMAL + "optimizer: {lr: 1.0, betas: [0.1, 0.2]}\n", "base.yaml")
    loaded = recipes.load(write("base: base.yaml\noptimizer: {betas: [0.5, 0.6]}\n"))
    assert loaded.optimizer.lr == 1.0 and loaded.optimizer.betas == (0.5, 0.6)


def test_base_that_leads_back_is_an_error(write):
    write("base: b.yaml\n", "a.yaml")
    assert "leads back to itself" in _refusal(write("base: a.yaml\n", "b.yaml"))


@pytest.mark.parametrize("spelling", ["train.steps=7", "--train.steps=7"])
def test_overrides_win(write, spelling):
    assert recipes.load(write(MINIMAL + "base: null\n"), (spelling,)).train.steps == 7


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.norm_eps=1e400", ["model.norm_eps is inf", "finite"]),
        ("train.stpes=3", ["unknown key train.stpes", "did you mean train.steps?"]),
        ("train.lr=3", ["unknown key train.lr", "did you mean optimizer.lr?"]),
        ("traim.steps=3", ["unknown key traim", "did you mean train?"]),
        ("train.steps=3.5", ["train.steps is 3.5"]),
        ("train.steps='3'", ["train.steps is '3'"]),
        ("train.steps=true", ["train.steps is True"]),
        ("parallel.sp=1", ["parallel.sp is 1"]),
        ("train=3", ["train is 3"]),
        ("zero.stage=4", ["zero.stage is 4"]),
        ("model.activation=silu", ["model.activation is 'silu'", "swiglu"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas"]),
        ("optimizer.betas=[0.9, 1.5]", ["optimizer.betas is [0.9, 1.5]", "[0, 1)"]),
        ("train.global_batch=9", ["9", "not divisible", "train.micro_batch 2"]),
        ("train.stop_at=9", ["train.stop_at is 9", "train.steps (4)"]),
        ("model.num_kv_heads=3", ["num_heads 2 is not divisible by num_kv_heads 3"]),
        ("parallel.tp=2", ["parallel.tp x parallel.pp = 2 x 1", "1 processes", "multiple of 2"]),
        ("parallel.ep=2", ["parallel.ep is 2", "only 1 is built"]),
        ("parallel.sp=true", ["parallel.sp is true", "parallel.tp 1"]),
        ("parallel.stages_per_rank=2", ["parallel.stages_per_rank is 2", "parallel.pp 1"]),
        ("data.validation=0.9", ["data.validation"]),
        ("schedule.warmup=100", ["schedule.warmup (100 steps)", "train.steps (4)"]),
        ("data.phases=[{start: 3, train: a}, {start: 2, train: b}]", ["data.phases begin at steps [3, 2]"]),
        ("data.phases=[{start: 4, train: a}]", ["data.phases begin at steps [4]", "before train.steps (4)"]),
        ("data.phases=[{tokens: 0, train: a}]", ["data.phases begin at steps [0]", "the first after 0"]),
        ("data.phases=[{start: 2, train: a, stop: 3}]", ["unknown key data.phases[0].stop"]),
        ("parallel.ranks=0", ["parallel.ranks is 0"]),
        ("checkpoint.keep=0", ["checkpoint.keep is 0"]),
        ("eval.bigram=true", ["eval.bigram is true", "eval.interval"]),
    ],
)
def test_refusals_name_key_value_and_way_out(write, override, words):
    message = _refusal(write(MINIMAL), (override,))
    for word in words:
        assert word in message


def test_all_problems_are_listed_at_once(write):
    message = _refusal(write(MINIMAL), ("optimizer.lr=-1", "train.steps=0", "optimizer.clip=-1"))
    assert message.count("\n") >= 3


def test_batch_must_divide_over_ranks(write):
    path = write(MINIMAL)
    assert recipes.load(path, world_size=4).train.global_batch == 8
    message = _refusal(path, world_size=3)
    assert "8" in message and "2 x 3" in message


def test_missing_sections_are_named(write):
    message = _refusal(write("train: {steps: 1}\n"))
    assert "model is missing" in message and "train.seq_len is missing" in message


def test_unknown_recipe_suggests_the_nearest():
    assert "did you mean quickstart?" in _refusal("quickstrat")


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_override_is_accepted_or_refused_with_a_message(key, value):
    try:
        recipes.from_dict(recipes.override({"name": "x"} | recipes.load_yaml(MINIMAL, "t"), f"{key}={value}"), "t")
    except UsageError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("ranks", "overrides", "words"),
    [
        (2, "parallel.tp=2 model.ffn_size=63", ["model.ffn_size 63", "parallel.tp 2"]),
        (2, "parallel.tp=2 model.pattern=M model.mamba.groups=1", ["model.mamba.groups 1", "parallel.tp 2"]),
        (2, "parallel.tp=2 model.vocab_size=65", ["model.vocab_size 65", "parallel.tp 2"]),
        (2, "parallel.tp=2 parallel.sp=true train.seq_len=15", ["train.seq_len 15", "parallel.tp 2"]),
        (4, "parallel.tp=4 model.num_heads=12 model.num_kv_heads=3 model.head_dim=4", ["num_kv_heads 3", "tp 4"]),
        (2, "parallel.pp=2", ["2 stages of 1 blocks"]),
        (2, "parallel.pp=2 model.num_layers=4 parallel.stage_layers=[1,2]", ["stage_layers has 3 blocks", "model 4"]),
        (2, "parallel.pp=2 parallel.stage_layers=[1]", ["stage_layers names 1 stages", "there are 2"]),
        (2, "parallel.pp=2 parallel.schedule=zbv parallel.stages_per_rank=3", ["stages_per_rank is 3", "zbv has 2"]),
        (
            2,
            "parallel.pp=2 parallel.schedule=zbv model.num_layers=4 train.micro_batch=4",
            ["zbv", "2 micro-batches", "at least 4"],
        ),
        (
            3,
            "parallel.pp=3 parallel.schedule=interleaved_1f1b model.num_layers=6",
            ["interleaved_1f1b", "a multiple of pp, 3"],
        ),
        (2, "parallel.pp=2 model.num_layers=4 zero.stage=2", ["zero.stage 2", "parallel.pp 2", "0 or 1"]),
    ],
)
def test_layouts_that_cannot_be_are_refused(write, ranks, overrides, words):
    message = _refusal(write(MINIMAL), tuple(overrides.split()), world_size=ranks)
    for word in words:
        assert word in message


@pytest.mark.parametrize("stage", ["false", "true", "4"])
def test_a_stage_is_a_number_that_zero_has(stage):
    with pytest.raises(UsageError, match="zero.stage is"):
        recipes.load("quickstart", (f"zero.stage={stage}",))
