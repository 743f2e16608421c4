"""The directory `RUN/checkpoints`: names, which checkpoint is newest, how one appears and disappears.

    RUN/checkpoints/step-00000010/       complete: manifest.json was written last, then the directory was renamed
    RUN/checkpoints/step-00000020.tmp/   being written or deleted; a leftover is removed by the next save
    RUN/checkpoints/latest               the name of the checkpoint saved last, replaced by rename

A kill at any moment leaves every finished checkpoint as it was. The pointer decides what "newest" means, because
a run that was taken back to an earlier step leaves directories with higher numbers behind: they come last in the
order, after the pointed one and its predecessors.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from parallel.manifest import sync, write_text

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
POINTER = "latest"
UNFINISHED = ".tmp"


def folder_name(step: int) -> str:
    """The directory name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def pointed(root: Path) -> Path | None:
    """The checkpoint in `root` that its pointer names; None if there is no pointer or it names none, or a path."""
    pointer = root / POINTER
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    target = root / name
    return target if target.name == name and _step(target) is not None and target.is_dir() else None


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else None


def by_age(root: Path) -> list[Path]:
    """Checkpoint directories in `root`, newest first: the pointed one, earlier steps, then abandoned later ones.

    A run may save meanwhile: what was pointed at need not be there any more.
    """
    newest = pointed(root)
    if not root.is_dir():
        return []
    steps = {path: step for path in root.iterdir() if (step := _step(path)) is not None and path.is_dir()}
    last = steps[newest] if newest in steps else max(steps.values(), default=0)
    return sorted(steps, key=lambda path: (steps[path] > last, -steps[path]))


def before(root: Path, step: int) -> list[Path]:
    """Checkpoint directories in `root` of at most `step` steps, the latest first."""
    found = {path: number for path in by_age(root) if (number := _step(path)) is not None and number <= step}
    return sorted(found, key=lambda path: -found[path])


def begin(root: Path, step: int) -> Path:
    """Remove what killed saves left behind and make the empty directory to write into. Raises OSError."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"*{UNFINISHED}"):
        log.warning("removing %s, left behind by a save that did not finish", leftover)
        discard(leftover)
    folder = root / (folder_name(step) + UNFINISHED)
    folder.mkdir()
    return folder


def publish(unfinished: Path) -> Path:
    """Make a complete, synced directory the newest checkpoint: rename it, then move the pointer. Raises OSError.

    A checkpoint of the same step is replaced; it is the only case in which a kill can cost a checkpoint.
    """
    root = unfinished.parent
    final = root / unfinished.name.removesuffix(UNFINISHED)
    pointer = root / (POINTER + UNFINISHED)
    write_text(pointer, final.name + "\n")  # before the renames: what can fail for lack of space fails here
    replaced = root / f"{final.name}.old{UNFINISHED}"
    if final.exists():
        final.rename(replaced)
    try:
        unfinished.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync(root)
    pointer.replace(root / POINTER)
    sync(root)
    if replaced.exists():
        discard(replaced)
    return final


def set_aside(root: Path) -> Path | None:
    """Rename `root` to the first free `root`.N, for a run that starts anew in the same place; None if there is none."""
    if not root.is_dir():
        return None
    number = 1
    while (aside := root.with_name(f"{root.name}.{number}")).exists():
        number += 1
    return root.rename(aside)


def prune(root: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints (never the pointed one); a failure is logged, not raised."""
    for old in by_age(root)[max(keep, 1) :]:
        try:
            discard(old.rename(old.with_name(old.name + UNFINISHED)))
        except OSError as error:
            log.warning("cannot delete the old checkpoint %s: %s", old, error)


def abandon(folder: Path) -> None:
    """Remove the directory of a failed save; a failure is logged, so that it does not hide the first one."""
    try:
        discard(folder)
    except OSError as error:
        log.warning("cannot delete the unfinished checkpoint %s: %s", folder, error)


def discard(path: Path) -> None:
    """Delete a file or a whole directory; nothing happens if it is not there. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
