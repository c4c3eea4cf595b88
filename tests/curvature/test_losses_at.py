"""Losses at other parameters, kicks and replays, against direct evaluation and a quadratic's closed form."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.errors import MissingQuantity, Unsupported
from diag.instruments.opposing_signals.measuring import groups_of_record, kick, null_share, replay, replayed_groups
from diag.testing import leaves_no_trace


def problem(micro_batch=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(50, 4).double(), torch.arange(50) % 3
    return model, x, y, diag.Snapshot(model, F.cross_entropy, (x, y), micro_batch=micro_batch)


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_losses_and_gradient_elsewhere(micro_batch):
    model, x, y, snapshot = problem(micro_batch)
    losses_at = snapshot.quantity("losses_at")
    point = losses_at.center + 0.3 * torch.randn_like(losses_at.center)
    with leaves_no_trace(model):
        losses, gradient = losses_at.step(point)
        assert torch.equal(losses_at(point), losses)
    there = copy.deepcopy(model)
    nn.utils.vector_to_parameters(point, there.parameters())
    expected = F.cross_entropy(there(x), y, reduction="none")
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    parts = torch.autograd.grad(expected.mean(), list(there.parameters()))
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in parts]), rtol=1e-10, atol=1e-14)
    assert losses_at.num_examples == 50


def test_groups_are_disjoint_and_cover_the_data():
    model, x, y, _ = problem()
    batches = [(x[:20], y[:20]), (x[20:23], y[20:23]), (x[23:], y[23:])]
    whole = diag.Snapshot(model, F.cross_entropy, batches).quantity("losses_at")
    groups = list(whole.groups(16, seed=1))
    assert [g.num_examples for g in groups] == [16, 16, 16, 2] and whole.num_examples == 50
    point = whole.center + 0.1
    there = copy.deepcopy(model)
    nn.utils.vector_to_parameters(point, there.parameters())
    expected = F.cross_entropy(there(x), y, reduction="none").detach()
    found = torch.cat([g(point) for g in groups])
    torch.testing.assert_close(found.sort().values, expected.sort().values)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(groups[0](point).sort().values, expected[order[:16]].sort().values)
    _, gradient = groups[0].step(point)
    assert gradient.shape == point.shape
    # One batch a group where the shapes allow it.
    assert [len(g._batches) for g in groups] == [1, 1, 1, 1]


def test_without_a_loss():
    model, x, y, _ = problem()
    with pytest.raises(MissingQuantity, match="loss"):
        diag.Snapshot(model, None, (x, y)).quantity("losses_at")


class Centre(nn.Module):
    """Loss of example i: 1/2 c |w - x_i|^2, so that every curvature is c and every kick is known."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return self.w - x


def quadratic(c=4.0, n=60):
    torch.manual_seed(1)
    w, x = torch.zeros(3).double(), torch.randn(n, 3).double()

    def loss_fn(outputs, targets):
        return 0.5 * c * outputs.square().sum(1).mean()

    return diag.Snapshot(Centre(w), loss_fn, (x, torch.zeros(n))), x


def test_a_kick_on_a_quadratic():
    """l(w + e u) - l(w - e u) = 2 e c <w - x, u>, with e = .3 / sqrt(c)."""
    snapshot, x = quadratic()
    u = F.normalize(torch.tensor([1.0, 2.0, -1.0]).double(), dim=0)
    change = kick(snapshot.quantity("losses_at"), u, 4.0)
    torch.testing.assert_close(change, 2 * 0.15 * 4 * (-x @ u), rtol=1e-10, atol=1e-12)


def test_a_replay_on_a_quadratic():
    """w - mean x shrinks by 1 - 2.5 = -1.5 a step: it grows until the mean loss has doubled."""
    snapshot, x = quadratic()
    record = replay(snapshot.quantity("losses_at"), 4.0)
    gap, mean = -x.mean(0), x.mean(0)
    for losses in record:
        w = mean + gap
        torch.testing.assert_close(losses, 2 * (w - x).square().sum(1), rtol=1e-9, atol=1e-9)
        gap = -1.5 * gap
    assert float((2 * (mean + gap - x).square().sum(1)).mean()) > 2 * float(record[0].mean())
    assert groups_of_record(record, 5).numbers["swap"] > 0.8


def test_a_replay_that_ends_at_once_is_no_replay():
    snapshot, _ = quadratic()
    with torch.no_grad():
        snapshot.model.w.add_(50.0)
    away = snapshot.with_data(snapshot.batches)
    with pytest.raises(Unsupported, match="use the static mode"):
        replayed_groups(away.quantity("losses_at"), torch.eye(3).double(), torch.full((3,), 4.0), 5)


def test_random_kicks_are_seeded():
    losses_at = quadratic()[0].quantity("losses_at")
    assert null_share(losses_at, 4.0, 5, 3, seed=1) == null_share(losses_at, 4.0, 5, 3, seed=1)
    assert null_share(losses_at, 4.0, 5, 1, seed=1) != null_share(losses_at, 4.0, 5, 1, seed=2)
