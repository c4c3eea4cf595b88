"""Every instrument that makes passes asks its snapshot's deadline; stopped, it says so and leaves no trace."""

import itertools

import pytest

from diag.curvature.neighbourhood.losses_at import losses_at
from diag.linalg.deadline import Deadline
from diag.registry import attempt, instruments
from diag.result import Result, Skipped
from diag.testing import classification, leaves_no_trace


def ticking():
    """A clock that moves by one second whenever somebody looks at it."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


EXPENSIVE = [n for n, i in instruments().items() if not i.from_history]


@pytest.mark.parametrize("name", EXPENSIVE)
def test_an_instrument_stops_between_two_units_of_work(name):
    problem = classification()
    unlimited = problem.snapshot(micro_batch=30, deadline=Deadline(1e9, clock=ticking()))
    outcome = attempt(unlimited, instruments()[name])
    if not isinstance(outcome, Result):
        pytest.skip(f"not on this problem: {outcome.reason}")
    checks = int(unlimited.deadline.elapsed)
    assert checks > 1, f"{name} never asks its deadline"
    for limit in {1, checks // 2}:
        snapshot = problem.snapshot(micro_batch=30, deadline=Deadline(limit, why="a test's", clock=ticking()))
        with leaves_no_trace(problem.model):
            outcome = attempt(snapshot, instruments()[name])
        assert isinstance(outcome, Skipped)
        assert outcome.reason == snapshot.deadline.reason
        assert outcome.reason.startswith("The measurement was stopped after")


def test_losses_at_other_parameters_ask_at_every_batch():
    snapshot = classification().snapshot(micro_batch=30, deadline=Deadline(1e9, clock=ticking()))
    elsewhere = losses_at(snapshot)
    before = snapshot.deadline.elapsed
    elsewhere(elsewhere.center + 0.1)
    assert snapshot.deadline.elapsed - before - 1 >= snapshot.num_examples / 30 > 1
