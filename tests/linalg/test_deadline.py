"""A limit of time and memory, asked between units of work, on a clock that the test moves."""

import math
import mmap

import pytest
import torch

from diag.errors import Stopped
from diag.linalg.deadline import NEVER, Deadline, used_memory
from diag.linalg.operator import LinearOperator


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_it_stops_when_half_of_another_unit_would_not_fit():
    clock = Clock()
    deadline = Deadline(10.0, why="twice its estimate of 5 s", clock=clock)
    for clock.now in (2.0, 4.0, 6.0, 8.0):  # units of two seconds: another one ends at the limit
        deadline.check()
    clock.now = 9.5  # a unit of 1.5 would end at 11
    with pytest.raises(Stopped, match=r"stopped after 9.5 s; it may take 10 s, twice its estimate of 5 s\."):
        deadline.check()
    assert deadline.reason.startswith("The measurement was stopped")


def test_it_stops_where_more_memory_is_held_than_it_may_add():
    clock, held = Clock(), [5 << 30]
    deadline = Deadline(memory=1 << 30, clock=clock, used=lambda: held[0])
    held[0] = 6 << 30
    deadline.check()
    clock.now, held[0] = 1.0, 7 << 30
    with pytest.raises(Stopped, match=r"stopped after 1 s, when it held 2.00 GiB; it may take 1.00 GiB of memory"):
        deadline.check()


def test_without_limits_it_looks_at_nothing():
    def broken():
        raise AssertionError

    deadline = Deadline(clock=lambda: 0.0, used=broken)
    deadline.check()
    assert NEVER.seconds == math.inf and not NEVER.reason


def test_the_memory_of_this_process_is_seen():
    before = used_memory()
    size = 1 << 26
    block = mmap.mmap(-1, size)  # of the system: malloc might give a block that was used before and let go
    torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    assert used_memory() - before > 0.9 * size


def test_an_operator_asks_before_each_product():
    clock = Clock()
    operator = LinearOperator.from_matrix(torch.eye(3))
    operator.deadline = Deadline(1.0, clock=clock)
    operator.matvec(torch.ones(3))
    shifted = operator.shifted(2.0)  # what is made of it asks too
    clock.now = 1.5
    with pytest.raises(Stopped):
        shifted.matvec(torch.ones(3))
    assert operator.num_products == 1
