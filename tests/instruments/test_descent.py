"""Steps that go up the loss, and steps that only seem to."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.direction import Directions

_spec = importlib.util.spec_from_file_location(
    "optimization_histories", Path(__file__).with_name("optimization_histories.py")
)
histories = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(histories)


class Sign(torch.optim.Optimizer):
    """Steps by the sign of the gradient, down or up."""

    def __init__(self, params, lr, up=False, decay=0.0):
        super().__init__(params, {"lr": lr, "up": up, "decay": decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["decay"])
                p.add_(p.grad.sign(), alpha=group["lr"] if group["up"] else -group["lr"])


def told(optimizer, steps=60):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = optimizer(model.parameters())
    with diag.watch(model, instruments=["descent"]) as watcher:
        for _ in range(steps):
            x = torch.randn(32, 6)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher


def test_an_optimizer_of_ones_own_that_goes_up():
    watcher = told(lambda p: Sign(p, 1e-2, up=True))
    (finding,) = watcher.findings
    assert finding.verdict.level == "alarm" and finding.verdict.cause == Cause.LOSS_ASCENDED
    assert finding.first_step <= 30


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: Sign(p, 1e-3),
        lambda p: Sign(p, 1e-4, decay=0.2),  # which takes the weights away, against the gradient
        lambda p: torch.optim.SGD(p, 0.5, momentum=0.95),
        lambda p: torch.optim.SGD(p, 30.0),  # it diverges, and each step goes down its gradient
        lambda p: torch.optim.SGD(p, 1e-2, maximize=True),  # as it was asked to
    ],
)
def test_loops_whose_steps_go_down_or_are_meant_to_go_up(optimizer):
    assert not told(optimizer).findings


@pytest.mark.parametrize(
    ("cosines", "losses", "level"),
    [
        ([0.5] * 30, numpy.linspace(2, 9, 60), "alarm"),
        ([0.5] * 30, numpy.linspace(9, 2, 60), "ok"),  # the loss falls: the gradient is not that of the loss
        ([0.5, -0.4] * 15, numpy.linspace(2, 9, 60), "ok"),
        ([0.5] * 9, numpy.linspace(2, 9, 60), "not_applicable"),
        ([math.nan] * 30, numpy.linspace(2, 9, 60), "not_applicable"),
    ],
)
def test_both_the_steps_and_the_loss_must_go_up(cosines, losses, level):
    loop = dataclasses.replace(Loop(60), directions=tuple(cosines))
    assert diag.descent(history=histories.record(losses), loop=loop).verdict().level == level


def test_the_cosine_is_that_of_what_is_not_along_the_weights():
    p = nn.Parameter(torch.randn(20, 5))
    p.grad = torch.randn(20, 5)
    step = torch.randn(20, 5)
    before = p.detach() - step
    directions = Directions()
    directions.stepped([p], [before], torch.optim.SGD([p], 1.0))
    w, s, g = (t.double().flatten() for t in (before, step, p.grad))
    s, g = (v - w * (v @ w) / (w @ w) for v in (s, g))
    # The step is read back from float32 weights of size one.
    assert directions.facts() == pytest.approx([float(s @ g / s.norm() / g.norm())], abs=1e-5)


def test_of_a_model_on_two_devices_the_parameters_on_the_first_are_looked_at():
    both, first = Directions(), Directions()
    here, there = (nn.Parameter(torch.ones(4, device=device)) for device in ("cpu", "meta"))
    for p in (here, there):
        p.grad = torch.arange(4.0, device=p.device)
    before = [p.detach() + p.grad**2 for p in (here, there)]
    optimizer = torch.optim.SGD([here, there], 1.0)
    both.stepped([here, there], before, optimizer)
    first.stepped([here], before[:1], optimizer)
    assert both.facts() == first.facts() and len(first.facts()) == 1
