"""The index of a checkpoint (`.metadata`), read without trusting it.

torch.distributed.checkpoint writes the index as a pickle and reads it back without restriction; whoever can place
a file could run code. Here only DCP's own metadata classes exist for the unpickler, no entry may be anything but a
tensor, and the data must lie in the files that the manifest lists.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.serialization import _get_layout

from errors import CheckpointError
from parallel.agree import describe

INDEX_FILE = ".metadata"
ADMITTED: dict[tuple[str, str], Any] = {
    **{("torch", str(d).removeprefix("torch.")): d for d in vars(torch).values() if isinstance(d, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
}


class _IndexUnpickler(pickle.Unpickler):
    """Knows the few classes that an index of ours is made of; a name that is not listed is never imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise CheckpointError(f"{INDEX_FILE} asks for {module}.{name}, which no checkpoint needs; not loaded")
        return ADMITTED[module, name]


def tensors(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """Key -> shape, type and boxes of every tensor in the checkpoint."""
    entries = index.state_dict_metadata.items()
    return {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def read_index(folder: Path, files: set[str]) -> Metadata:
    """The DCP index of a checkpoint whose data lies in `files` (names inside `folder`).

    Raises CheckpointError if it is unreadable, names anything but DCP's metadata classes, holds entries that are
    not tensors, or points outside `files`.
    """
    path = folder / INDEX_FILE
    try:
        with path.open("rb") as stream:
            index = _IndexUnpickler(stream).load()
        places = dict(index.storage_data)
        strange = list(index.state_dict_metadata.keys() - tensors(index).keys())
        outside = [info.relative_path for info in places.values() if info.relative_path not in files]
        holes = [
            key
            for key, entry in tensors(index).items()
            for chunk in entry.chunks
            if MetadataIndex(key, chunk.offsets) not in places
        ]
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path} cannot be read: {describe(error)}") from error
    for names, defect in ((strange, "are not tensors"), (outside, "are not its files"), (holes, "have no data")):
        if names:
            raise CheckpointError(f"{path} is not one of ours: {names[:3]} {defect}")
    return index
