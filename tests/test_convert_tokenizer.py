"""The exported tokenizer gives the ids of the SentencePiece model, in transformers, on text that differs easily."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.tokenizer import build_tokenizer, read_model, write_tokenizer
from data.tokenizer import train_sentencepiece
from errors import UsageError

transformers = pytest.importorskip("transformers")

# English and code with indentation, always at hand; then what a Python module lacks.
TEXT = Path(argparse.__file__).read_text(encoding="utf-8").splitlines()[:1500]
TEXT += ["caf\u00e9 na\u00efve \u4e2d\u6587", "tab\tinside"] * 5
WORDS = "the argument parser's usage: --help %(prog)s self._actions 1789 state, \u00e9 \u4e2d \U0001f600 z".split()
HARD = [
    "the state of\nthe union\n\n  people   of  \t congress\r\n",
    "\u4e2d\u6587 unseen \u65e5\u672c \U0001f600 caf\u00e9 cafe\u0301 \ufb01\uff21\u00a0x",
    "1789-1790, 3.14; can'tcan't U.S.U.S. thethethe",
    " ",
    "\n",
    "",
    "x",
    "  x  ",
]


def train(path: Path, **options) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, minloglevel=2, num_threads=1, **options
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def assert_same(processor: sentencepiece.SentencePieceProcessor, ids: list[int], text: str) -> None:
    """The same ids; or, in a unigram model, the same pieces in another order, which are as probable."""
    want = processor.encode(text)
    if ids != want:
        assert processor.get_score(want[0]) % 1 != 0, f"{text!r}: a BPE model's scores are whole numbers"
        assert sorted(ids) == sorted(want) and processor.decode(ids) == processor.decode(want), text


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def ours(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(TEXT, path, request.param, 700)
    return path


def test_transformers_gives_the_same_ids_and_text(ours, tmp_path):
    ids = write_tokenizer(tmp_path, ours, seq_len=128)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(ours))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*HARD, *TEXT]:
        assert_same(processor, tokenizer(text).input_ids, text)
        assert tokenizer.decode(processor.encode(text)) == text
    assert (tmp_path / "tokenizer.model").read_bytes() == ours.read_bytes()
    assert tokenizer.eos_token_id == ids["eos_token_id"] == processor.eos_id()
    assert tokenizer.bos_token_id == ids["bos_token_id"] == processor.bos_id()
    assert len(tokenizer) == processor.vocab_size() and tokenizer.model_max_length == 128


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", "\t"])).map("".join))
def test_any_text_has_the_same_ids(ours, text):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(ours))
    assert_same(processor, build_tokenizer(read_model(ours.read_bytes())).encode(text).ids, text)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
        {
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "user_defined_symbols": ["\n", "<tool>"],
        },
        {"pad_id": 3, "bos_id": -1, "byte_fallback": True, "normalization_rule_name": "nfkc"},
    ],
)
def test_models_trained_elsewhere(model_type, options, tmp_path):
    path = tmp_path / "given.model"
    processor = train(path, model_type=model_type, vocab_size=600, **options)
    tokenizer = build_tokenizer(read_model(path.read_bytes()))
    for text in [*HARD, *TEXT, "a<tool>state"]:
        assert_same(processor, tokenizer.encode(text).ids, text)


def test_models_without_an_equivalent_are_refused(tmp_path):
    for model_type in ("char", "word"):
        train(tmp_path / "m.model", model_type=model_type, hard_vocab_limit=False, vocab_size=120)
        with pytest.raises(UsageError, match="BPE and unigram"):
            write_tokenizer(tmp_path, tmp_path / "m.model", 8)
    train(tmp_path / "m.model", treat_whitespace_as_suffix=True, vocab_size=120, hard_vocab_limit=False)
    with pytest.raises(UsageError, match="suffix"):
        write_tokenizer(tmp_path, tmp_path / "m.model", 8)


def test_tokenizer_json_is_copied(ours, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    write_tokenizer(first, ours, 8)
    ids = write_tokenizer(second, first / "tokenizer.json", 8)
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(second)
    assert tokenizer.eos_token == "</s>" and tokenizer.eos_token_id == ids["eos_token_id"] == 2
