"""Ordinary trainings about which a check would say what is not so, or what is beside the point, each as a kind."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.instruments.network.output_constant import OutputConstant
from diag.snapshot.history import empty_history
from diag.snapshot.loop.data import LossFacts
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.network import StartingWeight
from diag.snapshot.loop.steps import OptimizerFacts, OutsideChange
from diag.watching.observe.loop.weights import sample_of


@pytest.mark.parametrize(("learned", "level"), [(True, "not_applicable"), (False, "alarm")])
def test_outputs_far_from_zero_that_vary_as_their_targets_are_not_constant(learned, level):
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    years = 2000 + x.sum(1, keepdim=True)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[0].bias.zero_()
        model[1].weight.fill_(float(learned))
        model[1].bias.fill_(2000.0)
    result = diag.output_constant(diag.Snapshot(model, F.mse_loss, (x, years)))
    assert result.spread < 1e-3
    assert OutputConstant.trend([(20, result)]).level == level


class LearnedQuery(nn.Module):
    """A branch that is the same for all examples stands before the layers that look at them."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.ones(1, 8))
        self.of_query, self.first, self.second = nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        nn.init.constant_(self.second.bias, -1e3)

    def forward(self, x):
        wanted = self.of_query(self.query).expand(len(x), -1)
        return self.head(F.relu(self.second(self.first(x))) * wanted)


def test_the_layer_from_which_on_nothing_varies_is_named_and_no_branch_that_never_varies():
    torch.manual_seed(0)
    data = torch.randn(64, 4), torch.arange(64) % 3
    dead = diag.output_constant(diag.Snapshot(LearnedQuery(), F.cross_entropy, data))
    found = OutputConstant.trend([(20, dead)])
    assert found.level == "alarm" and found.layers == ("second",)


def test_the_layer_that_became_constant_first_is_named_though_one_before_it_is_constant_now():
    torch.manual_seed(0)
    data = torch.randn(64, 4), torch.arange(64) % 3
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.constant_(model[2].bias, -20.0)
    then = diag.output_constant(diag.Snapshot(model, F.cross_entropy, data))
    nn.init.zeros_(model[0].weight)  # as a decay does where no gradient arrives
    now = diag.output_constant(diag.Snapshot(model, F.cross_entropy, data))
    assert now.constant_layers[0] == "0"
    assert OutputConstant.trend([(20, then), (50, now)]).layers == ("3",)


def test_shares_of_dead_units_that_differ_are_both_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias[:7] = -1e3
        model[2].bias.fill_(-1e3)
    verdict = diag.dead_units(diag.Snapshot(model, F.cross_entropy, (torch.randn(64, 4), torch.arange(64) % 3)))
    assert "87.5 % to 100 % of the units of layer 1 and layer 3" in verdict.verdict().sentence


def stages(functions, passes=1.0):
    losses = tuple(LossFacts(f, root=True, calls=50) for f in functions)
    return Loop(
        step=100, losses=losses, optimizers=(OptimizerFacts("Adam", held=("w",), steps=100, passes=passes),)
    )


@pytest.mark.parametrize(
    ("functions", "passes", "level"),
    [
        (("mse_loss", "cross_entropy"), 1.0, "unknown"),
        (("mse_loss", "cross_entropy"), 2.0, "alarm"),  # each step adds both up
        (("mse_loss", "mse_loss"), 1.0, "alarm"),  # of inputs of two shapes
    ],
)
def test_the_loss_of_a_second_stage_is_not_compared_with_that_of_the_first(functions, passes, level):
    made = empty_history({"w": 4}, 100)
    course = dataclasses.replace(made, loss=numpy.r_[numpy.full(50, 0.1), numpy.full(50, 2.3)])
    assert diag.divergence(history=course, loop=stages(functions, passes)).verdict().level == level
    lost = dataclasses.replace(course, loss_finite=numpy.arange(100) < 60)
    assert diag.divergence(history=lost, loop=stages(functions, passes)).verdict().level == "alarm"


