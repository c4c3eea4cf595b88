"""Targets of losses in evaluation beside those of training: another scale, logarithms, a cast to integers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.instruments.causes import Cause

ROWS = 300


def targets(seed, n=ROWS):
    """Prices, (n, 1)."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return x, (5 + 0.6 * x[:, :1] + 0.3 * x[:, 1:2].tanh()).exp()


def told(change, change_evaluated=lambda y: y, undo=lambda out: out, loss=F.mse_loss):
    """The verdict on a regression on changed targets that is evaluated on others."""
    torch.manual_seed(0)
    (x, y), (u, v) = targets(0), targets(1)
    loader = DataLoader(TensorDataset(x, change(y)), 32, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with diag.watch(model, instruments=["evaluation_targets"]) as watcher:
        for _ in range(2):
            model.train()
            for a, b in loader:
                optimizer.zero_grad()
                loss(model(a), b).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                for a, b in DataLoader(TensorDataset(u, change_evaluated(v)), 64):
                    loss(undo(model(a)), b)
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.run.findings()[0].verdict


def standardised(y):
    return (y - y.mean()) / y.std()


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss])
def test_targets_that_are_standardised_in_training_alone_are_told(loss):
    verdict = told(standardised, loss=loss)
    assert (verdict.level, verdict.cause) == ("warning", Cause.HELD_OUT_LABELS_DIFFER)
    assert loss.__name__ in verdict.sentence and "exp()" not in verdict.sentence


def test_logarithms_that_are_compared_with_numbers_are_named():
    assert "exp() of training's" in told(torch.log).sentence


@pytest.mark.parametrize("change", [torch.log, standardised, lambda y: y])
def test_quiet_where_both_are_on_one_scale(change):
    assert told(change, change).level == "ok"


@pytest.mark.parametrize("undo", [torch.exp, lambda out: out * 100 + 170, lambda out: out.mul_(100).add_(170)])
def test_outputs_that_are_scaled_back_are_not_judged(undo):
    verdict = told(torch.log if undo is torch.exp else standardised, undo=undo)
    assert verdict.level == "not_applicable"


def test_targets_that_a_cast_has_left_whole_are_told():
    verdict = told(lambda y: y.log().long().float(), torch.log)
    assert (verdict.level, verdict.cause) == ("warning", Cause.TARGETS_CAST)
    assert "whole numbers" in verdict.sentence and "100 %" in verdict.sentence


def test_ratings_that_are_whole_in_both_are_quiet():
    assert told(lambda y: y.log().round(), lambda y: y.log().round()).level == "ok"


def test_few_targets_are_refused():
    x, y = targets(0, 16)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    with diag.watch(model, instruments=["evaluation_targets"]) as watcher:
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            F.mse_loss(model(x), 100 * y)
    assert watcher.run.findings()[0].verdict.level == "not_applicable"


def test_another_output_of_several_is_another_matter():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x):
            return self.a(x), self.b(x)

    (x, y), model = targets(0), Two()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with diag.watch(model, instruments=["evaluation_targets"]) as watcher:
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(x)[0], y.log()).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            F.mse_loss(model(x)[1], y)
    assert watcher.run.findings()[0].verdict.level == "not_applicable"
