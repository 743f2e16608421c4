"""What our ZeRO optimizer is told, and the fragments and ranges that it cuts parameters and buckets into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lowprec.fragments import Fragment
from lowprec.gradients import GradientsConfig, GradientStore
from lowprec.updater import Updater


@dataclass(kw_only=True)
class Plan:
    """What the optimizer is told beside DeepSpeed's own arguments.

    names:    id of a parameter -> its name
    updater:  of this rank
    gather:   payload of the updated weights' all-gather, or "exact"
    replicas: stage 0: the group over which gradients are averaged; else None
    nodes:    (ranks of this node, ranks of this place on all nodes) of a reduction in two levels; else None
    """

    names: dict[int, str]
    updater: Updater
    gradients: GradientsConfig
    gather: str = "exact"
    replicas: Any = None
    nodes: tuple[Any, Any] | None = None


@dataclass
class Piece:
    """A fragment, where it lies (elements [start, stop) of the rank's partition of `group`), and its gradient."""

    fragment: Fragment
    group: int
    start: int
    stop: int
    store: GradientStore


@dataclass(frozen=True, order=True)
class Part:
    """A range of a bucket that one rank owns; sorted by destination, then by place in the flat buffer."""

    owner: int
    place: int  # in the group's flat buffer
    param_id: int = field(compare=False)
    start: int = field(compare=False)  # in the bucket
    size: int = field(compare=False)
