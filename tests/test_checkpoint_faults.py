"""Whatever interrupts a save, older checkpoints stay, nothing unfinished is found, and all ranks hear why."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from errors import CheckpointError
from parallel import catalog, manifest
from parallel.checkpoint import load_weights, save
from tests.checkpoint_case import Piece, newest_step, pieces, save_alone, truth
from tests.spawn import run_ranks


def _names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def _steps(*steps: int) -> set[str]:
    return {f"step-{step:08d}" for step in steps} | {"latest"}


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_alone(tmp_path, step, keep=2)
    assert _names(tmp_path) == _steps(4, 5)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"


def test_a_run_taken_back_goes_on_from_its_own_past(tmp_path: Path) -> None:
    """Steps beyond the one saved last belong to an abandoned future: not resumed from, and pruned first."""
    for step in (10, 20, 30):
        save_alone(tmp_path, step)
    save_alone(tmp_path, 15)
    assert newest_step(tmp_path) == 15
    assert _names(tmp_path) == _steps(10, 15, 30)
    save_alone(tmp_path, 16)
    assert _names(tmp_path) == _steps(10, 15, 16)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000016")
    assert newest_step(tmp_path) == 15, "the pointer names nothing: the newest directory counts"


@pytest.mark.parametrize("early", [True, False])
def test_who_looks_while_a_run_saves_sees_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """The pointer is read at one moment, the directory at another: a save, and its pruning, just before or after."""
    save_alone(tmp_path, 1, keep=1)
    pointed = catalog.pointed

    def meanwhile(root: Path) -> Path | None:
        found = None if early else pointed(root)
        with monkeypatch.context() as plain:
            plain.setattr(catalog, "pointed", pointed)
            save_alone(tmp_path, 2, keep=1)
        return pointed(root) if early else found

    monkeypatch.setattr(catalog, "pointed", meanwhile)
    assert [path.name for path in catalog.by_age(tmp_path / catalog.FOLDER)] == ["step-00000002"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_alone(tmp_path, 1)
    save(tmp_path, 1, pieces(0, 1, truth(99)), {"again": True})
    assert _names(tmp_path) == _steps(1)
    assert (load_weights(tmp_path)["norm.weight"] == truth(99)["weight"]["norm.weight"]).all()


def test_leftovers_of_a_killed_save_are_ignored_then_removed(tmp_path: Path) -> None:
    save_alone(tmp_path, 1)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "step-00000001", root / "step-00000002.tmp")
    (root / "latest.tmp").write_text("step-0000")
    (root / "notes").mkdir()
    assert newest_step(tmp_path) == 1
    save_alone(tmp_path, 3)
    assert _names(tmp_path) == _steps(1, 3) | {"notes"}


class _Killed(BaseException):
    """Stands for a kill: no handler of ours may run."""


CALLS = ["mkdir", "rename", "replace", "fsync", "rmdir", "unlink"]


def _stop_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> list[str]:
    """Raise `error` instead of the `call`-th change of the file system; return the list of calls so far."""
    seen: list[str] = []

    def wrap(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **options: object) -> object:
            seen.append(name)
            if len(seen) == call + 1:
                raise error
            return original(*args, **options)

        return counted

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    return seen


@pytest.mark.parametrize("keep", [1, 3])
def test_a_kill_between_any_two_changes_of_the_disk(tmp_path: Path, keep: int) -> None:
    for call in range(100):
        run_dir = tmp_path / str(call)
        save_alone(run_dir, 1, keep=keep)
        with pytest.MonkeyPatch.context() as patch:
            seen = _stop_at(patch, call, _Killed())
            try:
                save_alone(run_dir, 2, keep=keep)
            except _Killed:
                pass
        finished = len(seen) <= call
        assert newest_step(run_dir) in ((2,) if finished else (1, 2))
        save_alone(run_dir, 3, keep=keep)
        assert newest_step(run_dir) == 3
        assert not [name for name in _names(run_dir) if name.endswith(".tmp")]
        if finished:
            assert call > 10, f"only {seen} were intercepted"
            return
    raise AssertionError("a save needs fewer than 100 changes")


def test_a_failure_of_any_change_of_the_disk(tmp_path: Path) -> None:
    """Like a kill, but reported: the error names the reason, and no unfinished directory stays."""
    for call in range(100):
        run_dir = tmp_path / str(call)
        save_alone(run_dir, 1)
        with pytest.MonkeyPatch.context() as patch:
            seen = _stop_at(patch, call, OSError(errno.EIO, os.strerror(errno.EIO), "somewhere"))
            try:
                save_alone(run_dir, 2)
                failed = False
            except CheckpointError as error:
                failed = True
                assert "Input/output error" in str(error)
        assert newest_step(run_dir) in ((1, 2) if failed else (2,))
        assert not [name for name in _names(run_dir) if name.startswith("step") and name.endswith(".tmp")]
        if len(seen) <= call:
            return
    raise AssertionError("a save needs fewer than 100 changes")


def _save_until_killed(run_dir: Path) -> None:
    for step in range(2, 10_000):
        save_alone(run_dir, step, keep=2)


@pytest.mark.parametrize("delay_s", [random.Random(seed).uniform(0, 0.05) for seed in range(2)])
def test_kill_9_while_saving(tmp_path: Path, delay_s: float) -> None:
    save_alone(tmp_path, 1)
    process = get_context("spawn").Process(target=_save_until_killed, args=(tmp_path,), daemon=True)
    process.start()
    try:
        deadline = time.monotonic() + 60
        while "step-00000003" not in _names(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay_s)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    step = newest_step(tmp_path)
    assert step is not None and step >= 2
    save_alone(tmp_path, 10_000, keep=2)
    assert newest_step(tmp_path) == 10_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_at_any_point(small_disk: Path) -> None:
    """Leave 0, 1, 2, ... pages free: the save fails wherever it is, then succeeds."""
    save_alone(small_disk, 1)
    filler = small_disk / "filler"
    for pages in range(100):
        filler.write_bytes(b"")
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        filler.write_bytes(bytes(free - 4096 * pages))
        try:
            save_alone(small_disk, 2)
        except CheckpointError as error:
            assert "No space left on device" in str(error) and str(small_disk) in str(error)
            assert newest_step(small_disk) == 1
            assert _names(small_disk) - {"latest.tmp"} == _steps(1)
        else:
            assert pages > 3
            assert newest_step(small_disk) == 2
            return
    raise AssertionError("a save needs fewer than 100 pages")


def _over_quota(_: int) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def _fail_in_three_ways(rank: int, run_dir: Path) -> list[str]:
    """All ranks have too much to write; then only rank 1 cannot sync; then only rank 1's fragment is impossible."""
    size = dist.get_world_size()
    shapes = {"small": (8, 8), "large": (600, 1000)}
    misplaced = Piece("norm.weight", (4,), 3 * rank, {"weight": torch.ones(2)})
    messages = []
    for fragments, quota in (
        (pieces(rank, size, None, shapes), False),
        (pieces(rank, size, truth(2)), rank == 1),
        ([misplaced], False),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if quota:
                patch.setattr(os, "fsync", _over_quota)
            try:
                save(run_dir, 2, fragments, {})
            except (CheckpointError, ValueError) as error:
                messages.append(str(error))
    return messages


def test_every_rank_hears_why_one_failed(small_disk: Path) -> None:
    save_alone(small_disk, 1)
    first, second = run_ranks(_fail_in_three_ways, 2, small_disk)
    full, quota, misplaced = first
    assert [full, quota] == second[:2]
    assert "No space left on device" in full and "step-00000002.tmp/__" in full and "rank " in full
    assert quota.startswith("cannot save the checkpoint of step 2: rank 1:") and "quota exceeded" in quota.lower()
    assert misplaced.startswith("cannot save the checkpoint of step 2: rank 1: ValueError: elements [3, 5) are outside")
    assert second[2].startswith("elements [3, 5)"), "where it happened the error keeps its type"
    assert _names(small_disk) == _steps(1)
    assert newest_step(small_disk) == 1


def test_a_disk_that_becomes_read_only(small_disk: Path) -> None:
    """As one does after an error of the device: the older checkpoint stays, and is read."""
    save_alone(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="step 2: .*Read-only file system"):
        save_alone(small_disk, 2)
    assert newest_step(small_disk) == 1
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    save_alone(small_disk, 2)
    assert newest_step(small_disk) == 2


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="step 1: .*File exists: .*/checkpoints'"):
        save_alone(tmp_path, 1)


def test_a_defect_of_ours_keeps_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("planted")

    save_alone(tmp_path, 1)
    monkeypatch.setattr(manifest.FileRecord, "of", broken)
    with pytest.raises(TypeError, match="planted"):
        save_alone(tmp_path, 2)
    monkeypatch.undo()
    assert _names(tmp_path) == _steps(1)


def test_everything_is_on_disk_before_the_directory_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_sync(handle: int) -> None:
        fsync(handle)
        events.append(Path(f"/proc/self/fd/{handle}").readlink().name)

    def record_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append(f"renamed to {Path(target).name}")

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    folder = save_alone(tmp_path, 1)
    renamed = events.index("renamed to step-00000001")
    before = events[events.index("renamed to .metadata") + 1 : renamed]
    assert set(before) == {path.name for path in folder.iterdir()} | {folder.name + ".tmp", "latest.tmp"}
    assert before.index("manifest.json") > max(before.index(name) for name in ("__0_0.distcp", "__0_1.distcp"))
    assert events[renamed + 1] == "checkpoints"
