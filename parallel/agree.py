"""All ranks succeed, or all of them raise the same error.

A rank that fails alone (its disk is full, its file is damaged) leaves the others waiting in the next collective.
`Ranks.agree` runs a piece of work on every rank, brings the results to rank 0, and broadcasts one verdict. It is
the only collective of the checkpoint code besides those of torch.distributed.checkpoint, and it uses only the
group that it was given; without a process group it is a plain function call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from errors import CheckpointError

T = TypeVar("T")
R = TypeVar("R")
SHOWN = 4  # failures spelled out in one message


@dataclass(frozen=True)
class Ranks:
    """This process among those that save or load together; `rank` and `size` are those of `group`."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """The ranks of `group` (None: all, or this process alone if no process group is initialised)."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def agree(self, work: Callable[[], T], reduce: Callable[[list[T]], R], what: str) -> R:
        """Run `work` on every rank and `reduce` on rank 0 over its results; every rank returns the reduction.

        If either fails anywhere, every rank raises CheckpointError("<what>: rank <r>: <reason>; ..."); a failure
        that no user can cause (not OSError, not CheckpointError) is raised as it is where it happened.
        """
        failure: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as error:
            failure = error
        answers = self._gather((result, failure and describe(failure)))
        verdict: tuple[Any, str | None] = (None, None)
        if self.rank == 0:
            reasons = {rank: text for rank, (_, text) in enumerate(answers) if text}
            if not reasons:
                try:
                    verdict = (reduce([result for result, _ in answers]), None)
                except Exception as error:
                    failure, reasons = error, {0: describe(error)}
            if reasons:
                verdict = (None, f"{what}: {summary(reasons, self.size)}")
        reduction, problem = self._broadcast(verdict)
        if problem is None:
            return reduction
        if failure is not None and not isinstance(failure, (OSError, CheckpointError)):
            raise failure
        raise CheckpointError(problem) from failure

    def _gather(self, item: Any) -> list[Any]:
        """The items of all ranks on rank 0, an empty list elsewhere."""
        if self.size == 1:
            return [item]
        items = [None] * self.size if self.rank == 0 else None
        dist.gather_object(item, items, group=self.group, group_dst=0)
        return items or []

    def _broadcast(self, item: Any) -> Any:
        if self.size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, group=self.group, group_src=0)
        return items[0]


def describe(error: BaseException) -> str:
    """One line for a message: our own errors and the system's as they are, others with their type."""
    return str(error) if isinstance(error, (OSError, CheckpointError)) else f"{type(error).__name__}: {error}"


def summary(reasons: dict[int, str], size: int) -> str:
    """The distinct reasons, each with the first rank that gave it; ranks are not named if there is only one."""
    first = {text: rank for rank, text in reversed(sorted(reasons.items()))}
    parts = [f"rank {rank}: {text}" if size > 1 else text for text, rank in reversed(first.items())]
    more = [f"and {len(parts) - SHOWN} more"] if len(parts) > SHOWN else []
    return "; ".join(parts[:SHOWN] + more)
