"""`Saver`: when the checkpoints of a run are written, now or behind the training that goes on.

Behind: the tensors are copied to the CPU, then a thread of each rank has another process hash and write the copies
(`Aside`), and publishes them. Its agreements run over a process group of their own, so that
they cannot mix with training's. One save is in flight at most: the next one first waits for it. An error surfaces
there, or at the end of the run; the older checkpoints are then as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lowprec.fragments import Fragment
from parallel.aside import Aside
from parallel.checkpoint import save


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and how many are kept.

    interval: steps between checkpoints; the last step is saved too; 0: no checkpoints at all.
    keep: how many of the newest checkpoints stay on disk.
    behind: write from a copy, while training goes on; one save at most is in flight.
    """

    interval: int = 0
    keep: int = 3
    behind: bool = False

    def problems(self) -> list[str]:
        """What is wrong with the values, as messages for the user; empty if nothing is."""
        found = []
        if self.interval < 0:
            found.append(f"interval is {self.interval}; use a number of steps, or 0 for no checkpoints")
        if self.keep < 1:
            found.append(f"keep is {self.keep}; at least 1 checkpoint must stay")
        return found

    def due(self, step: int, last_step: int) -> bool:
        """Whether a checkpoint is to be saved after `step` of a run that ends with `last_step`."""
        return self.interval > 0 and (step % self.interval == 0 or step == last_step)


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """verify: prove a resume: every save notes the loss of its weights on the step's batch, and a resume computes it
    again before it goes on: the same bits on the same layout, within 1 % on another.
    """

    verify: bool = False

    def problems(self) -> list[str]:
        return []


class Saver:
    """Saves a run's checkpoints as `config` says. Made by all ranks together, after the process group.

    announce:  called in the thread of training with the directory of a checkpoint that is complete
    timeout_s: of the agreements behind training
    """

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, announce: Callable[[Path], object], timeout_s: int = 1800
    ) -> None:
        self._run_dir, self._config, self._announce = run_dir, config, announce
        self._pending: Future[Path] | None = None
        if config.behind:
            self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self._aside = Aside()
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, step: int, fragments: Sequence[Fragment], meta: dict[str, Any], own: Mapping[str, Tensor]) -> None:
        """Save the checkpoint after `step`; arguments as of `parallel.checkpoint.save`. Collective.

        Raises CheckpointError of this save, or of the one before it.
        """
        self.finish()
        if not self._config.behind:
            self._announce(save(self._run_dir, step, fragments, meta, own=own, keep=self._config.keep))
            return
        everything = [*(tensor for fragment in fragments for tensor in fragment.tensors.values()), *own.values()]
        copied = iter(self._aside.copies(everything))
        copies = [
            replace(fragment, tensors={kind: next(copied) for kind in fragment.tensors}) for fragment in fragments
        ]
        mine = {kind: next(copied) for kind in own}
        options = {"own": mine, "group": self._group, "keep": self._config.keep, "aside": self._aside}
        self._pending = self._threads.submit(save, self._run_dir, step, copies, meta, **options)

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._pending is not None and not self._pending.done()

    def poll(self) -> None:
        """Announce a save that has become complete since; a failed one is left to `finish`, where all ranks meet it."""
        if self._pending is not None and self._pending.done() and self._pending.exception() is None:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if there is one. Raises its CheckpointError, on every rank."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._announce(pending.result())
