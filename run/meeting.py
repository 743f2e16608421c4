"""A store for the process group of one start of all ranks, on a store that may have served earlier ones.

torchrun keeps one TCPStore for all restarts of a run (torch 2.13: `DynamicRendezvousHandler.next_rendezvous` shares it)
and process groups write under the same keys each time. A restarted rank may then read where a rank that was killed
used to listen, and wait for it until the timeout. Restart counts of torchrun's agents are no way out: they differ
between nodes. So rank 0 names each start anew, and tells each rank under a key that only this process of it can know.

    hello/R            rank R's latest process
    welcome/PROCESS    the name of the start, from rank 0
    ack/NAME/R         rank R has heard it
    go/NAME            all have
"""

from __future__ import annotations

import time
from uuid import uuid4

from torch.distributed import DistStoreError, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

PAUSE_S = 0.02


def fresh_store(store: Store, rank: int, world_size: int, timeout_s: float) -> PrefixStore:
    """A part of `store` in which only this start of all ranks has written. Collective.

    Raises DistStoreError after `timeout_s` seconds, naming on rank 0 the ranks that did not come.
    """
    me, end = uuid4().hex, time.monotonic() + timeout_s
    if rank == 0:
        return PrefixStore(_gather(store, me, set(range(1, world_size)), end), store)
    store.set(f"hello/{rank}", me)
    name = None
    while name is None or not store.check([f"go/{name}"]):
        if store.check([f"welcome/{me}"]) and (heard := store.get(f"welcome/{me}").decode()) != name:
            name = heard  # another one than before: rank 0 was started again meanwhile
            store.set(f"ack/{name}/{rank}", "")
        _pause(end, "rank 0 did not gather all ranks")
    return PrefixStore(name, store)


def _gather(store: Store, name: str, missing: set[int], end: float) -> str:
    """Tell `name` to the latest process of every missing rank until all have heard it."""
    while missing := {rank for rank in missing if not store.check([f"ack/{name}/{rank}"])}:
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", name)
        _pause(end, f"ranks {sorted(missing)} did not come")
    store.set(f"go/{name}", "")
    return name


def _pause(end: float, what: str) -> None:
    if time.monotonic() > end:
        raise DistStoreError(what)
    time.sleep(PAUSE_S)
