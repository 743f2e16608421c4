"""Tokenizers: lossless round trips, determinism, and word-wise encoding equal to SentencePiece's
own."""

from __future__ import annotations

import io
import random
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import read_texts
from data.tokenizer import load_tokenizer, sentences, train_sentencepiece
from data.words import is_separable
from errors import DataError, UsageError

CORPUS = Path(__file__).resolve().parent.parent / "data/corpus/sotu.jsonl.xz"
WORDS = ["the", "of", "and", "to", "in", "a", "that", "for", "it", "Government", "States", "1790"]


def prose(count: int) -> list[str]:
    """The first sentences of the shipped corpus, up to 2048 characters each."""
    return list(islice(sentences(read_texts([CORPUS], "file", "text")), count))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("bpe", "unigram"):
        train_sentencepiece(prose(40), folder / f"{kind}.model", kind, 500)
    return {kind: folder / f"{kind}.model" for kind in ("bpe", "unigram")}


ODD = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=40) | st.lists(
    st.sampled_from([*WORDS, " ", "  ", "\n", "\r\n", "\t", "\0", "</s>", "<s>", "<unk>", "<0x0A>", "é", "😀"])
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=ODD)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_round_trip_and_same_ids_as_sentencepiece(models, kind, text):
    tokenizer = load_tokenizer(models[kind])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == sentencepiece.SentencePieceProcessor(model_file=str(models[kind])).encode(text)
    assert tokenizer.eod_id == 2 and 2 not in ids
    assert tokenizer.vocab_size == 500 and all(0 <= i < 500 for i in ids)


OTHER_MODELS = {
    "crossing": {"split_by_whitespace": False},
    "suffix": {"treat_whitespace_as_suffix": True},
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "no_prefix": {"add_dummy_prefix": False},
    "no_bytes": {"byte_fallback": False},
    "defined": {"user_defined_symbols": ["of the", "th", "\n"]},
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_word_wise_encoding_is_exact_for_other_peoples_models(tmp_path, name):
    model, options = io.BytesIO(), {"byte_fallback": True, "vocab_size": 500, **OTHER_MODELS[name]}
    if name == "no_bytes":
        options["vocab_size"] = 200
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose(40)),
        model_writer=model,
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    path = tmp_path / "m.model"
    path.write_bytes(model.getvalue())
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = load_tokenizer(path)
    rng = random.Random(1)
    pool = [
        *WORDS,
        " ",
        "  ",
        "\n",
        "ﬁ",
        "①",
        "e\u0301",
        " \u0301",
        "\u3000",
        "\u2581",
        "日本",
        "x" * 100,
    ]
    for _ in range(300):
        text = rng.choice(["", " "]).join(rng.choices(pool, k=rng.randrange(20)))
        assert ours.encode(text) == own.encode(text), text
    assert is_separable(own) == (name not in ("crossing", "suffix"))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(models, kind, tmp_path):
    train_sentencepiece(iter(prose(40)), tmp_path / "again.model", kind, 500)
    assert (tmp_path / "again.model").read_bytes() == models[kind].read_bytes()


@given(st.text(st.sampled_from("ab \n\u3000"), max_size=9000))
@settings(max_examples=20, deadline=None)
def test_no_sentence_is_too_long_and_no_text_is_lost(text):
    cut = list(sentences([text]))
    assert all(0 < len(piece) <= 2048 for piece in cut)
    assert "".join(cut).replace("\n", "") == text.replace("\n", "")


def test_a_line_without_spaces_is_learnt_too(tmp_path):
    train_sentencepiece(["ab" * 20_000], tmp_path / "m.model", "bpe", 265)
    assert len(load_tokenizer(tmp_path / "m.model").encode("ab" * 8)) < 8


def test_training_errors(tmp_path):
    with pytest.raises(DataError, match="corpus is empty"):
        train_sentencepiece([], tmp_path / "m.model", "bpe", 300)
    for size in (20, 50_000):
        with pytest.raises(UsageError, match=rf"{size} pieces .*ocabulary size"):
            train_sentencepiece(prose(5), tmp_path / "m.model", "bpe", size)
    assert not list(tmp_path.iterdir())


def test_hugging_face_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    model.train_from_iterator(prose(5), trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (400, 1)
    text = "of that\n\n  é😀"
    assert 1 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert load_tokenizer(tmp_path / "tokenizer.json", "<pad>").eod_id == 0
    with pytest.raises(DataError, match="no token <none> .*--eod-token"):
        load_tokenizer(tmp_path / "tokenizer.json", "<none>")


def test_what_is_no_tokenizer(tmp_path, models):
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "no.model")
    for name in ("junk.model", "junk.json"):
        (tmp_path / name).write_text("junk")
        with pytest.raises(DataError, match=f"{name} is not a"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "vocab.txt").write_text("junk")
    with pytest.raises(UsageError, match="expected a SentencePiece"):
        load_tokenizer(tmp_path / "vocab.txt")
    with pytest.raises(DataError, match="no piece <none>"):
        load_tokenizer(models["bpe"], "<none>")
