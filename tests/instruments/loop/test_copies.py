"""Copies of the network that are to follow it: named where they are still what training began with."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import diag
from diag.instruments.causes import Cause


def trained(follow, steps=120, average=False):
    """What is said of a small regression; follow(averaged, model) is called after each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    kept = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if average else copy.deepcopy(model)
    x = torch.randn(256, 6)
    y = x[:, :1] * x[:, 1:2]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with diag.watch(model, instruments=["weights_move"]) as watcher:
        for rows in itertools.islice(itertools.cycle(torch.arange(256).split(32)), steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
            follow(kept, model)
    return [f.verdict for f in watcher.run.findings() if f.verdict.level.is_finding]


def lerp(weight):
    @torch.no_grad()
    def follow(kept, model):
        for a, b in zip(kept.parameters(), model.parameters(), strict=True):
            a.lerp_(b, weight)

    return follow


def nothing(kept, model):
    """A reference that stays, or an average that is forgotten."""


def test_an_average_that_is_never_updated_is_named():
    (verdict,) = trained(nothing, average=True)
    assert verdict.cause == Cause.COPY_NOT_FOLLOWING and "never updated in 120 steps" in verdict.sentence


def test_a_copy_that_follows_too_slowly_is_named_with_its_part_of_the_way():
    (verdict,) = trained(lerp(1e-5))
    assert verdict.cause == Cause.COPY_NOT_FOLLOWING
    # at most 120 steps of 1e-5 of the way each, and about half of that as the way grows
    share = float(verdict.sentence.partition("gone ")[2].partition(" %")[0])
    assert 0.02 < share <= 0.12


@pytest.mark.parametrize(
    ("follow", "average", "steps"),
    [
        (lerp(0.02), False, 120),  # an average over fifty steps
        (nothing, False, 120),  # a reference that is meant to stay
        (lambda kept, model: kept.update_parameters(model), True, 120),
        (nothing, True, 40),  # too early to tell
    ],
)
def test_copies_that_do_as_they_are_meant_to_are_left_in_peace(follow, average, steps):
    assert trained(follow, steps, average) == []


def test_a_target_that_is_set_every_so_often_is_left_in_peace():
    count = itertools.count(1)
    sync = lambda kept, model: next(count) % 25 or kept.load_state_dict(model.state_dict())  # noqa: E731
    assert trained(sync) == []
