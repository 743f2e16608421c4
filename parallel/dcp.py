"""torch.distributed.checkpoint (DCP) for flat fragments, without DTensor and without trusting a pickle.

What is stored under a key is a `Shards`: boxes of one logical tensor that this rank holds. DCP asks for them through
its extension points (`__create_write_items__`, `__create_chunk_list__`, and the planners' `lookup_*`), stores them,
and cuts and joins boxes when a checkpoint is read with another layout. The result is an ordinary DCP checkpoint.

Five things that DCP does are not wanted here (torch 2.13):
* `.metadata` is a pickle that its reader loads without restriction: `dcp_index.read_index` has read it before.
* Entries that are not tensors are pickles loaded with `weights_only=False`: we write none, and refuse to read one.
* An error in one of the writer's threads ends that thread and the save goes on without its data, and a full disk
  surfaces as "unexpected pos": `Writer` has its own loop, which writes the same bytes.
* It serializes each tensor anew in Python, in time that a save behind training takes from it: `around` does so once.
* Its planner accepts a tensor that is only partly covered if a single process saves it: `SavePlanner` refuses.
Source: torch/distributed/checkpoint/{filesystem,default_planner,planner_helpers,metadata}.py.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config as serialization

from errors import CheckpointError
from lowprec.codecs import UNIT
from lowprec.fragments import Shard, matrix_shape
from parallel import dcp_index
from parallel.agree import Ranks, describe, summary
from parallel.aside import Aside, address
from parallel.hashed_file import HandedFile, HashedFile
from parallel.manifest import FileRecord
from parallel.rectangles import rectangles, stored_shape

# Two files a rank, synced by the caller afterwards: 1.3 times as fast as one file, 2.2 times as fast as DCP's own
# fsync (210 MB on two cores).
WRITER_THREADS = 2


@dataclass(frozen=True)
class Place:
    """Where a rank's tensor lies in the stored one.

    shape: logical shape of the stored tensor; local: that of the rank's
    runs:  (first row, rows, owned) of the rank's rows among those of `stored_shape(shape)`
    first: its first column
    """

    shape: tuple[int, ...]
    local: tuple[int, ...]
    runs: tuple[tuple[int, int, bool], ...]
    first: int = 0

    @classmethod
    def of(cls, shard: Shard, per: int, length: int) -> Place:
        """Of a tensor with an item for every `per` elements of a parameter, or (0) of `length` items for all of it.

        Items of several elements are stored as a matrix where its rows are whole UNITs, so that a part of the columns
        is a rectangle; else as a vector.
        """
        runs = [(run.start, run.rows, run.owned) for run in shard.runs]
        if per == 0:
            return cls((length,), (length,), ((0, length, any(owned for *_, owned in runs)),))
        if per == 1:
            return cls(shard.whole, shard.shape, tuple(runs), shard.columns[0])
        rows, columns = matrix_shape(shard.whole)
        first, width = shard.columns
        if columns % UNIT == 0:
            shape, local = (rows, columns // per), (matrix_shape(shard.shape)[0], width // per)
            return cls(shape, local, tuple(runs), first // per)
        assert width == columns, "parts of columns are whole units: refused by lowprec.zero"
        items = [(start * width // per, -(-count * width // per), owned) for start, count, owned in runs]
        return cls((-(-rows * columns // per),), (sum(count for _, count, _ in items),), tuple(items))


class Shards:
    """The boxes of one logical tensor that this rank holds, as views of the memory that they live in."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.boxes: dict[torch.Size, Tensor] = {}

    def add(self, flat: Tensor, offset: int, place: Place, *, owned: bool = False) -> None:
        """Add elements `[offset, offset + numel)` of this rank's tensor at `place`, given as a contiguous vector.

        owned: leave out what is another rank's to save.
        """
        for box in rectangles(place.local, offset, offset + flat.numel()):
            view, low = flat.detach()[box.start : box.stop].view(box.sizes), box.offsets[0]
            at = 0  # of the run, among this rank's rows
            for start, rows, mine in place.runs:
                first, last = max(low, at), min(low + box.sizes[0], at + rows)
                if first < last and (mine or not owned):
                    columns = [place.first + column for column in box.offsets[1:]]
                    self.boxes[torch.Size([start + first - at, *columns])] = view[first - low : last - low]
                at += rows

    def size(self) -> torch.Size:
        """The stored shape; DCP compares it with the checkpoint's."""
        return torch.Size(stored_shape(self.shape))

    @property
    def dtype(self) -> torch.dtype:
        """The element type of the boxes."""
        return next(iter(self.boxes.values())).dtype

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, box.size()) for offsets, box in self.boxes.items()]

    def __create_write_items__(self, key: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(key, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]


State = dict[str, Shards]


class SavePlanner(DefaultSavePlanner):
    """Plans `Shards`; a box that several ranks hold is written by the one with the least to write."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The box that a write item speaks of."""
        assert index.offset is not None
        return self.state_dict[index.fqn].boxes[index.offset]

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """DCP's plan; raises ValueError unless the boxes of all ranks cover every tensor exactly once."""
        plans, index = super().create_global_plan(all_plans)
        for key, entry in dcp_index.tensors(index).items():
            held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if held != math.prod(entry.size):
                raise ValueError(f"{key}: fragments hold {held} elements of shape {tuple(entry.size)}")
        return plans, index


class RestoringPlanner(DefaultLoadPlanner):
    """Plans reads straight into the boxes of `Shards`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: State, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Keep the state as it is: the base class would replace what it does not know by None."""
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The box that a read item fills."""
        assert index.offset is not None
        return self.state_dict[index.fqn].boxes[index.offset]

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        """Never unpickle: our checkpoints hold tensors only."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is not a tensor; it is not loaded")


