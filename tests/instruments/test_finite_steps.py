"""The first step that is not finite is told with where that came from: the batch, the network, the loss,
backward."""

import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.snapshot.history import empty_history


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def told(loss_of, model=None, steps=6, **watching):
    """The finding of a short training whose loss is loss_of(model, x, y, step)."""
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with diag.watch(model, instruments=["finite_steps"], **watching) as watcher:
        for step in range(1, steps + 1):
            x, y = torch.randn(16, 4), torch.randint(3, (16,))
            optimizer.zero_grad()
            loss_of(model, x, y, step).backward()
            optimizer.step()
    (finding,) = [f.verdict for f in watcher.findings] or [None]
    return finding


def poisoned(model, x, y, step):
    if step == 3:
        x[2, 1] = torch.nan
    return F.cross_entropy(model(x), y)


def log_of_zero(model, x, y, step):
    scale = 1e4 if step == 4 else 1.0
    return -(scale * model(x)).softmax(-1).gather(1, y[:, None]).log().mean()


def divided_by_zero(model, x, y, step):
    z = model(x)
    return F.cross_entropy(z, y) + 0.01 * (z.sum() / (z.sum() * (step < 2)))


def root_of_zero(model, x, y, step):
    w = model[2].weight
    return F.cross_entropy(model(x), y) + (w - w.detach()).square().sum().sqrt()


def healthy(model, x, y, step):
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize(
    ("loss_of", "cause", "step", "words"),
    [
        (poisoned, Cause.DATA_NOT_FINITE, 3, "the batch itself"),
        (
            log_of_zero,
            Cause.NOT_FINITE,
            4,
            "outputs were finite, and the computation of the loss took the logarithm",
        ),
        (divided_by_zero, Cause.NOT_FINITE, 2, "a division by zero"),
        (root_of_zero, Cause.NOT_FINITE, 1, "of 1 of 4 tensors, so it arises at or after 2.weight"),
    ],
)
def test_where_it_came_from(loss_of, cause, step, words):
    verdict = told(loss_of)
    assert (verdict.cause, verdict.step, verdict.level) == (cause, step, "alarm")
    assert words in verdict.sentence


def test_outputs_that_are_not_finite_come_from_the_network():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = network(), 0

        def forward(self, x):
            self.calls += 1
            return self.net(x) * (1e39 if self.calls == 2 else 1.0)

    verdict = told(healthy, Breaks())
    assert (
        verdict.step == 2 and "the model's outputs were not finite either, though the batch was" in verdict.sentence
    )


def test_a_healthy_training_draws_nothing():
    assert told(healthy, steps=12) is None


def test_steps_that_the_scaler_left_out_are_not_counted():
    history = empty_history({"w": 100}, 4)
    finite = history.gradient_finite.copy()
    finite[0] = False
    loss_finite = numpy.array([False, True, True, True])
    skipped = numpy.array([True, False, False, False])
    history = dataclasses.replace(history, gradient_finite=finite, loss_finite=loss_finite, skipped=skipped)
    assert diag.finite_steps(history=history).verdict().level == "ok"
    taken = dataclasses.replace(history, skipped=numpy.zeros(4, bool))
    assert diag.finite_steps(history=taken).verdict().cause == Cause.NOT_FINITE


def test_a_record_without_steps_is_not_judged():
    assert diag.finite_steps(history=empty_history({"w": 100})).verdict().level == "not_applicable"
