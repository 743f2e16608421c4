"""A damaged or hostile checkpoint is never loaded: it is named, and an older one is taken where that is allowed."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock_dcp
from torch.distributed.checkpoint.metadata import Metadata

from errors import CheckpointError
from parallel.checkpoint import load_weights, newest, open_checkpoint, read_meta, resolve
from tests.checkpoint_case import newest_step, save_alone
from tests.spawn import run_ranks

FILES = [".metadata", "__0_0.distcp", "__0_1.distcp", "meta.json"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _zero_page(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(bytes(min(4096, len(data))) + data[4096:])


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped byte": (_flip, "has other content than was written"),
    "zeroed page": (_zero_page, "has other content than was written"),
    "truncated": (_truncate, r"has \d+ bytes instead of \d+"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_an_older_one_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, name: str
) -> None:
    save_alone(tmp_path, 1)
    damaged = save_alone(tmp_path, 2)
    damage, defect = DAMAGE[kind]
    damage(damaged / name)
    with caplog.at_level(logging.ERROR, "parallel"):
        assert newest_step(tmp_path) == 1
    (record,) = [r.getMessage() for r in caplog.records if r.name == "parallel.checkpoint"]
    assert str(damaged / name) in record and "OLDER" in record
    for use in (open_checkpoint, load_weights, lambda path: resolve(tmp_path, str(path))):
        with pytest.raises(CheckpointError, match=f"{name} {defect}"):
            use(damaged)
    if name == "meta.json":
        with pytest.raises(CheckpointError, match=f"{name} {defect}"):
            read_meta(damaged)


def _cut_manifest(path: Path) -> None:
    path.write_text(path.read_text()[:-40])


def _other_format(path: Path) -> None:
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))


def _path_outside(path: Path) -> None:
    path.write_text(path.read_text().replace('"meta.json"', '"../meta.json"'))


@pytest.mark.parametrize(
    ("damage", "defect"),
    [
        (Path.unlink, "is missing: not a checkpoint, or not a complete one"),
        (_cut_manifest, "cannot be read: JSONDecodeError"),
        (_other_format, "format 3, this version reads 1 and 2"),
        (_path_outside, "not names of files beside it"),
    ],
)
def test_damaged_manifest(tmp_path: Path, damage: Callable[[Path], None], defect: str) -> None:
    save_alone(tmp_path, 1)
    damaged = save_alone(tmp_path, 2)
    damage(damaged / "manifest.json")
    with pytest.raises(CheckpointError, match=defect):
        open_checkpoint(damaged)
    assert newest_step(tmp_path) == 1


def test_checkpoints_of_the_first_format_are_read(tmp_path: Path) -> None:
    """They had SHA-256."""
    path = save_alone(tmp_path, 1)
    files = {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
        if file.name != "manifest.json"
    }
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    assert open_checkpoint(path).step == 1
    _flip(path / "__0_1.distcp")
    with pytest.raises(CheckpointError, match=r"__0_1.distcp has other content than was written \(sha256\)"):
        open_checkpoint(path)


def test_every_bit_of_a_manifest_matters_or_changes_nothing(tmp_path: Path) -> None:
    """A flipped bit in the manifest is noticed, or the checkpoint is still read as it was written."""
    path = save_alone(tmp_path, 2) / "manifest.json"
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        try:
            assert newest_step(tmp_path) == 2
        except CheckpointError:
            continue


def test_no_valid_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        _flip(save_alone(tmp_path, step) / "meta.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* \(tried 2; .* --resume PATH"):
        newest(tmp_path)


def _all_ranks_fall_back(rank: int, run_dir: Path) -> tuple[int, str]:
    checkpoint = newest(run_dir)
    assert checkpoint is not None
    try:
        open_checkpoint(run_dir / "checkpoints" / "step-00000002")
    except CheckpointError as error:
        return checkpoint.step, str(error)
    raise AssertionError("the damaged checkpoint was opened")


def test_a_defect_that_one_rank_sees_is_known_to_all(tmp_path: Path) -> None:
    save_alone(tmp_path, 1)
    _flip(save_alone(tmp_path, 2) / "__0_1.distcp")
    first, second = run_ranks(_all_ranks_fall_back, 2, tmp_path)
    assert first == second and first[0] == 1
    assert "__0_1.distcp has other content" in first[1]


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def _replace(path: Path, name: str, data: bytes) -> None:
    """Put `data` in the place of a file, with a manifest that agrees."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("wrapped", [False, True])
def test_code_in_the_index_does_not_run(tmp_path: Path, wrapped: bool) -> None:
    path = save_alone(tmp_path, 1)
    evil = _Evil(tmp_path / "owned")
    _replace(path, ".metadata", pickle.dumps(Metadata({}, planner_data=evil) if wrapped else evil))
    with pytest.raises(CheckpointError, match=r"asks for (posix|os)\.mkdir"):
        open_checkpoint(path)
    assert not evil.target.exists()
    with pytest.raises(CheckpointError):
        load_weights(path)
    assert not evil.target.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x08Size.mro\x93.",
        b"\x80\x04N.",
        b"garbage",
        b"",
    ],
)
def test_strange_indices(tmp_path: Path, data: bytes) -> None:
    path = save_alone(tmp_path, 1)
    _replace(path, ".metadata", data)
    with pytest.raises(CheckpointError, match=r"\.metadata (asks for|cannot be read)"):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_entries_that_are_not_tensors_are_refused(tmp_path: Path) -> None:
    """What the stock planner writes for an object is a pickle: it must not come back through us."""
    path = save_alone(tmp_path, 1)
    writer = stock_dcp.FileSystemWriter(tmp_path / "stock")
    writer.storage_meta = lambda: None
    stock_dcp.save({"a": _Evil(tmp_path / "owned")}, storage_writer=writer, no_dist=True)
    _replace(path, ".metadata", (tmp_path / "stock" / ".metadata").read_bytes())
    with pytest.raises(CheckpointError, match=r"BytesStorageMetadata|not tensors"):
        open_checkpoint(path)
    assert not (tmp_path / "owned").exists()


def _edit_index(path: Path, edit: Callable[[Any], None]) -> None:
    index = pickle.loads((path / ".metadata").read_bytes())
    edit(index)
    _replace(path, ".metadata", pickle.dumps(index))


def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    path = save_alone(tmp_path, 1)

    def outside(index: Any) -> None:
        next(iter(index.storage_data.values())).relative_path = "../../secret"

    _edit_index(path, outside)
    with pytest.raises(CheckpointError, match=r"'\.\./\.\./secret'\] are not its files"):
        open_checkpoint(path)


def test_an_index_with_holes_is_refused(tmp_path: Path) -> None:
    path = save_alone(tmp_path, 1)
    _edit_index(path, lambda index: index.storage_data.popitem())
    with pytest.raises(CheckpointError, match="have no data"):
        open_checkpoint(path)


def test_code_in_a_data_file_does_not_run(tmp_path: Path) -> None:
    path = save_alone(tmp_path, 1)
    evil = io.BytesIO()
    torch.save(_Evil(tmp_path / "owned"), evil)

    def everything(index: Any) -> None:
        for info in index.storage_data.values():
            info.relative_path, info.offset, info.length = "__0_0.distcp", 0, evil.getbuffer().nbytes

    _edit_index(path, everything)
    _replace(path, "__0_0.distcp", evil.getvalue())
    with pytest.raises(CheckpointError, match="cannot load"):
        load_weights(path)
    assert not (tmp_path / "owned").exists()
