"""What is saved comes back bit by bit, on the same ranks and on others; what does not fit is refused by name."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils import serialization

from errors import CheckpointError
from parallel import dcp
from parallel.checkpoint import load, load_weights, newest, open_checkpoint, read_meta, resolve, save
from parallel.saver import CheckpointConfig
from tests.checkpoint_case import KINDS, SHAPES, Piece, assert_equal, pieces, save_alone, truth
from tests.spawn import run_ranks

META = {"step": 3, "lr": 0.1 + 0.2, "recipe": {"run": {"dir": "runs/a"}}, "names": ["ä", None, True]}


def test_round_trip_of_tensors_and_meta(tmp_path: Path) -> None:
    full = truth(3)
    path = save(tmp_path, 3, pieces(0, 1, full), META, own={"torch": torch.get_rng_state()})
    assert path == tmp_path / "checkpoints" / "step-00000003"
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.path, checkpoint.step, checkpoint.meta) == (path, 3, META)
    fragments = pieces(0, 1)
    memory = [piece.tensors["weight"].data_ptr() for piece in fragments]
    rng = load(checkpoint, fragments)
    assert_equal(fragments, full)
    assert [piece.tensors["weight"].data_ptr() for piece in fragments] == memory, "not loaded in place"
    assert torch.equal(rng["torch"], torch.get_rng_state())


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple),
    saved=st.integers(1, 5),
    loaded=st.integers(1, 5),
)
def test_any_cut_reads_any_other(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], saved: int, loaded: int
) -> None:
    """One process holds all fragments of `saved` ranks, then those of `loaded` ranks."""
    shapes = {"a": shape, "b": (3, 5)}
    full = truth(1, shapes)
    run_dir = tmp_path_factory.mktemp("run")
    path = save(run_dir, 1, [p for r in range(saved) for p in pieces(r, saved, full, shapes)], {})
    fragments = [p for r in range(loaded) for p in pieces(r, loaded, None, shapes)]
    load(open_checkpoint(path), fragments)
    assert_equal(fragments, full)


def test_weights_and_meta_without_a_model(tmp_path: Path) -> None:
    full = truth(7)
    path = save(tmp_path, 7, pieces(0, 1, full), META)
    for place in (path, tmp_path):  # a checkpoint, or the run whose newest one is meant
        weights = load_weights(place)
        assert weights.keys() == SHAPES.keys()
        assert all(torch.equal(weights[name], full["weight"][name]) for name in SHAPES)
        assert all(tuple(weights[name].shape) == shape for name, shape in SHAPES.items())
        assert read_meta(place) == META


def test_the_data_is_an_ordinary_dcp_checkpoint(tmp_path: Path) -> None:
    full = truth(7)
    path = save(tmp_path, 7, pieces(0, 1, full), {})
    dcp_to_torch_save(path, tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt")
    assert torch.equal(plain["weight/embedding.weight"], full["weight"]["embedding.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (40, 50), (2, 3, 4, 5)])
def test_a_tensor_is_written_as_torch_writes_it(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for seed in range(2):
        bits = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
        tensor, stream = bits.to(dtype), io.BytesIO()
        with serialization.config.patch("save.compute_crc32", False):  # pyright: ignore[reportAttributeAccessIssue]
            torch.save(tensor, stream)
        head, tail = dcp.around(dtype, tensor.shape)
        assert head + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() + tail == stream.getvalue()


def test_threads_do_not_change_how_others_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each switches CRCs off for itself; here the later ones take longer."""
    shapes = [torch.Size([size, 3]) for size in range(1, 9)]
    alone = [dcp.around(torch.float32, shape) for shape in shapes]
    original = torch.save

    def slow(tensor: torch.Tensor, stream: io.RawIOBase) -> None:
        time.sleep(0.02 * len(tensor))
        original(tensor, stream)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(torch, "save", slow)
    dcp.around.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda shape: dcp.around(torch.float32, shape), shapes)) == alone


def _load_newest(rank: int, run_dir: Path, group: dist.ProcessGroup) -> tuple[int, int, dict[str, torch.Tensor]]:
    """The step of the newest checkpoint, how many elements this rank took from it, and its generator states."""
    checkpoint = resolve(run_dir, "auto", group)
    if checkpoint is None:
        return 0, 0, {}
    fragments = pieces(rank, dist.get_world_size())
    rng = load(checkpoint, fragments, group)
    assert_equal(fragments, truth(5))
    return checkpoint.step, sum(piece.tensors["weight"].numel() for piece in fragments), rng


def _load_save_load(rank: int, run_dir: Path) -> list[tuple[int, int, dict[str, torch.Tensor]]]:
    size = dist.get_world_size()
    group = dist.new_group(backend="gloo")
    before = _load_newest(rank, run_dir, group)
    rng = {"torch": torch.full((3,), rank, dtype=torch.uint8), "numpy": torch.tensor([rank])}
    save(run_dir, size, pieces(rank, size, truth(5)), {"ranks": size}, own=rng, group=group)
    return [before, _load_newest(rank, run_dir, group)]


