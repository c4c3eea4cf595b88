"""At usual steps the model's outputs carry no hook; which backward passes are the model's is known all the same."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag

USUAL, UNUSUAL = 40, 46  # steps, the latter not looked at closely
X, Y = torch.randn(24, 5, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


def plain(model, other):
    outputs = model(X)
    loss = F.cross_entropy(outputs, Y)
    loss.backward()
    return loss.item(), outputs


def with_a_penalty_apart(model, other):
    """The second pass does not reach the outputs."""
    outputs = model(X)
    loss = F.cross_entropy(outputs, Y)
    loss.backward()
    (1e-3 * model[0].weight.square().sum()).backward()
    return loss.item(), outputs


def behind_another(model, other):
    """The first argument of the loss comes from another network by its first argument."""
    outputs = model(X)
    loss = F.cross_entropy(other(X) + outputs, Y)
    loss.backward()
    return loss.item(), outputs


def by_its_own_arithmetic(model, other):
    outputs = model(X)
    loss = outputs.square().mean()
    loss.backward()
    return loss.item(), outputs


def after_that_of_another(model, other):
    """The other network's loss is none of the model's, though the model was called before it."""
    outputs = model(X)
    F.cross_entropy(other(X), Y).backward()
    loss = F.cross_entropy(outputs, Y)
    loss.backward()
    return loss.item(), outputs


def scaled_in_place(model, other):
    outputs = model(X)
    loss = F.cross_entropy(outputs, Y)
    loss /= 4
    loss.backward()
    return loss.item(), outputs


@pytest.mark.parametrize(
    "unusual",
    [
        plain,
        with_a_penalty_apart,
        behind_another,
        by_its_own_arithmetic,
        after_that_of_another,
        scaled_in_place,
    ],
)
def test_the_recorded_loss_is_that_of_the_passes_that_reach_the_outputs(unusual, tmp_path):
    torch.manual_seed(0)
    model, other = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected, hooked = [], []
    with diag.watch(model, run=tmp_path / "run", instruments=[]) as watcher:
        for step in range(1, UNUSUAL + 10):
            optimizer.zero_grad()
            loss, outputs = (unusual if step == UNUSUAL else plain)(model, other)
            optimizer.step()
            expected.append(loss)
            hooked.append(bool(outputs._backward_hooks))
    assert watcher.run.history.loss.tolist() == pytest.approx(expected, rel=1e-6)
    assert hooked[0] and not any(hooked[USUAL : UNUSUAL - 1])
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