@functools.lru_cache(maxsize=1 << 14)
def around(dtype: torch.dtype, shape: torch.Size) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the bytes of a contiguous tensor: the same for all of a type and shape.

    Without CRC, that is (a setting of this thread alone): the manifest has a hash. What is not touched takes no memory.
    """
    tensor = torch.empty(shape, dtype=dtype)
    with serialization.patch("save.compute_crc32", False):  # pyright: ignore[reportAttributeAccessIssue]
        torch.save(tensor, pieces := _Pieces(tensor))  # pyright: ignore[reportArgumentType]
    parts = pieces.parts if tensor.nbytes else [*pieces.parts, bytearray()]
    assert len(parts) == 2, f"torch.save wrote the bytes of a tensor in {len(parts) - 1} pieces"
    return bytes(parts[0]), bytes(parts[1])


class _Pieces(io.RawIOBase):
    """What is written before, between and after pieces that are all of a tensor's bytes."""

    def __init__(self, tensor: Tensor) -> None:
        self.parts = [bytearray()]
        self._tensor = tensor.data_ptr(), tensor.nbytes

    def write(self, data: memoryview) -> int:
        if (address(data), len(data)) == self._tensor:
            self.parts.append(bytearray())
        else:
            self.parts[-1] += data
        return len(data)


class Writer(filesystem.FileSystemWriter):
    """Writes into an existing directory; leaves fsync to the caller and raises every error.

    `records` are the sizes and hashes of the data files of this rank.
    """

    def __init__(self, path: Path, aside: Aside | None) -> None:
        super().__init__(path, sync_files=False, thread_count=WRITER_THREADS if aside is None else 1)
        self.folder, self.aside = path, aside
        self.records: dict[str, FileRecord] = {}

    def storage_meta(self) -> None:
        """No machine's path and no random id in the checkpoint."""

    def write_data(self, plan: SavePlan, planner: DefaultSavePlanner) -> torch.futures.Future:
        """Write this rank's boxes as DCP would; raises the first error of any file."""
        buckets = filesystem._split_by_size_and_type(self.thread_count, plan.items)
        names = [f"{plan.storage_data.prefix}{i}{filesystem.DEFAULT_SUFFIX}" for i in range(len(buckets))]
        with ThreadPoolExecutor(len(buckets)) as pool:
            written = list(pool.map(lambda name, items: self._write_file(name, items, planner), names, buckets))
        done: torch.futures.Future = torch.futures.Future()
        done.set_result([result for results in written for result in results])
        return done

    def _write_file(self, name: str, items: list[WriteItem], planner: DefaultSavePlanner) -> list[WriteResult]:
        path, results = self.folder / name, []
        with _naming(path):
            with HashedFile(path) if self.aside is None else HandedFile(path, self.aside) as stream:
                for item in items:
                    start, box = stream.tell(), planner.resolve_data(item)
                    assert isinstance(box, Tensor), "nothing but tensors is planned"
                    head, tail = around(box.dtype, box.shape)
                    for piece in (head, box.cpu().view(-1).view(torch.uint8).numpy(), tail):
                        stream.write(piece)
                    size = stream.tell() - start
                    results.append(WriteResult(item.index, size, filesystem._StorageInfo(name, start, size)))
            self.records[name] = stream.record
        return results

    def finish(self, metadata: Metadata, results: list) -> None:
        """Write the index (rank 0)."""
        with _naming(self.folder / dcp_index.INDEX_FILE):
            super().finish(metadata, results)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name into an error of the system that has none."""
    try:
        yield
    except OSError as error:
        raise error if error.filename else OSError(error.errno, error.strerror, str(path)) from error


class Reader(filesystem.FileSystemReader):
    """Reads a checkpoint through an index that `read_index` has admitted."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The admitted index; nothing is unpickled here."""
        return self.index


def write(folder: Path, state: State, ranks: Ranks, what: str, aside: Aside | None = None) -> dict[str, FileRecord]:
    """Write the boxes of all ranks and the index into the existing `folder`; the data files of this rank. Collective.

    aside: who writes and syncs what lies in its memory
    Raises CheckpointError("<what>: ...") on all ranks if any fails.
    """
    writer = Writer(folder, aside)
    _collective(lambda **group: save(state, storage_writer=writer, planner=SavePlanner(), **group), ranks, what)
    return writer.records


def read(folder: Path, index: Metadata, state: State, ranks: Ranks) -> None:
    """Fill the boxes of `state` in place, whatever boxes were saved. Collective; raises CheckpointError."""
    _collective(
        lambda **group: load(state, storage_reader=Reader(folder, index), planner=RestoringPlanner(), **group),
        ranks,
        f"cannot load {folder}",
    )


def _collective(call: Callable[..., Any], ranks: Ranks, what: str) -> None:
    """Run a DCP call, which fails on every rank with the failures of all, as one of ours."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            call(process_group=ranks.group, no_dist=ranks.size == 1)
    except CheckpointException as failed:
        errors = {rank: error for rank, (error, _) in failed.failures.items()}
        for error in errors.values():
            if not isinstance(error, Exception):  # Ctrl-C is not a failed save
                raise error from None
        reasons = {rank: describe(error) for rank, error in errors.items()}
        raise CheckpointError(f"{what}: {summary(reasons, ranks.size)}") from failed