def test_reshard_over_processes(tmp_path: Path) -> None:
    """Nothing -> 2 ranks -> 2, 1 and 4 ranks -> 4 and 1 rank, over real processes and a group of their own."""
    elements = sum(tensor.numel() for tensor in truth()["weight"].values())
    found = 0
    for size in (2, 4):
        results = run_ranks(_load_save_load, size, tmp_path)
        assert [before[0] for before, _ in results] == [found] * size
        assert sum(before[1] for before, _ in results) == (elements if found else 0)
        assert all(before[2] == {} for before, _ in results), "states of 2 ranks do not fit 4"
        assert [after[0] for _, after in results] == [size] * size
        assert sum(after[1] for _, after in results) == elements
        assert [after[2]["torch"].tolist() for _, after in results] == [[rank] * 3 for rank in range(size)]
        assert [after[2]["numpy"].tolist() for _, after in results] == [[rank] for rank in range(size)]
        assert read_meta(tmp_path) == {"ranks": size}
        checkpoint = newest(tmp_path)
        fragments = pieces(0, 1)
        assert checkpoint is not None and load(checkpoint, fragments) == {}
        assert_equal(fragments, truth(5))
        found = size


def _save_replicated(rank: int, run_dir: Path) -> None:
    shapes = {f"w{i}": (64, 64) for i in range(8)}
    save(run_dir, 1, pieces(0, 1, truth(1, shapes), shapes), {})
    fragments = pieces(0, 1, None, shapes)
    checkpoint = newest(run_dir)
    assert checkpoint is not None
    load(checkpoint, fragments)
    assert_equal(fragments, truth(1, shapes))


def test_replicated_states_are_written_once_and_by_all(tmp_path: Path) -> None:
    run_ranks(_save_replicated, 2, tmp_path)
    folder = tmp_path / "checkpoints" / "step-00000001"
    per_rank = [sum(f.stat().st_size for f in folder.glob(f"__{rank}_*")) for rank in range(2)]
    payload = 8 * 64 * 64 * sum(dtype.itemsize for dtype in KINDS.values())
    assert sum(per_rank) < 1.4 * payload
    assert max(per_rank) < 1.2 * min(per_rank)


def _without(fragments: list[Piece], name: str) -> list[Piece]:
    return [piece for piece in fragments if piece.name != name]


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_alone(tmp_path, 1))
    others = {
        r"3 tensors differ\n  codes/norm.weight: saved uint8 \[17\], needed not at all": _without(
            pieces(0, 1), "norm.weight"
        ),
        r"weight/bias: saved not at all, needed float32 \[4\]": pieces(0, 1, None, {**SHAPES, "bias": (4,)}),
        # Same number of elements, other heads: only the logical shape tells.
        r"qkv.weight: saved .*\[2, 3, 5, 7\], needed .*\[3, 2, 5, 7\]": pieces(
            0, 1, None, {**SHAPES, "layers.0.attention.qkv.weight": (3, 2, 5, 7)}
        ),
        r"exp_avg/temperature: saved bfloat16 \[\], needed float32 \[\]": [
            *_without(pieces(0, 1), "temperature"),
            Piece(
                "temperature",
                (),
                0,
                {k: torch.ones(1, dtype=torch.float32 if k == "exp_avg" else d) for k, d in KINDS.items()},
            ),
        ],
        r"15 tensors differ(?s:.*)\.\.\. and 10 more": [],
    }
    for message, fragments in others.items():
        with pytest.raises(CheckpointError, match=message):
            load(checkpoint, fragments)
        assert all((t == 1).all() for p in fragments for t in p.tensors.values()), "written before it was refused"


def test_fragments_with_a_gap_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)embedding.weight.*hold 99 elements.*\(13, 8\)"):
        save(tmp_path, 1, [*pieces(0, 4, truth())], {})
    assert newest(tmp_path) is None
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_resume_choices(tmp_path: Path) -> None:
    assert resolve(tmp_path, "auto") is None
    first, second = save_alone(tmp_path, 1), save_alone(tmp_path, 2)
    assert resolve(tmp_path, "never") is None
    for how, step in (("auto", 2), (str(first), 1), (str(second), 2), (str(tmp_path), 2)):
        checkpoint = resolve(tmp_path, how)
        assert checkpoint is not None and checkpoint.step == step
    with pytest.raises(CheckpointError, match="nowhere/manifest.json is missing"):
        resolve(tmp_path, str(tmp_path / "nowhere"))


def test_config() -> None:
    assert CheckpointConfig().problems() == []
    problems = CheckpointConfig(interval=-1, keep=0).problems()
    assert len(problems) == 2 and "interval is -1" in problems[0] and "keep is 0" in problems[1]
    assert [step for step in range(1, 11) if CheckpointConfig(interval=4).due(step, 10)] == [4, 8, 10]
    assert not CheckpointConfig().due(10, 10)
