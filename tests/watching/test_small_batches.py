"""Loops that train on no example, on one without an axis of examples, or on sequences of unequal length."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import InvalidInput

X, Y = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
JAGGED = [torch.ones(3, 6), torch.ones(5, 6)]


def one_example(model, i):
    return F.cross_entropy(model(X[i]), Y[i])


def sometimes_none(model, i):
    return F.cross_entropy(model(X[:0] if i % 3 == 0 else X), Y[:0] if i % 3 == 0 else Y, reduction="sum") / 64


def nested(model, i):
    return model(torch.nested.nested_tensor(JAGGED, layout=torch.jagged)).values().square().mean()


@pytest.mark.parametrize("loss", [one_example, sometimes_none, nested])
def test_nothing_of_ours_breaks_and_nothing_false_is_said(loss):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with diag.watch(model) as watcher:
        for i in range(30):
            optimizer.zero_grad()
            loss(model, i).backward()
            optimizer.step()
    assert len(watcher.run.history) == 30
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    assert not watcher.findings


def test_one_example_without_an_axis_is_no_batch():
    snapshot = diag.Snapshot(nn.Linear(6, 3), F.cross_entropy, (X[0], Y[0]))
    with pytest.raises(InvalidInput, match="without an axis of examples"):
        diag.gradient_coherence(snapshot)
