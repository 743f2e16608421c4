"""Sharded checkpoints: each rank gives the fragments that it holds, the checkpoint knows only logical tensors.

    RUN/checkpoints/step-00000010/
        __<rank>_<n>.distcp, .metadata   torch.distributed.checkpoint: boxes of logical tensors, and their index
        meta.json                        step, number of ranks, logical shapes, and what the run wants to find again
        manifest.json                    size and hash of every file above, written last

Keys are `<kind>/<parameter>` ("weight/layers.0.attention.qkv.weight", "exp_avg.codes/...") and, for what belongs to a
rank rather than to the model (states of generators, residuals of error feedback), `own/<kind>/<rank>`. Only tensors go
through DCP; everything else is JSON; nothing is unpickled without restriction (dcp_index.py). Because a key speaks of
the whole logical tensor, a checkpoint does not depend on the ZeRO stage or on the number of ranks that saved it.

Saving is three agreements of all ranks (agree.py): the directory is there; the data is written; every file is synced,
the manifest written and the directory renamed. Until that rename the older checkpoints and the pointer are as they
were; after any failure every rank raises the same CheckpointError and the unfinished directory is removed.

Loading is two: `resolve` (or `open_checkpoint`) verifies every file, each rank a share, and returns a `Checkpoint`;
`load` compares names, shapes and types with the live fragments and fills them in place.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from errors import CheckpointError
from lowprec.fragments import Shard
from parallel import catalog, dcp
from parallel.agree import Ranks
from parallel.aside import Aside
from parallel.dcp_index import INDEX_FILE, read_index, tensors
from parallel.manifest import FileRecord, read_manifest, seal, share, to_json, verify, write_manifest, write_text
from parallel.rectangles import stored_shape

log = logging.getLogger(__name__)

META_FILE = "meta.json"
OWN = "own"
WEIGHT = "weight"


class Fragment(Protocol):
    """A contiguous part of one parameter, and of its optimizer states, as the optimizer holds them.

    name: logical name of the parameter.
    shape: logical shape of the parameter, or of what `shard` says of it.
    offset: first element of the part in the row-major flattened tensor of `shape`.
    tensors: kind ("weight": the master if there is one, "exp_avg", ...) -> contiguous vector of the part's elements.
        `save` reads these tensors and `load` writes into them: they are views of live memory.
    per: kind -> elements of the parameter for each item of its vector, where that is not 1: the vector then belongs to
        one of ceil(elements / per) items, or with 0 it is a whole one, which every holder of the parameter has.
    shard: which part of the parameter `shape` is; None: all of it. What it does not own, another rank saves.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def per(self) -> Mapping[str, int]: ...
    @property
    def shard(self) -> Shard | None: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file was found as its manifest says. Made by `open_checkpoint`, never by hand."""

    path: Path
    step: int
    meta: dict[str, Any]  # what was given to `save`
    saved_ranks: int
    shapes: dict[str, tuple[int, ...]] = field(repr=False)  # parameter name -> logical shape
    index: Metadata = field(repr=False)


def save(
    run_dir: Path,
    step: int,
    fragments: Sequence[Fragment],
    meta: dict[str, Any],
    *,
    own: Mapping[str, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    keep: int = 3,
    aside: Aside | None = None,
) -> Path:
    """Write the checkpoint after `step` and make it the newest; return its directory. Collective over `group`.

    fragments: this rank's; over all ranks they hold every element once, or all ranks hold the same ones, which are
        then written once, spread over the ranks.
    meta: JSON-able, the same on all ranks (that of rank 0 is written).
    own: kind -> tensor of this rank alone, e.g. a generator's state; the same kinds on all ranks.
    keep: older checkpoints beyond this number are deleted afterwards.
    aside: who writes, in a process of its own, what lies in its memory.

    Raises CheckpointError on every rank if any rank fails; older checkpoints and the pointer are then untouched.
    """
    ranks = Ranks.of(group)
    root = Path(run_dir) / catalog.FOLDER
    folder = root / (catalog.folder_name(step) + catalog.UNFINISHED)
    what = f"cannot save the checkpoint of step {step}"
    state: dcp.State = {}

    def gather() -> dict[str, tuple[int, ...]]:
        state.update(_state(fragments, owned=True) | _own_state(own or {}, ranks.rank))
        return {part.name: part.shard.whole if part.shard else tuple(part.shape) for part in fragments}

    def prepare(per_rank: list[dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
        catalog.begin(root, step)
        return _merge(per_rank)

    def complete(per_rank: list[dict[str, FileRecord]]) -> Path:
        write_manifest(folder, {name: record for records in per_rank for name, record in records.items()})
        final = catalog.publish(folder)
        catalog.prune(root, keep)
        return final

    try:
        shapes = ranks.agree(gather, prepare, what)
        written = dcp.write(folder, state, ranks, what, aside=aside)
        content = {"step": step, "ranks": ranks.size, "shapes": shapes, "run": meta}
        return ranks.agree(lambda: _finish_files(folder, content, written, ranks.rank), complete, what)
    except Exception:
        ranks.agree(lambda: None, lambda _: catalog.abandon(folder), what)
        raise


def _state(fragments: Sequence[Fragment], *, owned: bool = False) -> dcp.State:
    """Views of the fragments' memory, keyed as in the checkpoint. owned: without what other ranks save."""
    state: dcp.State = {}
    for fragment in fragments:
        shard = fragment.shard or Shard.of_whole(tuple(fragment.shape))
        for kind, tensor in fragment.tensors.items():
            per = fragment.per.get(kind, 1)
            place = dcp.Place.of(shard, per, tensor.numel())
            shards = dcp.Shards(place.shape)
            shards.add(tensor, fragment.offset // per if per else 0, place, owned=owned)
            if shards.boxes:
                state.setdefault(f"{kind}/{fragment.name}", shards).boxes.update(shards.boxes)
    return state


def _own_state(own: Mapping[str, Tensor], rank: int) -> dcp.State:
    """What belongs to this rank alone, keyed as in the checkpoint."""
    return {f"{OWN}/{kind}/{rank}": _whole(tensor) for kind, tensor in own.items()}


def _merge(per_rank: list[dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """One table of shapes from those of all ranks, which must not contradict each other."""
    merged: dict[str, tuple[int, ...]] = {}
    for table in per_rank:
        for name, shape in table.items():
            if merged.setdefault(name, shape) != shape:
                raise ValueError(f"{name} has shape {shape} on one rank and {merged[name]} on another")
    return merged


def _finish_files(
    folder: Path, content: dict[str, Any], written: Mapping[str, FileRecord], rank: int
) -> dict[str, FileRecord]:
    """Sync what this rank wrote; rank 0 also writes meta.json and answers for the index."""
    if rank:
        return seal(folder, written, ())
    write_text(folder / META_FILE, to_json(content))
    return seal(folder, written, (META_FILE, INDEX_FILE))


def open_checkpoint(path: Path, group: dist.ProcessGroup | None = None) -> Checkpoint:
    """Verify the checkpoint in directory `path` and read what describes it. Collective over `group`.

    Each rank reads and hashes a share of the files. Raises CheckpointError on every rank, naming file and defect.
    """
    return _open(Path(path), Ranks.of(group))


def _open(path: Path, ranks: Ranks) -> Checkpoint:
    def check() -> None:
        verify(path, share(read_manifest(path), ranks.rank, ranks.size))

    def describe(_: list[None]) -> Checkpoint:
        content = _read_meta(path)
        return Checkpoint(
            path=path,
            step=content["step"],
            meta=content["run"],
            saved_ranks=content["ranks"],
            shapes={name: tuple(shape) for name, shape in content["shapes"].items()},
            index=read_index(path, set(read_manifest(path))),
        )

    return ranks.agree(check, describe, f"checkpoint {path} cannot be used")


def newest(run_dir: Path, group: dist.ProcessGroup | None = None, *, step: int | None = None) -> Checkpoint | None:
    """The newest valid checkpoint of a run, None if it has none at all. Collective over `group`.

    step: the latest one of at most so many steps instead
    A damaged one is named in the log and the next older one is taken. Raises CheckpointError if all are damaged.
    """
    ranks = Ranks.of(group)
    root = Path(run_dir) / catalog.FOLDER
    # Rank 0's view of the directory decides: another node may see a stale one.
    look = lambda: catalog.by_age(root) if step is None else catalog.before(root, step)  # noqa: E731
    candidates = ranks.agree(lambda: look() if ranks.rank == 0 else [], lambda found: found[0], f"cannot read {root}")
    for path in candidates:
        try:
            return _open(path, ranks)
        except CheckpointError as error:
            if ranks.rank == 0:
                log.error("DAMAGED CHECKPOINT, TRYING AN OLDER ONE: %s", error)
    if candidates:
        raise CheckpointError(
            f"no checkpoint in {root} is valid (tried {len(candidates)}; the log says why); "
            "choose another with --resume PATH, or start anew with --resume never"
        )
    return None


def resolve(run_dir: Path, how: str, group: dist.ProcessGroup | None = None) -> Checkpoint | None:
    """The checkpoint to resume from, verified. Collective over `group`.

    how: "auto": the newest valid one of the run, if any; "never": none; else the path of a checkpoint, or of a run,
    whose newest one is meant. Raises CheckpointError if a path was given and it is not a valid checkpoint.
    """
    if how == "never":
        return None
    if how == "auto":
        return newest(run_dir, group)
    return open_checkpoint(locate(Path(how)), group)


def set_aside(run_dir: Path) -> Path | None:
    """Keep the checkpoints of an earlier run under another name, so that a new run can start in the same directory.

    Returns where they are now, None if there were none. For one rank, before the first `save`. Raises CheckpointError.
    """
    root = Path(run_dir) / catalog.FOLDER
    try:
        return catalog.set_aside(root)
    except OSError as error:
        raise CheckpointError(f"cannot set the earlier checkpoints in {root} aside: {error.strerror}") from error


def locate(path: Path) -> Path:
    """The checkpoint directory that a user's path means: itself, or the one that a run's pointer names."""
    return catalog.pointed(path / catalog.FOLDER) or path


def load(
    checkpoint: Checkpoint,
    fragments: Sequence[Fragment],
    group: dist.ProcessGroup | None = None,
    *,
    optional: frozenset[str] = frozenset(),
) -> dict[str, Tensor]:
    """Fill the fragments' tensors in place; return what belonged to this rank alone. Collective over `group`.

    The fragments need not be cut as they were when saved. Tensors of the kinds in `optional` may be missing on either
    side: they stay as they are, or are not read. A rank's own tensors come back only if as many ranks load as saved;
    otherwise the result is empty, a warning is logged, and the caller begins anew.

    Raises CheckpointError if names, shapes or types differ, before any tensor is written.
    """
    ranks = Ranks.of(group)
    state: dcp.State = {}

    def gather() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        stored = tensors(checkpoint.index)
        found = _state(fragments).items()
        state.update({key: shards for key, shards in found if key in stored or key.split("/")[0] not in optional})
        return {key: (shards.shape, shards.dtype) for key, shards in state.items()}

    ranks.agree(
        gather,
        functools.partial(_compare, checkpoint, optional),
        f"checkpoint {checkpoint.path} is of another model or optimizer",
    )
    own: dict[str, Tensor] = {}
    if ranks.size == checkpoint.saved_ranks:
        own = _empty(checkpoint, lambda key: key.startswith(f"{OWN}/") and key.endswith(f"/{ranks.rank}"))
    elif ranks.rank == 0:
        log.warning(
            "the checkpoint holds random states and residuals of %d ranks, this run has %d: they begin anew",
            checkpoint.saved_ranks,
            ranks.size,
        )
    dcp.read(checkpoint.path, checkpoint.index, state | {key: _whole(tensor) for key, tensor in own.items()}, ranks)
    return {key.split("/")[1]: tensor for key, tensor in own.items()}


def load_weights(path: Path) -> dict[str, Tensor]:
    """All weights of the verified checkpoint `path` (or of a run's newest), by name, as logical CPU tensors.

    Types are as stored, FP32 where the run had FP32 masters; scaled FP16 masters come back as FP32. Not collective:
    this process reads everything. Raises CheckpointError.
    """
    checkpoint = _open(locate(Path(path)), Ranks())
    stored = _empty(checkpoint, lambda key: key.startswith((f"{WEIGHT}/", f"{WEIGHT}.scale/")))
    dcp.read(checkpoint.path, checkpoint.index, {key: _whole(t) for key, t in stored.items()}, Ranks())
    by_name = {key.removeprefix(f"{WEIGHT}/"): t for key, t in stored.items() if key.startswith(f"{WEIGHT}/")}
    for name in by_name:
        if (scale := stored.get(f"{WEIGHT}.scale/{name}")) is not None:
            by_name[name] = by_name[name].float() * scale
    return {name: tensor.view(checkpoint.shapes[name]) for name, tensor in by_name.items()}


def read_meta(path: Path) -> dict[str, Any]:
    """What was given to `save` as `meta`, from the checkpoint `path` (or a run's newest); only this file is verified.

    Raises CheckpointError.
    """
    return _read_meta(locate(Path(path)))["run"]


def _read_meta(path: Path) -> dict[str, Any]:
    record = read_manifest(path).get(META_FILE)
    if record is None:
        raise CheckpointError(f"{path}: the manifest does not list {META_FILE}")
    verify(path, {META_FILE: record})
    return json.loads((path / META_FILE).read_text(encoding="utf-8"))


def _empty(checkpoint: Checkpoint, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Uninitialised CPU tensors of the stored shape for the keys that are wanted."""
    return {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in tensors(checkpoint.index).items()
        if wanted(key)
    }


def _whole(tensor: Tensor) -> dcp.Shards:
    """A contiguous tensor as the only box of itself."""
    shards = dcp.Shards(tuple(tensor.shape))
    shards.add(tensor.view(-1), 0, dcp.Place.of(Shard.of_whole(tuple(tensor.shape)), 1, tensor.numel()))
    return shards


def _compare(
    checkpoint: Checkpoint, optional: frozenset[str], per_rank: list[dict[str, tuple[tuple[int, ...], torch.dtype]]]
) -> None:
    """Raise CheckpointError listing where saved and live tensors (of all ranks) differ."""
    live = {key: entry for table in per_rank for key, entry in table.items()}
    saved = {
        key: (_logical(checkpoint, key, tuple(entry.size)), entry.properties.dtype)
        for key, entry in tensors(checkpoint.index).items()
        if not key.startswith(f"{OWN}/") and (key in live or key.split("/")[0] not in optional)
    }
    differing = sorted(key for key in live.keys() | saved.keys() if live.get(key) != saved.get(key))
    if not differing:
        return
    lines = [f"{key}: saved {_brief(saved.get(key))}, needed {_brief(live.get(key))}" for key in differing[:5]]
    more = [f"... and {len(differing) - 5} more"] if differing[5:] else []
    raise CheckpointError("\n  ".join([f"{len(differing)} tensors differ", *lines, *more]))


def _logical(checkpoint: Checkpoint, key: str, size: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a stored size stands for: the parameter's, unless the tensor counts something else."""
    shape = checkpoint.shapes.get(key.split("/", 1)[1])
    return shape if shape is not None and stored_shape(shape) == size else size


def _brief(entry: tuple[tuple[int, ...] | None, torch.dtype] | None) -> str:
    return "not at all" if entry is None else f"{str(entry[1]).removeprefix('torch.')} {list(entry[0] or ())}"


if __name__ == "__main__":
    from parallel.commands import main

    raise SystemExit(main(sys.argv[1:]))