@pytest.mark.parametrize(
    ("frozen", "steps", "last", "level"),
    [(True, 3, 5.0, "unknown"), (True, 40, 1.0, "ok"), (True, 40, 5.0, "warning"), (False, 40, 1.0, "warning")],
)
def test_a_new_head_on_trained_layers_may_begin_sure_and_wrong(frozen, steps, last, level):
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 10), torch.randint(0, 10, (50,))
    losses = numpy.r_[8.0, numpy.full(steps - 1, last)]
    history = dataclasses.replace(empty_history({"w": 4}, steps), loss=losses)
    start = StartingWeight(name="body.weight", gain=1.0, constant=False, value=0.0, trainable=not frozen)
    verdict = diag.initial_loss(
        history=history,
        logits=logits,
        labels=labels,
        losses=F.cross_entropy(logits, labels, reduction="none"),
        loop=Loop(step=steps, start=(start,)),
    ).verdict()
    assert verdict.level == level and (verdict.cause == Cause.INITIAL_LOSS_HIGH) == (level == "warning")


class Recurrent(nn.Module):
    """What a recurrent layer computes is not looked at; the layer after it is given what it gives."""

    def __init__(self, size):
        super().__init__()
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 2)
        self.body = nn.RNN(4, 4, nonlinearity="relu", batch_first=True)
        nn.init.constant_(self.body.weight_hh_l0, size)
        nn.init.constant_(self.body.bias_ih_l0, 10.0)

    def forward(self, x):
        return self.head(self.body(self.embed(x))[0][:, -1])


def test_a_layer_that_is_given_values_that_are_not_finite_is_not_said_to_make_them():
    torch.manual_seed(0)
    data = torch.rand(8, 60, 1), torch.arange(8) % 2
    model = Recurrent(1e6)
    sentence = diag.finite_forward(diag.Snapshot(model, F.cross_entropy, data)).verdict().sentence
    assert "after embed and before head (linear), which is given them" in sentence
    nn.init.constant_(model.body.weight_hh_l0, 0.1)
    nn.init.constant_(model.head.weight, 3e38)
    sentence = diag.finite_forward(diag.Snapshot(model, F.cross_entropy, data)).verdict().sentence
    assert "head (linear) gives the first" in sentence


def folds(changes):
    """Three trainings with an optimizer each, and the weights put back to the start where two of them begin."""
    made = [OptimizerFacts("Adam", held=("w",), stateful=True, steps=75, passes=1)] * 3
    begun = [dataclasses.replace(o, first_step=75 * i + 1, last_step=75 * i + 75) for i, o in enumerate(made)]
    outside = tuple(OutsideChange(step, ("w",), False, 0) for step in changes)
    return Loop(step=225, optimizers=tuple(begun), outside=outside, outside_times=len(outside))


def test_an_optimizer_that_begins_with_other_weights_is_that_of_another_training():
    assert diag.optimizer_kept(loop=folds((76, 151))).verdict().level == "ok"
    assert diag.optimizer_kept(loop=folds(())).verdict().cause == Cause.OPTIMIZER_RECREATED
    each = diag.outside_changes(loop=folds((76, 151))).verdict()
    assert each.level == "warning" and "each time with a new optimizer" in each.sentence
    assert diag.outside_changes(loop=folds((70, 151))).verdict().level == "alarm"


@pytest.mark.parametrize(
    ("rates", "again", "level"),
    [
        ((1e-3, 1e-4, 1e-5), 26, "ok"),
        ((1e-3, 1e-3, 1e-3), 26, "warning"),
        ((1e-3, 1e-4, 1e-5), 76, "warning"),  # one each epoch, with a rate that falls by hand
        ((1e-3, 1e-4, 1e-5), 0, "warning"),
    ],
)
def test_optimizers_of_phases_that_differ_and_last_for_epochs_are_meant(rates, again, level):
    alone = folds(())
    made = [dataclasses.replace(o, made_with=({"lr": r},)) for o, r in zip(alone.optimizers, rates, strict=True)]
    batches = dataclasses.replace(alone.batches, again=again)
    loop = dataclasses.replace(alone, optimizers=tuple(made), batches=batches)
    assert diag.optimizer_kept(loop=loop).verdict().level == level


def test_weights_of_inputs_that_are_always_zero_do_not_stand_for_all():
    parameter = nn.Parameter(torch.zeros(64, 64))
    sample = sample_of(parameter)
    before = sample.read()
    with torch.no_grad():
        parameter[:, 8:56] = 1.0  # the edge of a picture stays as it was
    assert sample.read() != before
