"""Random damage to what users give: recipes and dataset files. Either it is refused in one clear message, or what is
taken is exactly what was given: no traceback, no hang, nothing silently read as something else.

The default suite takes a few cases of each kind; `-m slow` takes 2,000.
"""

from __future__ import annotations

import copy
import gzip
import lzma
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recipe as recipes
from data.config import DataConfig
from data.documents import read_texts
from data.indexed import IndexedWriter
from data.loader import open_data
from data.prepare import PrepareOptions, prepare
from errors import DataError, UsageError
from run.dry_run import dry_run
from tests.launch import tiny

SLOWEST_S = 60.0  # of one case, on a busy machine; a hang is longer


def cases(few: int, many: int) -> Callable[..., Any]:
    """Parametrize a test over how many examples it tries."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def fuzz(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Call the decorated function with `examples` draws."""
    quiet = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    return lambda check: quiet(given(**strategies)(check))()


def refusal(work: Callable[[], Any], *kinds: type[Exception]) -> str | None:
    """The message with which `work` was refused, None if it was not; anything but `kinds` is a failure."""
    began = time.monotonic()
    try:
        work()
    except kinds as error:
        message = str(error)
        assert message.strip() and "Traceback" not in message and " object at 0x" not in message, message
        return message
    finally:
        assert time.monotonic() - began < SLOWEST_S
    return None


# --- recipes

HUGE = [2**31, 2**63, 10**30, -(10**30), 1e308, float("nan"), float("inf"), -0.0]
WORDS = ["", "auto", "bf16", "fp8_e4m3", "none", "../..", "\x00", "ä\u202e", "$(reboot)", "1e400", "true", "[]"]
SCALARS = st.none() | st.booleans() | st.integers(-3, 70) | st.sampled_from(HUGE + WORDS) | st.text(max_size=8)
LISTS = st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=4), SCALARS, max_size=2)


