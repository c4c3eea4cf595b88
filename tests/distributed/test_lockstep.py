"""Passes in which ranks wait for each other: a rank that fails, or goes another way, stops all of them."""

import threading

import pytest
import torch
import torch.distributed as dist

from diag.distributed.lockstep import Lockstep
from diag.distributed.together import Together
from diag.errors import Unsupported

WORLD = 2


def on_every_rank(work):
    """What `work(lock, rank)` gives or raises, by rank; the ranks are threads, which tell each other."""
    store, said, found = dist.HashStore(), {}, {}

    def one(rank):
        group = dist.ProcessGroupGloo(store, rank, WORLD)
        together = Together(
            torch.device("cpu"), group, tell=lambda what: said.update({rank: what}), told=lambda r: said.get(r, "")
        )
        try:
            found[rank] = work(Lockstep(together), rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(WORLD)]


def test_messages_are_gathered_and_summed():
    def work(lock, rank):
        with lock.one_pass():
            table = lock.gathered(torch.tensor([1.0, 2.0]) + 10 * rank, 3)
            part = lock.summed_parts(torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (1 + rank), 4)
            return table.tolist(), part.tolist(), lock.everywhere(rank == 0)

    first, last = on_every_rank(work)
    assert first == ([[1.0, 2.0], [11.0, 12.0]], [3.0, 6.0], False)
    assert last == ([[1.0, 2.0], [11.0, 12.0]], [9.0, 12.0], False)


def test_a_rank_that_fails_says_why_to_the_others():
    def work(lock, rank):
        with lock.one_pass():
            if rank:
                raise ValueError("no such label")
            lock.gathered(torch.ones(2), 3)

    first, last = on_every_rank(work)
    assert isinstance(last, ValueError)
    assert isinstance(first, Unsupported)
    assert str(first) == "Rank 1 could not compute its share (ValueError: no such label)."


@pytest.mark.parametrize("ends", [False, True])
def test_ranks_that_go_different_ways_stop_and_can_go_on(ends):
    """Also where one of them has come to the end of its pass."""

    def work(lock, rank):
        try:
            with lock.one_pass():
                if rank or not ends:
                    lock.gathered(torch.ones(2), 3 + 2 * rank)
        except Unsupported as error:
            refused = str(error)
        with lock.one_pass():
            return refused, lock.totals(torch.ones(1)).tolist()

    for refused, totals in on_every_rank(work):
        assert refused.startswith("The ranks take different paths through the network")
        assert totals == [2.0]
