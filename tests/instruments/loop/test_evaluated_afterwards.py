"""Evaluations in train mode that come once an epoch in one call, or after the last step, are told; other calls
without gradients are not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause

ROWS, BATCH = 60, 10


def net(norm):
    torch.manual_seed(0)
    noisy = nn.BatchNorm1d(8) if norm else nn.Dropout(0.3)
    return nn.Sequential(nn.Linear(6, 8), noisy, nn.ReLU(), nn.Linear(8, 3))


def rows(seed, n=ROWS):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def told(model, between=None, afterwards=None):
    """The verdict's cause and sentence after four epochs; the functions are called without gradients."""
    x, optimizer = rows(0), torch.optim.SGD(model.parameters(), 0.01)
    y = x[:, :3].argmax(1)
    with diag.watch(model, instruments=["module_modes"]) as watcher:
        for _ in range(4):
            for i in range(0, ROWS, BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(x[i : i + BATCH]), y[i : i + BATCH]).backward()
                optimizer.step()
            with torch.no_grad():
                _ = between and between(model)
        with torch.no_grad():
            _ = afterwards and afterwards(model)
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    (found,) = [f for f in watcher.run.findings() if f.instrument == "module_modes"]
    return found.verdict.cause, found.verdict.sentence


def in_batches(x):
    return lambda model: [model(part) for part in x.split(BATCH)]


def repeated(model):
    model(rows(1).repeat(5, 1))


def with_statistics_taken_again(model):
    model.train()
    in_batches(rows(0))(model)
    model.eval()


def in_eval(model):
    model.eval()
    model(rows(1))
    model.train()


@pytest.mark.parametrize("norm", [False, True])
def test_an_evaluation_after_the_last_step_is_told(norm):
    cause, sentence = told(net(norm), afterwards=in_batches(rows(1)))
    assert cause == Cause.EVALUATION_IN_TRAIN_MODE
    assert "after the last step, 24, the model was called 6 times" in sentence


def test_one_call_is_an_evaluation_where_dropout_alone_depends_on_the_mode():
    def once(model):
        model(rows(1))

    cause, sentence = told(net(False), between=once)
    assert cause == Cause.EVALUATION_IN_TRAIN_MODE and "before step 7 " in sentence
    cause, sentence = told(net(False), afterwards=once)
    assert cause == Cause.EVALUATION_IN_TRAIN_MODE and "was called once" in sentence
    assert told(net(True), between=once)[0] == told(net(True), afterwards=once)[0] == ""


def test_rows_of_a_small_world_are_an_evaluation_where_they_are_the_same_each_time():
    """A third of them are rows of training, by chance."""
    kept, drawn = torch.cat([rows(0)[:25], rows(1)[:40]]), iter(range(2, 9))
    cause, sentence = told(net(False), between=lambda model: model(kept))
    assert cause == Cause.EVALUATION_IN_TRAIN_MODE and "before step 13 " in sentence
    new = told(net(False), between=lambda model: model(torch.cat([rows(0)[:25], rows(next(drawn))[:40]])))
    assert new[0] == ""


@pytest.mark.parametrize(
    ("norm", "between", "afterwards"),
    [
        (False, in_eval, in_eval),
        (False, lambda model: model(rows(0)), None),  # the rows of training: pseudo-labels, old policies
        (False, lambda model: model(rows(1, BATCH)), None),  # no more than a batch: samples, an agent that acts
        (False, repeated, repeated),  # answers are sampled
        (False, None, lambda model: [part for _ in range(3) for part in in_batches(rows(1))(model)]),
        (True, None, in_batches(rows(0))),  # batch statistics are taken again
        (True, None, with_statistics_taken_again),
    ],
)
def test_other_calls_without_gradients_are_no_evaluation(norm, between, afterwards):
    assert told(net(norm), between, afterwards)[0] == ""
