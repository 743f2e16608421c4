"""From files to tokens: every input format, every fault, any number of workers, many processes at
once."""

from __future__ import annotations

import gzip
import json
import lzma
import multiprocessing
import subprocess
import sys
import tracemalloc
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest

from data.documents import read_records, read_texts
from data.ensure import ensure_prepared, ensure_tokenizer
from data.indexed import IndexedDataset
from data.prepare import PrepareOptions, prepare
from data.tokenizer import load_tokenizer
from errors import DataError, UsageError

CORPUS = Path(__file__).resolve().parent.parent / "data/corpus/sotu.jsonl.xz"
TEXTS = ["First document.\nIt has two lines.", "Zweites: é😀", " third ", "one more of them"]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return ensure_tokenizer("bpe", [CORPUS], 1000, tmp_path_factory.mktemp("tokenizer"))


def documents(prefix: Path) -> list[str]:
    """What a prepared pair says, read back; each document must end with its only EOD."""
    model, dataset = load_tokenizer(Path(f"{prefix}.tokenizer.model")), IndexedDataset(prefix)
    ids = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    assert all(document.index(model.eod_id) == len(document) - 1 for document in ids)
    return [model.decode(document[:-1]) for document in ids]


def run(tmp_path: Path, tokenizer: Path | str, *inputs: Path, **options) -> dict:
    options = {"workers": 1, **options}
    return prepare(PrepareOptions(inputs=inputs, output=tmp_path / "out", tokenizer=str(tokenizer), **options))


def write(path: Path, content: str) -> Path:
    """Write text in the format that the suffix names."""
    data = content.encode()
    match path.suffix:
        case ".xz":
            data = lzma.compress(data)
        case ".gz":
            data = gzip.compress(data)
        case ".zst":
            zstandard = pytest.importorskip("zstandard")
            half = len(data) // 2  # two frames, as parallel compressors write
            data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_jsonl_plain_and_compressed(tmp_path, tokenizer, suffix):
    manifest = run(tmp_path, tokenizer, write(tmp_path / f"in.jsonl{suffix}", JSONL + "\n"))
    assert documents(tmp_path / "out") == TEXTS
    assert manifest["documents"] == 4
    assert manifest["tokens"] == IndexedDataset(tmp_path / "out").tokens.size


def test_parquet(tmp_path, tokenizer):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"body": TEXTS * 200, "n": range(800)}), path, row_group_size=90)
    run(tmp_path, tokenizer, path, json_key="body")
    assert documents(tmp_path / "out") == TEXTS * 200
    with pytest.raises(DataError, match=r"no column 'text', only \['body', 'n'\]"):
        run(tmp_path, tokenizer, path)
    with pytest.raises(DataError, match="row 1 of column 'n' holds 0, not text"):
        run(tmp_path, tokenizer, path, json_key="n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged or not parquet"):
        run(tmp_path, tokenizer, path, json_key="body")


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("file", ["a b\nc\n\n \nd\r\n\ne"]),
        ("blank", ["a b\nc", "d", "e"]),
        ("line", ["a b", "c", "d", "e"]),
    ],
)
def test_plain_text(tmp_path, tokenizer, choice, expected):
    path = write(tmp_path / "in.txt", "\n" * (choice != "file") + "a b\nc\n\n \nd\r\n\ne\n")
    manifest = run(tmp_path, tokenizer, path, documents=choice)
    assert documents(tmp_path / "out") == expected
    assert manifest["empty_documents"] == {"file": 0, "blank": 0, "line": 4}[choice]


