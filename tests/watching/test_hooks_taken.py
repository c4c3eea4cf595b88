"""Other code that clears hooks takes away ours too: it is said, and the record goes on."""

import math

import numpy
import torch
from torch import nn

import diag
from diag.result import Level


def watched(clear, steps=40):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(64, 6)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, budget=math.inf, every=20, instruments=["gradient_flow"]) as watcher:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            clear(model, step)
            optimizer.step()
    assert not model._forward_hooks
    return watcher.run


def test_hooks_that_are_cleared_once_are_back_after_one_step():
    run = watched(lambda model, step: model._forward_hooks.clear() if step == 20 else None)
    assert int(numpy.isfinite(run.history.loss).sum()) == 39
    notes = [e.text for e in run.events if e.kind == "note"]
    assert len(notes) == 1 and "taken away the hook by which calls of the model are seen" in notes[0]


def test_hooks_that_are_cleared_at_every_step_leave_no_ok():
    run = watched(lambda model, step: model._forward_hooks.clear())
    seen = int(numpy.isfinite(run.history.loss).sum())
    verdict = run.series("gradient_flow")[-1][1].verdict()
    assert seen < 39 and verdict.level is Level.UNKNOWN
    assert f"losses at {seen} and gradients at 40 were seen" in verdict.sentence


def test_without_other_code_nothing_is_said():
    run = watched(lambda model, step: None)
    assert not [e.text for e in run.events if e.kind == "note"]
    assert run.series("gradient_flow")[-1][1].verdict().level is Level.OK