def neighbours(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, most of them as good as `value`."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.sampled_from([value * 2, value + 1, value - 1, value * 3, max(value // 2, 1), 1, 2])
    if isinstance(value, float):
        return st.sampled_from([value / 2, value * 1.01, 1.0, 0.5])
    return st.sampled_from(["bf16", "fp32", "mxfp8", "nvfp4", "none", "cosine", "wsd", "stochastic", "full"])


def keys(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of each key that is no section."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from keys(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def place(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def look(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def same(given: Any, taken: Any) -> bool:
    """Whether a value was taken as it was given; an integer may become the nearest float, no other number changes.

    What YAML writes for NaN and infinity is text to us, which a name may be.
    """
    if isinstance(given, float) and isinstance(taken, str):
        return not math.isfinite(given) and taken == yaml.safe_dump(given).split()[0]
    if isinstance(given, bool) or isinstance(taken, bool):
        return given is taken
    if isinstance(given, list) and isinstance(taken, list):
        return len(given) == len(taken) and all(map(same, given, taken))
    if isinstance(given, dict) and isinstance(taken, dict):
        return all(key in taken and same(value, taken[key]) for key, value in given.items())
    return given == taken or isinstance(given, int) and isinstance(taken, float) and float(given) == taken


@cases(60, 800)
def test_recipes_are_refused_or_taken_as_they_are(tmp_path, examples):
    valid = recipes.to_dict(recipes.load(str(tiny(tmp_path))))
    change = st.tuples(st.sampled_from(list(keys(valid))), st.sampled_from([True, True, True, False])).flatmap(
        lambda drawn: st.tuples(st.just(drawn[0][0]), neighbours(drawn[0][1]) if drawn[1] else SCALARS | LISTS)
    )
    stranger = st.tuples(st.sampled_from(["", *valid]), st.text("abcxyz_.0", min_size=1, max_size=6))
    outcomes: Counter[str] = Counter()

    @fuzz(
        examples, changes=st.lists(change, min_size=1, max_size=2), unknown=st.none() | stranger | st.none() | st.none()
    )
    def check(changes, unknown):
        tree = copy.deepcopy(valid)
        for path, value in changes:
            place(tree, path, value)
        changed = dict(changes)
        if unknown is not None:
            section = tree[unknown[0]] if isinstance(tree.get(unknown[0]), dict) else tree
            unknown = None if unknown[1] in section else unknown
            section.setdefault(unknown[1] if unknown else "name", 1)
        text = yaml.safe_dump(tree, allow_unicode=True)
        (tmp_path / "fuzzed.yaml").write_text(text, encoding="utf-8")

        def work() -> None:
            recipe = recipes.load(str(tmp_path / "fuzzed.yaml"), (), 2)
            assert unknown is None, f"{unknown} was taken silently"
            for path, value in changed.items():
                assert same(value, look(recipes.to_dict(recipe), path)), (path, value)
            dry_run(recipe, 2)

        outcomes["refused" if refusal(work, UsageError) else "accepted"] += 1

    assert min(outcomes["refused"], outcomes["accepted"]) > examples // 20, outcomes


PIECES = [b"!!python/object/apply:os.system [reboot]", b"&a *a", b"<<: *x", b"\xff\xfe", b"\t", b"{", b"0x10", b"- "]


@cases(30, 400)
def test_text_of_recipes_is_parsed_or_refused(tmp_path, examples):
    """Bytes changed anywhere in the file; tags that would make objects are never followed."""
    text = yaml.safe_dump(recipes.to_dict(recipes.load(str(tiny(tmp_path))))).encode()
    put = st.sampled_from(PIECES) | st.binary(max_size=5)

    @fuzz(examples, at=st.integers(0, len(text) - 1), cut=st.integers(0, 20), put=put)
    def check(at, cut, put):
        (tmp_path / "fuzzed.yaml").write_bytes(text[:at] + put + text[at + cut :])
        refusal(lambda: recipes.load(str(tmp_path / "fuzzed.yaml")), UsageError)


# --- dataset files

VOCABULARY = 320


@st.composite
def damaged(draw: st.DrawFn, contents: dict[str, bytes]) -> tuple[str, bytes]:
    """One of several files, cut short, grown, with some bytes changed, or with a page of zeros."""
    name = draw(st.sampled_from(sorted(contents)))
    data = contents[name]
    at = draw(st.integers(0, len(data) - 1))
    match draw(st.sampled_from(["cut", "grow", "flip", "flip", "zero"])):
        case "cut":
            return name, data[:at]
        case "grow":
            return name, data + draw(st.binary(min_size=1, max_size=9))
        case "zero":
            return name, data[:at] + bytes(len(data[at : at + 4096])) + data[at + 4096 :]
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        changed[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
    return name, bytes(changed)


def tokens_of(prefix: Path, cache: Path, tokenizer: Path | None) -> np.ndarray:
    """Every sample of every epoch's first, as a run would read them: [samples, 17]."""
    config = DataConfig(
        train=str(prefix), validation=None, tokenizer=tokenizer and str(tokenizer), cache=str(cache), documents="line"
    )
    stream = open_data(config, vocab_size=VOCABULARY, seq_len=16, seed=1).train
    return np.stack([stream.sample(index) for index in range(stream.num_samples)])


@cases(60, 400)
def test_prepared_datasets_are_refused_or_read_as_they_were(tmp_path, examples):
    """A pair with its manifest and tokenizer: what is not refused has every token as it was."""
    tiny(tmp_path)
    home = tmp_path / "data"
    text = {"inputs": (tmp_path / "corpus.txt",), "documents": "line"}
    prepare(PrepareOptions(**text, output=home / "x", tokenizer="bpe", vocab_size=VOCABULARY, workers=1))
    contents = {path.name: path.read_bytes() for path in home.iterdir() if path.name.startswith("x")}
    truth = tokens_of(home / "x", tmp_path / "cache", home / "x.tokenizer.model")
    outcomes: Counter[str] = Counter()

    @fuzz(examples, damage=damaged(contents))
    def check(damage):
        for name, data in (contents | dict([damage])).items():
            (home / name).write_bytes(data)

        def work() -> None:
            found = tokens_of(home / "x", tmp_path / "cache", home / "x.tokenizer.model")
            assert np.array_equal(found, truth), f"{damage[0]} was read as something else"

        message = refusal(work, DataError, UsageError)
        assert message is None or "x." in message, message
        outcomes["refused" if message else "accepted"] += 1

    assert outcomes["refused"] > examples // 2, outcomes


@cases(40, 300)
def test_foreign_datasets_are_refused_or_keep_their_structure(tmp_path, examples):
    """Without a hash a changed token that is another of the vocabulary cannot be told; everything else can."""
    prefix, draw = tmp_path / "x", np.random.default_rng(0)
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        lengths = draw.integers(1, 40, 60)
        writer.add(draw.integers(0, VOCABULARY, lengths.sum()), lengths)
    contents = {path.name: path.read_bytes() for path in tmp_path.glob("x.*")}
    truth = tokens_of(prefix, tmp_path / "cache", None)

    @fuzz(examples, damage=damaged(contents))
    def check(damage):
        for name, data in (contents | dict([damage])).items():
            (tmp_path / name).write_bytes(data)

        def work() -> None:
            found = tokens_of(prefix, tmp_path / "cache", None)
            assert found.min() >= 0 and found.max() < VOCABULARY
            assert found.shape == truth.shape

        refusal(work, DataError)


@cases(20, 100)
def test_compressed_text_is_refused_or_read_as_it_was(tmp_path, examples):
    """xz and gzip have checksums; JSON Lines of its own kind say where they are broken."""
    lines = b"".join(b'{"text": "line %d of the corpus, and no other"}\n' % i for i in range(300))
    contents = {"x.jsonl.xz": lzma.compress(lines), "x.jsonl.gz": gzip.compress(lines, mtime=0)}
    (tmp_path / "whole.jsonl").write_bytes(lines)
    truth = list(read_texts([tmp_path / "whole.jsonl"], "line", "text"))

    @fuzz(examples, damage=damaged(contents))
    def check(damage):
        path = tmp_path / damage[0]
        path.write_bytes(damage[1])

        def work() -> None:
            assert list(read_texts([path], "line", "text")) == truth, f"{path.name} was read as something else"

        message = refusal(work, DataError)
        assert message is None or path.name in message, message
