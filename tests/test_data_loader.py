"""Streams: packing, the one global order, blends, splits, resets; and every fault that opening data
can meet."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataPhase
from data.indexed import IndexedWriter
from data.loader import DataConfig, open_data, split_documents
from data.prepare import PrepareOptions, prepare
from errors import DataError, UsageError

EOD = 0


def corpus(prefix: Path, lengths: list[int], first: int = 1) -> list[list[int]]:
    """Documents of distinct counting tokens, each ended by EOD; lengths include it."""
    documents, token = [], first
    with IndexedWriter(prefix, np.dtype("<i4")) as writer:
        for length in lengths:
            documents.append([*range(token, token + length - 1), EOD][:length])
            token += length
            writer.add(np.array(documents[-1], np.int32), np.array([length]))
    return documents


def stream(prefix: Path | tuple, seq_len: int, *, seed: int = 0, validation=None, reset: bool = False):
    train = str(prefix) if isinstance(prefix, Path) else tuple(str(x) if isinstance(x, Path) else x for x in prefix)
    folder = (prefix if isinstance(prefix, Path) else prefix[1]).parent
    config = DataConfig(
        train=train,
        validation=validation,
        tokenizer=None,
        cache=str(folder / "cache"),
        reset_at_document=reset,
    )
    assert config.problems() == []
    return open_data(config, vocab_size=100_000, seq_len=seq_len, seed=seed)


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(lambda lengths: sum(lengths) > 12)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 10), seed=st.integers(0, 3))
def test_an_epoch_is_the_documents_back_to_back(tmp_path_factory, lengths, seq_len, seed):
    """Undo the shuffle of samples by brute force: chained by their shared token they spell whole
    documents."""
    prefix = tmp_path_factory.mktemp("x") / "x"
    documents = corpus(prefix, lengths)
    train = stream(prefix, seq_len, seed=seed).train
    count = (sum(lengths) - 1) // seq_len
    assert train.num_samples == count
    for epoch in (0, 1):
        samples = [train.sample(epoch * count + i).tolist() for i in range(count)]
        assert all(len(sample) == seq_len + 1 for sample in samples)
        line = train._parts[0]._epoch(epoch)
        ordered = [samples[i] for i in np.argsort(line.samples)]
        tokens = ordered[0][:1] + [token for sample in ordered for token in sample[1:]]
        assert all(a[-1] == b[0] for a, b in zip(ordered, ordered[1:], strict=False))
        shuffled, left = [], [document for document in documents if document]
        rest = tokens
        while rest:  # each document once; the last one may be cut
            match = next(d for d in left if d[: len(rest)] == rest[: len(d)] and (d[0] == rest[0]))
            left.remove(match)
            shuffled.append(match)
            rest = rest[len(match) :]
        assert sum(shuffled, [])[: len(tokens)] == tokens


def test_order_depends_on_seed_and_epoch_and_nothing_else(tmp_path):
    corpus(tmp_path / "x", [7] * 60)
    one, same, other = (stream(tmp_path / "x", 5, seed=seed).train for seed in (1, 1, 2))
    count = one.num_samples
    orders = [[tuple(s.sample(i)) for i in range(2 * count)] for s in (one, same, other)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:count] != orders[0][count:]
    assert tuple(one.sample(10**9)) == tuple(same.sample(10**9))


@pytest.mark.parametrize("reset", [False, True])
def test_any_sharding_and_any_resume_give_the_global_order(tmp_path, reset):
    corpus(tmp_path / "a", [5, 9, 2, 30] * 5)
    corpus(tmp_path / "b", [11] * 9, first=5000)
    train = stream((0.6, tmp_path / "a", 0.4, tmp_path / "b"), 8, reset=reset).train
    whole = [train.sample(i).tolist() for i in range(96)]
    for ranks in (1, 2, 3, 4):
        fresh = stream((0.6, tmp_path / "a", 0.4, tmp_path / "b"), 8, reset=reset).train
        for step in range(24 // ranks, 96 // (4 * ranks)):  # not from the start: a resume
            begin = step * 4 * ranks
            for rank in range(ranks):
                batch = fresh.batch(range(begin + rank, begin + 4 * ranks, ranks))
                expected = np.array(whole[begin + rank : begin + 4 * ranks : ranks])
                assert (batch.tokens.numpy() == expected[:, :-1]).all()
                assert (batch.labels.numpy() == expected[:, 1:]).all()
                assert (batch.positions is not None) == reset


def test_blend_takes_each_source_in_proportion_and_in_its_own_order(tmp_path):
    corpus(tmp_path / "a", [50] * 40)
    corpus(tmp_path / "b", [50] * 10, first=50_000)
    train = stream((3.0, tmp_path / "a", 1.0, tmp_path / "b"), 10).train
    from_b = [bool((train.sample(i) >= 50_000).any()) for i in range(400)]
    assert all(abs(sum(from_b[:n]) - n / 4) < 1 for n in range(400))
    seen = Counter(tuple(train.sample(i)) for i in range(train.num_samples))
    assert max(seen.values()) == 1  # num_samples: before any source repeats
    assert train.num_samples == 4 * 49 + from_b[196:].index(True)  # b has 49 samples


def _phased(folder: Path, starts=(37, 60)):
    """Sources a and b; then b, c and a in other shares; then d alone, which only the last phase has."""
    paths = {name: str(folder / name) for name in "abcd"}
    phases = (
        DataPhase(start=0.5, train=(0.5, paths["b"], 0.2, paths["c"], 0.3, paths["a"])),
        DataPhase(start=0.9, train=paths["d"]),
    )
    config = DataConfig(
        train=(0.7, paths["a"], 0.3, paths["b"]),
        phases=phases,
        validation=None,
        tokenizer=None,
        cache=str(folder / "cache"),
    )
    assert config.problems() == []
    return open_data(config, vocab_size=100_000, seq_len=8, seed=3, starts=starts).train


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """Sources whose tokens tell them apart: a from 10,000 on, b from 20,000 on, ..."""
    folder = tmp_path_factory.mktemp("four")
    for index, name in enumerate("abcd"):
        corpus(folder / name, [20 + index] * 30, first=10_000 * (index + 1))
    return folder


def test_phases_change_the_blend_at_their_sample_and_sources_go_on(four):
    train = _phased(four)
    samples = [train.sample(i) for i in range(120)]
    sources = "".join(" abcd"[int(sample.max()) // 10_000] for sample in samples)
    for begin, end, weights in ((0, 37, {"a": 0.7, "b": 0.3}), (37, 60, {"b": 0.5, "c": 0.2, "a": 0.3})):
        assert set(sources[begin:end]) == set(weights)
        for name, weight in weights.items():
            for n in range(begin, end + 1):
                assert abs(sources[begin:n].count(name) - weight * (n - begin)) < 1
    assert set(sources[60:]) == {"d"}
    alone = {name: stream(four / name, 8, seed=3).train for name in "abcd"}
    for name in "abcd":  # in its own epoch's order nothing is left out or comes twice, across the borders
        taken = [samples[i].tolist() for i in range(120) if sources[i] == name]
        assert len({tuple(sample) for sample in taken}) == len(taken) <= alone[name].num_samples
    first = [alone["a"].sample(i).tolist() for i in range(40)]  # source 0 alone has the same key
    assert [samples[i].tolist() for i in range(60) if sources[i] == "a"] == first[: sources[:60].count("a")]
    assert train.num_samples == 60 + alone["d"].num_samples


def test_a_border_of_phases_is_the_same_for_any_number_of_ranks_and_any_resume(four):
    whole = _phased(four).batch(range(96)).tokens.numpy()
    for ranks, begin in ((1, 36), (2, 24), (3, 30), (4, 56)):  # each a fresh process that resumes there
        fresh = _phased(four)
        for step in range(begin, 96 - 2 * ranks, 2 * ranks):
            for rank in range(ranks):
                mine = fresh.batch(range(step + 2 * rank, step + 2 * rank + 2)).tokens.numpy()
                assert (mine == whole[step + 2 * rank : step + 2 * rank + 2]).all()


def test_a_phase_with_the_same_source_changes_nothing(four):
    config = DataConfig(
        train=str(four / "a"),
        phases=(DataPhase(tokens=10, train=str(four / "a")),),
        validation=0.1,
        tokenizer=None,
        cache=str(four / "cache"),
    )
    phased = open_data(config, vocab_size=100_000, seq_len=8, seed=3, starts=[13])
    plain = stream(four / "a", 8, seed=3, validation=0.1)
    assert (phased.train.batch(range(99)).tokens == plain.train.batch(range(99)).tokens).all()
    assert phased.train.num_samples == plain.train.num_samples
    assert len(phased.hashes()) == 1 and phased.validation.num_samples == plain.validation.num_samples


def test_data_of_the_users_own_must_be_named(four):
    for keys in ({"train": None}, {"train": str(four / "a"), "phases": (DataPhase(start=0.5, train=None),)}):
        config = DataConfig(validation=None, tokenizer=None, cache=str(four / "cache"), **keys)
        assert config.problems() == []
        with pytest.raises(UsageError, match=r"train is null: this recipe is for data of your own"):
            open_data(config, vocab_size=100_000, seq_len=8, seed=0, starts=[9] * len(config.phases))


def test_a_source_twice_in_a_phase_is_refused_however_it_is_spelled(four):
    phase = DataPhase(start=0.5, train=(1.0, str(four / "a"), 2.0, str(four / "a.bin")))
    config = DataConfig(
        train=str(four / "b"), phases=(phase,), validation=None, tokenizer=None, cache=str(four / "cache")
    )
    with pytest.raises(UsageError, match=r"phases\[0\].train names a source twice"):
        open_data(config, vocab_size=100_000, seq_len=8, seed=0, starts=[9])


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 10))
def test_positions_and_documents_restart(tmp_path_factory, lengths, seq_len):
    prefix = tmp_path_factory.mktemp("x") / "x"
    corpus(prefix, lengths)
    data = stream(prefix, seq_len, reset=True).train
    batch = data.batch(range(data.num_samples))
    for tokens, positions, ids in zip(batch.tokens, batch.positions, batch.document_ids, strict=True):
        position, document = 0, 0
        for column, token in enumerate(tokens.tolist()):
            assert (positions[column], ids[column]) == (position, document)
            position, document = (0, document + 1) if token == EOD else (position + 1, document)
    assert stream(prefix, seq_len).train.batch([0]).document_ids is None


@given(count=st.integers(2, 400), fraction=st.floats(1e-3, 0.5))
def test_split_is_disjoint_complete_and_spread(count, fraction):
    class Fake:
        num_documents = count

    train, validation = split_documents(Fake(), fraction)
    assert sorted([*train, *validation]) == list(range(count))
    assert len(validation) == max(1, round(count * fraction))
    assert len(train) >= 1
    gaps = np.diff(validation)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def test_validation_is_fixed_finite_and_apart_from_training(tmp_path):
    documents = corpus(tmp_path / "x", [20] * 50)
    runs = [stream(tmp_path / "x", 7, seed=seed, validation=0.1) for seed in (1, 2)]
    held_out = [np.stack([run.validation.sample(i) for i in range(run.validation.num_samples)]) for run in runs]
    assert (held_out[0] == held_out[1]).all()
    assert held_out[0].shape == ((5 * 20 - 1) // 7, 8)
    expected = sum([documents[i] for i in (5, 15, 25, 35, 45)], [])
    assert held_out[0][:, :-1].ravel().tolist() == expected[: 14 * 7]
    seen = {int(token) for i in range(400) for token in runs[0].train.sample(i)}
    assert seen & set(expected) == {EOD}
    with pytest.raises(IndexError):
        runs[0].validation.sample(14)


def test_validation_of_its_own(tmp_path):
    corpus(tmp_path / "x", [20] * 5)
    corpus(tmp_path / "v", [9, 9], first=700)
    data = stream(tmp_path / "x", 4, validation=str(tmp_path / "v"))
    assert data.validation.num_samples == 4
    assert data.validation.sample(0).tolist() == [700, 701, 702, 703, 704]
    assert [(s["role"], s["tokens"]) for s in data.hashes()] == [("train", 100), ("validation", 18)]
    assert data.train.num_samples == 24
    assert stream(tmp_path / "x", 4).validation is None


def test_foreign_pair_is_hashed_by_index_and_scanned_once(tmp_path, monkeypatch):
    corpus(tmp_path / "x", [30, 30])
    (source,) = stream(tmp_path / "x", 4).hashes()
    assert source["bin_sha256"] is None and source["bin_bytes"] == 240 and len(source["idx_sha256"]) == 64
    monkeypatch.setattr("data.indexed.IndexedDataset.token_range", None)  # remembered: not called again
    data = stream(tmp_path / "x", 4)
    assert "60 tokens, 2 documents, tokens not hashed" in data.description()
    with pytest.raises(DataError, match=r"x\.bin: token id 10 at byte 36 is outside the vocabulary of 10"):
        config = DataConfig(
            train=str(tmp_path / "x"),
            validation=None,
            tokenizer=None,
            cache=str(tmp_path / "cache"),
        )
        open_data(config, vocab_size=10, seq_len=4, seed=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "in.jsonl"
    lines = [json.dumps({"text": f"Document number {i} says something. " * 9}) for i in range(40)]
    path.write_text("\n".join(lines))
    return path


def opened(text: Path, vocab_size: int = 330, seq_len: int = 16, **options):
    config = DataConfig(**{"train": str(text), "cache": str(text.parent / "cache"), "workers": 1, **options})
    assert config.problems() == []
    return open_data(config, vocab_size=vocab_size, seq_len=seq_len, seed=0)


def test_text_is_prepared_on_demand(text):
    data = opened(text, validation=0.1)
    assert data.tokenizer_path.suffix == ".model"
    (source,) = data.hashes()
    assert len(source["bin_sha256"]) == 64 and source["documents"] == 40
    assert data.validation.num_samples > 0
    again = opened(text, validation=0.1)
    assert again.hashes() == data.hashes()
    assert (again.train.sample(3) == data.train.sample(3)).all()
    by_path = opened(text, tokenizer=str(data.tokenizer_path))
    assert by_path.hashes()[0]["bin_sha256"] == source["bin_sha256"]


def test_what_cannot_be_opened(text, tmp_path):
    made = tmp_path / "made"
    prepare(PrepareOptions(inputs=(text,), output=made, tokenizer="bpe", vocab_size=300, workers=1))
    other = str(opened(text).tokenizer_path)
    cases = [
        (DataError, "neither such a file nor", {"train": "no/such/file"}),
        (DataError, r"one sample needs seq_len \+ 1 = 100001", {"seq_len": 100_000}),
        (UsageError, "holds text; set it to bpe", {"tokenizer": None}),
        (UsageError, "already holds token ids", {"train": str(made)}),
        (UsageError, "300 ids, more than the vocabulary size",
         {"tokenizer": f"{made}.tokenizer.model", "vocab_size": 299}),
        (DataError, "token id 299 at byte",
         {"train": str(made), "tokenizer": None, "vocab_size": 299}),
        (DataError, "prepared with another tokenizer", {"train": str(made), "tokenizer": other}),
        (DataError, "proc", {"cache": "/proc/nowhere"}),
    ]  # fmt: skip
    for kind, message, options in cases:
        with pytest.raises(kind, match=message):
            opened(text, **options)
    Path(f"{made}.manifest.json").write_text("{")
    with pytest.raises(DataError, match="made.manifest.json is damaged"):
        opened(text, train=str(made), tokenizer=None)
    corpus(tmp_path / "single", [100])
    with pytest.raises(DataError, match="has 1 document, so no part"):
        stream(tmp_path / "single", 5, validation=0.5)


def test_prefix_may_carry_its_suffix(text, tmp_path):
    corpus(tmp_path / "x", [30] * 4)
    for suffix in (".bin", ".idx"):
        assert stream(tmp_path / f"x{suffix}", 4).train.num_samples == 29


def test_config_problems():
    assert DataConfig().problems() == []
    assert DataConfig(train=(1, "a", 2.5, "b"), validation=None).problems() == []
    for bad in (
        {"train": ""},
        {"train": ("a", 0.5)},
        {"train": (0.5, "a", 0.5)},
        {"train": ()},
        {"train": (0.0, "a", 1.0, "b")},
        {"validation": 0.6},
        {"validation": 0.0},
        {"validation": ("x",)},
        {"workers": 0},
        {"phases": (DataPhase(train="a"),)},
        {"phases": (DataPhase(start=0.5, tokens=9, train="a"),)},
        {"phases": (DataPhase(start=0.5, train=(0.0, "a")),)},
    ):
        (problem,) = DataConfig(**bad).problems()
        assert problem.startswith(next(iter(bad)))


def test_preparing_does_not_import_torch():
    """Encoding processes start in a fraction of a second only as long as this holds."""
    code = "import sys, data.prepare; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
