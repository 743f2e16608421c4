"""A dataset that is damaged before or while a run reads it: found, named with its byte, or left out and counted."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from data import cache
from data.config import DataConfig
from data.indexed import IndexedWriter
from data.loader import open_data
from data.prepare import PrepareOptions, prepare
from errors import DataError
from tests.launch import tiny, train

VOCABULARY, LENGTH = 320, 16


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """60 documents of random tokens without a manifest."""
    draw = np.random.default_rng(0)
    with IndexedWriter(tmp_path / "x", np.dtype("<u2")) as writer:
        lengths = draw.integers(1, 40, 60)
        writer.add(draw.integers(0, VOCABULARY, lengths.sum()), lengths)
    return DataConfig(train=str(tmp_path / "x"), validation=None, tokenizer=None, cache=str(tmp_path / "cache"))


def opened(config: DataConfig):
    return open_data(config, vocab_size=VOCABULARY, seq_len=LENGTH, seed=3).train


def poke(path: Path, token: int, value: int) -> None:
    """Overwrite one token of a .bin of uint16 in place, and hide it: a disk does not note what it lost."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(2 * token)
        file.write(value.to_bytes(2, "little"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_token_outside_the_vocabulary_is_an_error_with_file_and_byte(config, tmp_path):
    stream = opened(config)
    poke(tmp_path / "x.bin", 123, 60_000)
    found = set()
    for index in range(stream.num_samples):
        try:
            stream.batch([index])
        except DataError as error:
            found.add(str(error))
    assert len(found) == 1
    message = found.pop()
    assert f"{tmp_path}/x.bin: token id 60000 at byte 246" in message and "data.corrupt=skip" in message


def test_skipped_samples_are_replaced_the_same_way_in_any_batch_and_counted(config, tmp_path):
    whole = opened(config)
    count = whole.num_samples
    truth = np.stack([whole.sample(index) for index in range(count)])
    poke(tmp_path / "x.bin", 200, 60_000)
    one, many = opened(replace(config, corrupt="skip")), opened(replace(config, corrupt="skip"))
    singly = np.stack([one.batch([index]).tokens[0].numpy() for index in range(count)])
    together = many.batch(range(count)).tokens.numpy()
    assert (singly == together).all() and one.skipped == many.skipped and len(one.skipped) in (1, 2)
    damaged = {number for _, number in one.skipped}  # two where the token is the last of one and the first of another
    for index in range(count):
        expected = index
        while expected in damaged:
            expected += 1
        if expected < count:
            assert (singly[index] == truth[expected][:-1]).all()
    again = one.batch(range(count))
    assert len(one.skipped) == len(damaged) and (again.tokens.numpy() == together).all()


def test_a_file_that_is_damaged_everywhere_is_no_accident(config, tmp_path):
    stream = opened(replace(config, corrupt="skip"))
    for token in range(0, (tmp_path / "x.bin").stat().st_size // 2, 8):
        poke(tmp_path / "x.bin", token, 60_000)
    with pytest.raises(DataError, match="so it goes on for 1000 samples"):
        stream.batch([0])


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_prepared_files_are_compared_with_their_hashes(tmp_path, suffix):
    tiny(tmp_path)
    home = tmp_path / "data"
    text = {"inputs": (tmp_path / "corpus.txt",), "documents": "line"}
    prepare(PrepareOptions(**text, output=home / "x", tokenizer="bpe", vocab_size=VOCABULARY, workers=1))
    config = DataConfig(train=str(home / "x"), validation=None, tokenizer=None, cache=str(tmp_path / "cache"))
    opened(config)
    path = home / f"x{suffix}"
    content = bytearray(path.read_bytes())
    # a token that becomes its neighbour; the border of document 6, which becomes that of document 7
    content[-2 if suffix == ".bin" else 34 + 12 * int.from_bytes(content[18:26], "little") + 8 * 6] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"x{suffix} has other content than was prepared"):
        opened(config)
    assert opened(replace(config, verify=False)).num_samples > 0


def test_a_long_hash_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.bin").write_bytes(bytes(3000))
    found = cache.sha256_file(tmp_path / "x.bin")
    assert not capsys.readouterr().err
    monkeypatch.setattr(cache, "SAY_EVERY_S", -1.0)
    monkeypatch.setattr(cache, "_CHUNK_BYTES", 1000)
    assert cache.sha256_file(tmp_path / "x.bin") == found
    assert capsys.readouterr().err.count(f"SHA-256 of {tmp_path / 'x.bin'}: 0.0 of 0.0 GB") == 3


def test_a_run_meets_damage_ends_with_3_or_goes_on_without_it(config, tmp_path):
    tree = yaml.safe_load(tiny(tmp_path).read_text())
    tree["data"] = {"train": config.train, "validation": None, "tokenizer": None, "cache": config.cache}
    recipe = tmp_path / "damaged.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    opened(config)  # found in order, and remembered
    poke(tmp_path / "x.bin", 300, 60_000)
    failed = train(recipe, f"train.seq_len={LENGTH}")
    assert failed.returncode == 3 and "token id 60000 at byte 600" in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 3
    done = train(recipe, f"train.seq_len={LENGTH}", "data.corrupt=skip")
    assert done.returncode == 0, done.stderr
    assert "damaged samples left out so far" in done.stdout and "token id 60000 at byte 600" in done.stderr


NAMES = ['"max_token', '"outputs', '".bin', '"tokenizer": {', '"sha256": ', '"bytes": ', '"file": "x.tokenizer']


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_with_a_damaged_name_is_refused(tmp_path, name):
    """Every field that is read, its first letter flipped; the first of several places."""
    tiny(tmp_path)
    text = {"inputs": (tmp_path / "corpus.txt",), "documents": "line"}
    prepare(PrepareOptions(**text, output=tmp_path / "x", tokenizer="bpe", vocab_size=VOCABULARY, workers=1))
    manifest = tmp_path / "x.manifest.json"
    content = manifest.read_text()
    at = content.index(name) + 1
    manifest.write_text(f"{content[:at]}{chr(ord(content[at]) ^ 1)}{content[at + 1 :]}")
    config = DataConfig(train=str(tmp_path / "x"), validation=None, tokenizer=None, cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"x\.manifest\.json is damaged"):
        opened(config)
