"""Losses that compare two calls of the model: whether the two sides of a pair are one example."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.data import PairFacts
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.loop.data.pairs import meet

N, D = 12, 6


def net(dropout=0.0):
    return nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4))


def triplet(a, b, c):
    return F.triplet_margin_loss(a, b, c, margin=0.5)


def likeness(a, b, c):
    return F.cross_entropy(F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.2, torch.arange(len(a)))


def stacked(a, b, c):
    z = F.normalize(torch.cat([a, b]), dim=1)
    return F.cross_entropy((z @ z.T).fill_diagonal_(-9), torch.arange(2 * N).roll(N))


def distance(a, b, c):
    return (a - b).square().mean() - (a - c).square().clamp(max=1).mean()


def terms(a, b, c):
    """The same rows twice, and nothing that compares them."""
    return a.square().mean() + b.abs().pow(1.5).mean()


def weighed(a, b, c):
    return a.square().mean() * b.abs().mean()


def columns(a, b, c):
    """Two quantities of one field, each from a call of its own."""
    return (a[:, 0] * b[:, 1] - c[:, 0]).abs().pow(1.5).mean()


def told(loss, same=True, dropout=0.0, steps=8):
    torch.manual_seed(0)
    model = net(dropout)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with diag.watch(model, instruments=["pairs_differ"]) as watcher:
        for _ in range(steps):
            x, other = torch.randn(N, D), torch.randn(N, D)
            view = x.clone() if same else x + 0.1 * torch.randn_like(x)
            optimizer.zero_grad()
            loss(model(x), model(view), model(other)).backward()
            optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher


@pytest.mark.parametrize("loss", [triplet, likeness, stacked, distance])
def test_a_pair_of_equal_sides_is_named_within_three_steps(loss):
    (finding,) = told(loss).findings
    assert finding.verdict.level == "alarm" and finding.verdict.cause == Cause.PAIR_IDENTICAL
    assert finding.first_step <= 3 and "8 backward passes" in told(loss).run.stories()[0].finding.verdict.sentence


@pytest.mark.parametrize("loss", [triplet, likeness, stacked, distance])
@pytest.mark.parametrize("how", [{"same": False}, {"dropout": 0.3}], ids=["other views", "dropout makes the views"])
def test_views_that_differ_are_fine(loss, how):
    assert not told(loss, **how).findings


@pytest.mark.parametrize("loss", [terms, weighed, columns])
def test_the_same_rows_twice_that_nothing_compares_are_fine(loss):
    assert not told(loss).findings


def test_one_call_a_step_gives_no_verdict():
    assert diag.pairs_differ(loop=Loop(5)).verdict().level == "not_applicable"


@pytest.mark.parametrize(("looked", "same", "level"), [(2, 2, "ok"), (3, 3, "alarm"), (30, 29, "ok"), (9, 0, "ok")])
def test_every_look_must_show_it(looked, same, level):
    loop = dataclasses.replace(Loop(50), pairs=PairFacts(looked, same, 1))
    verdict = diag.pairs_differ(loop=loop).verdict()
    assert verdict.level == level
    if level == "ok":
        assert f"seen at {same} of {looked} backward passes" in verdict.sentence


def test_where_two_tensors_meet():
    a, b = (torch.randn(3, 2, requires_grad=True) * 1.0 for _ in range(2))
    numbers = (a.grad_fn._sequence_nr(), b.grad_fn._sequence_nr())
    for value, expected in [
        ((a.tanh() - b).sum(), True),
        ((a @ b.T).mean(), True),
        (a.sum() - b.sum(), False),
        (a.sum() * b.mean(), False),
        ((a[:, 0] * b[:, 0]).sum(), False),
        (a.sum(), False),
    ]:
        assert meet(value.grad_fn, *numbers) is expected
