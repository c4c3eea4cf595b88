"""Checks on the record of the steps are judged while training goes on, and each finding is said once."""

import logging
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch import nn

import diag
from diag import Result, Verdict, instrument, measured
from diag.run.rows import row_columns, row_dtype
from diag.snapshot.history import History
from diag.watching.measure.live import RECENT_ROWS, Trace, is_floor


@dataclass(frozen=True, kw_only=True, eq=False)
class Height(Result):
    loss: float = measured("the last loss")

    def verdict(self):
        high = self.loss > 10
        return Verdict(
            "alarm" if high else "ok", f"The loss is {self.loss:.3g}.", advice="Look.", cause="high" * high
        )

    def plot(self, ax):
        ax.bar(["loss"], [self.loss])


@instrument(source="none")
def height(history: History) -> Height:
    """The last loss."""
    return Height(loss=float(history.loss[-1]))


@pytest.fixture
def with_height(monkeypatch):
    from diag.registry import find

    monkeypatch.setattr("diag.watching.measure.measuring.find", lambda n: height if n == "height" else find(n))


def train(steps, factor, run=None):
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 1), torch.randn(8, 4), torch.randn(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with diag.watch(model, instruments=["height"], run=run) as watcher:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            watcher.loss(loss := factor(step) * nn.functional.mse_loss(model(x), y))
            loss.backward()
            optimizer.step()
    return watcher


def test_a_finding_is_said_once_at_the_step_at_which_it_is_judged(with_height, caplog, tmp_path):
    with caplog.at_level(logging.WARNING, "diag"):
        watcher = train(40, lambda step: 1e3 if step >= 5 else 1.0, tmp_path / "run")
    said = [r for r in caplog.records if r.name == "diag"]
    assert len(said) == 1 and said[0].levelno == logging.ERROR
    assert "The loss is" in said[0].message and "Look." in said[0].message
    events = [e for e in watcher.run.events if e.kind == "finding"]
    assert len(events) == 1 and 5 <= events[0].step <= 10  # step 10 is judged whatever the time


def test_a_healthy_run_says_nothing(with_height, caplog):
    with caplog.at_level(logging.WARNING, "diag"):
        watcher = train(40, lambda step: 1.0)
    assert not [r for r in caplog.records if r.name == "diag"]
    assert not [e for e in watcher.run.events if e.kind == "finding"]


def test_the_floor_is_geometric():
    assert [s for s in range(1, 3001) if is_floor(s)] == [
        1, 2, 3, 5, 7, 10, 14, 20, 30, 100, 300, 1000, 3000,
    ]  # fmt: skip


def test_a_trace_keeps_the_last_rows_whole_and_thins_the_others_evenly():
    dtype = row_dtype(row_columns(3))
    trace = Trace(dtype)
    table = numpy.zeros(1, dtype)
    for step in range(1, 20_001):
        table["steps"] = step
        trace.add(table)
    steps = trace.rows()["steps"]
    assert (numpy.diff(steps) > 0).all() and len(steps) <= 1024 + 1
    assert list(steps[-512:]) == list(range(20_001 - 512, 20_001))
    earlier = numpy.diff(steps[:-512][:-1])
    assert earlier.min() == earlier.max()  # every 2^k-th


def test_the_first_loss_that_is_lost_stays_in_the_thinned_record():
    dtype = row_dtype(row_columns(2))
    trace = Trace(dtype)
    for step in range(1, 4001):
        row = numpy.zeros(1, dtype)
        row["steps"], row["loss_finite"] = step, step < 645
        trace.add(row)
    rows = trace.rows()
    lost = rows["steps"][~rows["loss_finite"]]
    assert lost[0] == 645 and len(rows) <= 2 * RECENT_ROWS + 1
    assert (numpy.diff(rows["steps"].astype(int)) > 0).all()
