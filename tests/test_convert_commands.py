"""From a run's checkpoint to a directory that transformers loads with its tokenizer, through the command line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from convert import to_hf
from data.tokenizer import train_sentencepiece
from model.config import ModelConfig
from model.init import initial_values, initialize
from model.transformer import Transformer
from model.weights import logical_shape, parameter_shapes
from parallel.checkpoint import save
from tests.checkpoint_case import Piece

transformers = pytest.importorskip("transformers")

CONFIG = ModelConfig(vocab_size=400, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=48)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with FP32 masters after steps 1 and 2 (seeds 1 and 2) and a BPE tokenizer."""
    meta = {"recipe": {"model": dataclasses.asdict(CONFIG), "train": {"seq_len": 64}}}
    for step in (1, 2):
        fragments = [
            Piece(
                name,
                logical_shape(CONFIG, name, shape),
                0,
                {"weight": initial_values(CONFIG, step, name, shape).flatten()},
            )
            for name, shape in parameter_shapes(CONFIG).items()
        ]
        save(tmp_path / "run", step, fragments, meta)
    text = Path(argparse.__file__).read_text(encoding="utf-8").splitlines()
    train_sentencepiece(text, tmp_path / "run/tokenizer.model", "bpe", 400)
    return tmp_path / "run"


@torch.no_grad()
@pytest.mark.parametrize(("options", "seed"), [([], 2), (["--step", "1"], 1)])
def test_exported_run(run, tmp_path, options, seed):
    assert to_hf.main([str(run), str(tmp_path / "hf"), "--dtype", "fp32", *options]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = tokenizer("def the_parser(self):\n    return  self\n", return_tensors="pt").input_ids
    model = Transformer(dataclasses.replace(CONFIG, dtype="fp32"))
    initialize(model, seed)
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=0)
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == 2
    theirs.generate(tokens, max_new_tokens=3, do_sample=False)


def test_default_dtype_is_the_models_and_the_tokenizer_can_be_left_out(run, tmp_path, capsys):
    (run / "tokenizer.model").unlink()
    assert to_hf.main([str(run), str(tmp_path / "hf")]) == 2
    assert "--tokenizer" in capsys.readouterr().err and not (tmp_path / "hf").exists()
    assert to_hf.main([str(run), str(tmp_path / "hf"), "--tokenizer", "none"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    want = initial_values(CONFIG, 2, "embedding.weight", (400, 32)).bfloat16()
    assert torch.equal(theirs.model.embed_tokens.weight, want)
    assert not (tmp_path / "hf/tokenizer.json").exists()


def test_a_step_that_is_not_kept_is_named(run, tmp_path, capsys):
    assert to_hf.main([str(run), str(tmp_path / "hf"), "--step", "7"]) == 2
    assert "step-00000007" in capsys.readouterr().err
