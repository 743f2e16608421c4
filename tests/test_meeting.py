"""Ranks of one start find each other on a store that holds what earlier starts, killed anywhere, have left there."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import DistStoreError, PrefixStore, TCPStore

from run.meeting import fresh_store

RANKS = 4


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(store: TCPStore) -> TCPStore:
    return TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)


def start(store: TCPStore, ranks: range = range(RANKS), timeout_s: float = 30) -> list[PrefixStore | str]:
    """What each rank finds, or why it does not; each with a connection of its own, as processes have."""

    def meet(rank: int) -> PrefixStore | str:
        try:
            return fresh_store(client(store), rank, RANKS, timeout_s)
        except DistStoreError as error:
            return str(error)

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(meet, ranks))


def test_each_start_has_a_store_of_its_own_that_all_its_ranks_share(store):
    for _ in range(3):
        first, *others = start(store)
        assert not first.check(["rank"])
        first.set("rank", "0")
        assert all(other.get("rank") == b"0" for other in others)


def test_ranks_that_were_killed_while_they_met_do_not_mislead_the_next_ones(store):
    assert start(store, range(RANKS - 1), 0.3) == [f"ranks [{RANKS - 1}] did not come"] + [
        "rank 0 did not gather all ranks"
    ] * (RANKS - 2)
    assert start(store, range(1, RANKS), 0.3) == ["rank 0 did not gather all ranks"] * (RANKS - 1)
    first, *others = start(store)
    first.set("key", "new")
    assert all(other.get("key") == b"new" for other in others)


def test_a_rank_that_heard_a_rank_0_which_died_hears_the_next_one(store):
    found: dict[int, PrefixStore] = {}

    def later(rank: int) -> None:
        found[rank] = fresh_store(client(store), rank, 3, 30)

    thread = threading.Thread(target=later, args=(1,))
    thread.start()
    with pytest.raises(DistStoreError, match=r"ranks \[2\] did not come"):  # rank 1 has heard this one
        fresh_store(client(store), 0, 3, 0.5)
    last = threading.Thread(target=later, args=(2,))
    last.start()
    first = fresh_store(client(store), 0, 3, 30)
    for each in (thread, last):
        each.join(30)
    first.set("key", "value")
    assert found[1].get("key") == found[2].get("key") == b"value"
