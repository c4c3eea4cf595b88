"""Killed with SIGKILL at any moment, a watched run opens with everything that had been completed."""

import contextlib
import math
import os
import random
import signal
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import RunError
from tests.run.killing import killed_at, operations

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def victim(path, progress):
    """Train until killed; after each step its number goes through the pipe."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 3))
    x = torch.randn(64, 6)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    watcher = diag.watch(model, run=path, budget=math.inf, every=3, instruments=["softmax_collapse"], probe=(x, y))
    while True:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        os.write(progress, watcher.last_step.to_bytes(8, "little"))


def killed_after(path, seconds):
    """Start a victim, kill it some time after its first step, and give the last step that it reported."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(read)
            victim(path, write)
        os._exit(1)
    os.close(write)
    reported = os.read(read, 8)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the victim ended by itself"
    while chunk := os.read(read, 1 << 16):
        reported += chunk
    os.close(read)
    return int.from_bytes(reported[-8:], "little")


def test_nothing_completed_is_lost_at_fifteen_random_moments(tmp_path):
    brief(tmp_path / "first", lambda byte: None)  # what is imported late would be imported again in every child
    moments = random.Random(0)
    measured = 0
    for i in range(15):
        path = tmp_path / str(i)
        last = killed_after(path, moments.uniform(0.0, 0.15))
        run = diag.load(path)
        steps = run.history.steps.tolist()
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last
        assert run.torn <= 2
        # A measurement is recorded before the step in which it is made returns.
        series = [s for s, _ in run.series("softmax_collapse")]
        expected = [s for s in scheduled(last) if s <= last]
        assert series[: len(expected)] == expected
        assert all(r.verdict().sentence for _, r in run.series("softmax_collapse"))
        measured += len(series)
    assert measured > 30


def scheduled(last):
    from diag.watching.measure.schedule import next_due

    steps = [1]
    while steps[-1] < last:
        steps.append(next_due(steps[-1], 3))
    return steps


def test_a_killed_run_goes_on(tmp_path):
    last = killed_after(tmp_path, 0.05)
    model = nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before = len(diag.load(tmp_path).history)
    with diag.watch(model, run=tmp_path, resume=True, instruments=[]):
        F.cross_entropy(model(torch.randn(4, 6)), torch.zeros(4, dtype=torch.long)).backward()
        optimizer.step()
    assert diag.load(tmp_path).history.steps.tolist() == list(range(1, before + 2)) and before >= last


def brief(path, told):
    """Six watched steps with a measurement at each; every step is told once it has returned."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 3))
    x = torch.randn(64, 6)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, run=path, budget=math.inf, every=1, instruments=["softmax_collapse"], probe=(x, y)):
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            told(b"s")


@pytest.mark.slow
def test_killed_at_every_file_operation_no_step_is_lost(tmp_path):
    brief(tmp_path / "first", lambda byte: None)
    total = operations(brief, tmp_path / "whole")
    assert total > 30
    for at in range(total):
        told, _ = killed_at(at, brief, tmp_path / str(at))
        try:
            run = diag.load(tmp_path / str(at))
        except RunError as error:
            assert not told and "holds no run" in str(error)
            continue
        steps = 0 if run.history is None else len(run.history)
        measured = [step for step, _ in run.series("softmax_collapse")]
        assert len(told) <= steps <= len(told) + 1 and not [e for e in run.events if e.kind == "damaged"]
        assert set(range(1, len(told) + 1)) <= set(measured) and not run.outcomes
