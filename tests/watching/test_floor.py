"""Checks that look at the probe set run at set steps whatever the budget; what is expensive keeps its limits."""

import itertools
import math
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag import Result, Verdict, instrument, measured
from diag.errors import text_of
from diag.watching.measure.floor import FLOOR_EXAMPLES, Floor, next_floor

MEASURING = "diag.watching.measure.measuring.find"


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen(Result):
    """What a check was given."""

    examples: int = measured("examples")
    largest: float = measured("largest output")

    def verdict(self):
        return Verdict("alarm" if self.largest > 5 else "ok", f"The largest output is {self.largest:.3g}.")


@instrument(source="a test", kind="check")
def large_outputs(logits) -> Seen:
    """Whether an output is large."""
    return Seen(examples=len(logits), largest=float(logits.abs().max()))


@instrument(source="a test", passes=lambda settings: 1.0)
def slow(losses_at) -> Seen:
    """Takes a pass at a time, for ever."""
    while True:
        losses_at(losses_at.center)


@instrument(source="a test", kind="check")
def slow_check(loss_at, params) -> Seen:
    """The same as a check."""
    while True:
        loss_at(params)


OURS = {i.name: i for i in (large_outputs, slow, slow_check)}


@pytest.fixture(autouse=True)
def with_ours(monkeypatch):
    """Our instruments, and time enough for a look on a machine that does other things as well."""
    from diag.registry import find

    monkeypatch.setattr("diag.watching.measure.runner.LEAST_LOOK", 60.0)
    monkeypatch.setattr("diag.watching.measure.runner.SPARE", 60.0)
    monkeypatch.setattr(MEASURING, lambda name: OURS.get(name) or find(name))


def train(watched, model, steps=1, batch=16, seconds=0.0, lr=0.05):
    x, y = torch.randn(640, 4), torch.randint(0, 3, (640,))
    optimizer = torch.optim.SGD(model.parameters(), lr)
    with watched as watcher:
        for step in range(steps):
            rows = slice(step * batch % 640, step * batch % 640 + batch)
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            time.sleep(seconds)
        closing = time.perf_counter()
    return watcher, time.perf_counter() - closing


def test_the_steps_of_the_floor():
    steps = list(itertools.accumulate(range(8), lambda step, _: next_floor(step), initial=0))
    assert steps[1:] == [1, 10, 30, 100, 300, 1000, 3000, 10_000]
    assert next_floor(11) == 30 and next_floor(45) == 100
    floor = Floor(["a"], last_step=45)
    assert not floor.is_due(99) and floor.is_due(100) and floor.is_new(46)
    floor.looked(100)
    assert not floor.is_due(299) and not floor.is_new(100)
    for _ in range(3):
        floor.stopped("a")
    assert not floor.is_due(300) and not floor.names


@pytest.mark.parametrize("budget", [0, 1e-9, 0.05])
def test_checks_look_at_the_floor_whatever_the_budget(budget):
    model = nn.Linear(4, 3)
    watcher, _ = train(diag.watch(model, instruments=["large_outputs"], budget=budget), model, steps=45)
    run = watcher.run
    assert [record.step for record in run.records] == [1, 10, 30, 45]
    assert run.check_seconds > 0 and run.always_on_seconds > 0
    assert run.check_seconds + run.always_on_seconds <= run.watch_seconds + 1e-6


def test_at_most_256_examples_are_looked_at(monkeypatch):
    seen = []

    def look(logits, **settings):
        seen.append(len(logits))
        return Seen(examples=len(logits), largest=0.0)

    monkeypatch.setattr(large_outputs, "function", look)
    look.__name__ = "large_outputs"
    model = nn.Linear(4, 3)
    train(diag.watch(model, instruments=["large_outputs"]), model, steps=45)
    # One batch at step 1, ten of them at step 10, then the first 256.
    assert seen == [16, 160, FLOOR_EXAMPLES, FLOOR_EXAMPLES]


def test_a_finding_is_said_once_at_once_and_to_the_users_function(caplog):
    told = []

    def on_finding(finding):
        told.append((finding.first_step, finding.instrument, str(finding.verdict.level)))
        raise RuntimeError("the user's own")

    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.mul_(100)
    watched = diag.watch(model, instruments=["large_outputs"], on_finding=on_finding)
    watcher, _ = train(watched, model, steps=12, lr=1e-6)
    assert told == [(1, "large_outputs", "alarm")]
    assert [f.verdict.level for f in watcher.findings] == ["alarm"] and watcher.findings[0].last_step == 1
    assert sum("The largest output is" in record.getMessage() for record in caplog.records) == 1
    notes = [e.text for e in watcher.run.events if e.kind == "note"]
    assert any("on_finding= raised RuntimeError: the user's own" in note for note in notes)


def test_a_measurement_is_stopped_at_twice_its_estimate_and_says_so():
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))
    watcher, _ = train(diag.watch(model, instruments=["slow"], budget=0.5), model, steps=40, seconds=0.02)
    reasons = [outcome.reason for _, outcome in watcher.run.outcomes]
    assert reasons and all("The measurement was stopped after" in r and "estimate" in r for r in reasons)
    assert all(record.seconds > 0 for record in watcher.run.records)


def test_a_check_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr("diag.watching.measure.runner.LEAST_LOOK", 0.02)
    model = nn.Linear(4, 3)
    watcher, _ = train(diag.watch(model, instruments=["slow_check"]), model, steps=300)
    reasons = [outcome.reason for _, outcome in watcher.run.outcomes]
    assert len(reasons) == 3 and all("stopped after" in r for r in reasons)


def test_measuring_at_once_is_not_stopped():
    limits = []

    def unlimited(losses_at, **settings):
        limits.append(losses_at._snapshot.deadline.seconds)
        return Seen(examples=1, largest=0.0)

    model = nn.Linear(4, 3)
    original, slow.function = slow.function, unlimited
    unlimited.__name__ = "slow"
    try:
        x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
        with diag.watch(model, instruments=["slow"], budget=1e-9) as watcher:
            F.cross_entropy(model(x), y).backward()
            torch.optim.SGD(model.parameters(), 0.1).step()
            watcher.measure("slow")
    finally:
        slow.function = original
    assert limits[0] == math.inf


def test_an_error_that_cannot_tell_its_text():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    assert text_of(Mute()) == "Mute, whose text is unavailable"
    assert text_of(ValueError("a")) == "a"