def test_two_workers_give_the_same_bytes_as_one(tmp_path):
    texts = list(islice(read_texts([CORPUS], "file", "text"), 40))
    path = write(tmp_path / "in.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert len(list(read_records(path, "file", "text"))) > 1
    for workers in (1, 2):
        run(tmp_path / str(workers), "bpe", path, vocab_size=400, workers=workers)
    for name in ("out.bin", "out.idx", "out.tokenizer.model"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert documents(tmp_path / "2" / "out") == texts


def test_manifest(tmp_path, tokenizer):
    path = write(tmp_path / "in.jsonl", JSONL)
    manifest = run(tmp_path, tokenizer, path, eod=False)
    assert manifest == json.loads((tmp_path / "out.manifest.json").read_text())
    for suffix in (".bin", ".idx"):
        content = (tmp_path / f"out{suffix}").read_bytes()
        expected = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        assert manifest["outputs"][suffix] == expected
    assert manifest["inputs"][0]["sha256"] == sha256(path.read_bytes()).hexdigest()
    assert manifest["tokenizer"]["sha256"] == sha256(tokenizer.read_bytes()).hexdigest()
    assert manifest["max_token"] == IndexedDataset(tmp_path / "out").tokens.max()
    assert 2 not in IndexedDataset(tmp_path / "out").tokens  # no EOD was asked for


BAD_LINE = b'{"text": "fine"}\n'
FAULTS = {
    "utf8": ("in.jsonl", BAD_LINE + b'{"text": "\xff"}\n', r"line 2 \(byte 27\) is not UTF-8"),
    "utf8_text": ("in.txt", b"ok\nok \xe9!", r"line 2 \(byte 6\) is not UTF-8"),
    "json": ("in.jsonl", BAD_LINE * 2 + b"{oops\n", r"line 3 \(byte 34\) is not JSON"),
    "key": ("in.jsonl", b'{"body": "x"}', r"byte 0\) has no text under 'text' \(its keys are"),
    "number": ("in.jsonl", b'{"text": 3}', "has no text under 'text'"),
    "list": ("in.jsonl", b"[1]", "it is no object"),
    "surrogate": ("in.jsonl", b'{"text": "\\ud800"}', "half of a surrogate pair"),
    "empty": ("in.jsonl", b"", "in.jsonl: the corpus is empty"),
    "blank": ("in.jsonl", b'\n\n{"text": ""}\n', "the corpus is empty"),
    "xz": ("in.jsonl.xz", lzma.compress(JSONL.encode())[:-9], "damaged or truncated after"),
    "gz": ("in.jsonl.gz", gzip.compress(JSONL.encode())[:-9], "damaged or truncated after"),
    "not_gz": ("in.jsonl.gz", b"plain", "damaged or truncated after 0"),
    "not_zst": ("in.jsonl.zst", b"plain text", "damaged or truncated after 0"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_names_file_and_place_and_leaves_nothing(tmp_path, tokenizer, fault):
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        run(tmp_path, tokenizer, tmp_path / name, workers=2 if fault == "json" else 1)
    assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_truncated_zstandard_is_noticed(tmp_path, tokenizer):
    whole = write(tmp_path / "in.jsonl.zst", JSONL * 50).read_bytes()
    for size in (len(whole) - 1, len(whole) // 4, 3):
        (tmp_path / "in.jsonl.zst").write_bytes(whole[:size])
        with pytest.raises(DataError, match="truncated"):
            run(tmp_path, tokenizer, tmp_path / "in.jsonl.zst")


def test_usage_errors(tmp_path, tokenizer):
    good = write(tmp_path / "in.jsonl", JSONL)
    with pytest.raises(UsageError, match=r"cannot tell what '.pdf' holds"):
        run(tmp_path, tokenizer, write(tmp_path / "in.pdf", "x"))
    with pytest.raises(UsageError, match="needs --vocab-size"):
        run(tmp_path, "bpe", good)
    with pytest.raises(UsageError, match="1000 ids, more than the vocabulary size 999"):
        run(tmp_path, tokenizer, good, vocab_size=999)
    with pytest.raises(UsageError, match="--workers is 0"):
        run(tmp_path, tokenizer, good, workers=0)
    with pytest.raises(DataError, match="missing.txt does not exist"):
        run(tmp_path, tokenizer, tmp_path / "missing.txt")


def test_command_line(tmp_path, tokenizer):
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "data.prepare", *map(str, arguments)]
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    good, bad = write(tmp_path / "in.jsonl", JSONL), write(tmp_path / "bad.jsonl", "{")
    rest = ["--output", tmp_path / "out", "--tokenizer", tokenizer]
    done = call("--input", good, bad.with_name("in.jsonl"), *rest, "--workers", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert "8 documents" in done.stdout
    assert documents(tmp_path / "out") == TEXTS * 2
    failed = call("--input", good, bad, *rest, "--workers", 2)
    assert failed.returncode == 3
    assert failed.stderr.startswith(f"{bad}: line 1 (byte 0) is not JSON") and failed.stderr.count("\n") == 1
    assert documents(tmp_path / "out") == TEXTS * 2  # the old files are as they were
    unwritable = call("--input", good, "--output", "/proc/nowhere/out", "--tokenizer", tokenizer)
    assert unwritable.returncode == 3 and unwritable.stderr.startswith("/proc/nowhere")


def test_reading_is_streamed(tmp_path):
    def peak(copies: int) -> int:
        path = tmp_path / "in.jsonl.gz"
        with gzip.open(path, "wt", compresslevel=1) as out:
            for _ in range(copies):
                out.write(json.dumps({"text": "word " * 100}) + "\n")
        tracemalloc.start()
        assert sum(len(records.raw) for records in read_records(path, "file", "text")) == copies
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(30_000) < 1.3 * peak(3_000)


def _ensure(source: Path, tokenizer: Path, cache: Path, answers) -> None:
    answers.put(str(ensure_prepared(source, tokenizer, cache, workers=1)))


def test_many_processes_prepare_once(tmp_path, tokenizer):
    source, cache = write(tmp_path / "in.jsonl", JSONL * 100), tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = [context.Process(target=_ensure, args=(source, tokenizer, cache, answers)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    prefix = Path(answers.get())
    assert str(prefix) == answers.get()
    assert documents(prefix) == TEXTS * 100
    made = Path(f"{prefix}.bin").stat().st_mtime_ns
    assert ensure_prepared(source, tokenizer, cache) == prefix
    assert Path(f"{prefix}.bin").stat().st_mtime_ns == made
    lines = write(tmp_path / "in.txt", JSONL * 100)  # the same bytes, read otherwise
    assert ensure_prepared(lines, tokenizer, cache, workers=1) != prefix
    write(source, JSONL * 99)  # another content is another entry
    assert ensure_prepared(source, tokenizer, cache, workers=1) != prefix


def test_ensure_passes_errors_on(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"^\S*in.jsonl: line 1 \(byte 0\) is not JSON"):
        ensure_prepared(write(tmp_path / "in.jsonl", "{"), tokenizer, tmp_path / "cache")
    with pytest.raises(UsageError, match="cannot tell"):
        ensure_prepared(write(tmp_path / "in.pdf", "{"), tokenizer, tmp_path / "cache")


def test_shipped_corpus():
    texts = list(read_texts([CORPUS], "file", "text"))
    assert len(texts) == 233
    assert 10_700_000 < sum(map(len, texts)) < 10_800_000
