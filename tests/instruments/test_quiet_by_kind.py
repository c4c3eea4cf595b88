"""Ordinary trainings about which a check would say what is not so, or what is beside the point, each as a kind."""

from __future__ import annotations

import dataclasses
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.instruments.data.class_counts import times_rarer
from diag.instruments.data.dependence import feature_p_value
from diag.instruments.network.output_constant import OutputConstant
from diag.instruments.outcome.trivial import TrivialPredictor
from diag.snapshot.history import empty_history
from diag.snapshot.loop.data import LossFacts
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.network import StartingWeight
from diag.snapshot.loop.steps import OptimizerFacts, OriginFacts, OutsideChange
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
    steps = diag.step_size(history=course, loop=stages(functions, passes))
    assert math.isnan(steps.now) == math.isnan(steps.loss_peak_ratio) == (level == "unknown")
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
    ("rates", "epoch", "level"),
    [
        ((1e-3, 1e-4, 1e-5), 25, "ok"),
        ((1e-3, 1e-3, 1e-3), 25, "warning"),
        ((1e-3, 1e-4, 1e-5), 75, "warning"),  # one each epoch, with a rate that falls by hand
        ((1e-3, 1e-4, 1e-5), 0, "warning"),
    ],
)
def test_optimizers_of_phases_that_differ_and_last_for_epochs_are_meant(rates, epoch, level):
    alone = folds(())
    made = [dataclasses.replace(o, made_with=({"lr": r},)) for o, r in zip(alone.optimizers, rates, strict=True)]
    batches = dataclasses.replace(alone.batches, loader_batches=epoch)
    loop = dataclasses.replace(alone, optimizers=tuple(made), batches=batches)
    assert diag.optimizer_kept(loop=loop).verdict().level == level


def test_weights_of_inputs_that_are_always_zero_do_not_stand_for_all():
    parameter = nn.Parameter(torch.zeros(64, 64))
    sample = sample_of(parameter)
    before = sample.read()
    with torch.no_grad():
        parameter[:, 8:56] = 1.0  # the edge of a picture stays as it was
    assert sample.read() != before


def test_labels_of_which_a_test_can_see_nothing_are_not_judged():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 6, generator=generator)
    made = empty_history({"w": 100}, 150)
    few, enough = (torch.arange(300) % every == 0 for every in (50, 4))
    for labels, level in ((few, "not_applicable"), (enough, "unknown")):
        answers, logits = labels[torch.randperm(300, generator=generator)].long(), torch.zeros(300, 2)
        losses = F.cross_entropy(logits, answers, reduction="none")
        given = {"inputs": inputs, "labels": answers, "logits": logits, "losses": losses}
        assert diag.labels_belong(history=made, **given).verdict().level == level


def test_a_weak_dependence_on_one_of_many_features_is_seen():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 20, generator=generator)
    weak = (0.4 * x[:, 0] + torch.randn(500, generator=generator) > 0).long()
    assert feature_p_value(x, weak) < 0.01
    assert feature_p_value(x, weak[torch.randperm(500, generator=generator)]) > 0.05
    assert feature_p_value(x[:, None], weak) == 1.0


def holding(model, steps):
    """Trained with the gradient of the last layer taken away in each step, as some hold it for an epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(64, 8), torch.arange(64) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for p in (model[0].weight, model[0].bias, model[2].weight):
            p.grad = None
        optimizer.step()


def test_gradients_that_the_loop_takes_away_before_the_step_have_come():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with diag.watch(model, instruments=["gradients_reach", "weights_move"]) as watcher:
        holding(model, 12)
    assert not watcher.findings


def grown(steps):
    """Gradients that are a hundred times as large from step 101 on, and a loss that rises there."""
    made = empty_history({"w": 256}, steps)
    table = numpy.where(numpy.arange(steps) < 100, 1.0, 100.0)[:, None].astype(numpy.float32)
    return dataclasses.replace(
        made,
        loss=numpy.where(numpy.arange(steps) < 100, 0.1, 2.3),
        gradient_norm=table,
        applied_gradient_norm=table[:, 0].astype(float),
        parameter_norm=numpy.ones_like(table),
        optimizer={"kind": "Adam", "lr": 1e-3, "betas": (0.9, 0.999), "groups": ()},
    )


def test_the_second_moment_of_a_new_optimizer_knows_nothing_of_the_gradients_before():
    one = OptimizerFacts("Adam", held=("w",), steps=300, first_step=1, last_step=300)
    two = (
        dataclasses.replace(one, last_step=100, steps=100),
        dataclasses.replace(one, first_step=101, steps=200),
    )
    for optimizers, level in (((one,), "warning"), (two, "ok")):
        loop = Loop(step=300, optimizers=optimizers)
        assert diag.second_moment(history=grown(300), loop=loop).verdict().level == level


@pytest.mark.parametrize(("weight", "bias", "cause"), [(1.0, 2000.0, ""), (100.0, 0.0, Cause.INITIALIZATION_SCALE)])
def test_a_bias_that_is_set_to_the_mean_of_the_targets_is_no_scale_of_the_weights(weight, bias, cause):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[0].weight.mul_(weight)
        model[2].weight.mul_(weight)
        model[2].bias.add_(bias)
    data = torch.randn(64, 6), torch.randn(64, 4)
    verdict = diag.initial_scale(diag.Snapshot(model, F.mse_loss, data)).verdict()
    assert verdict.cause == cause and (verdict.level == "not_applicable") == (not cause)


@pytest.mark.parametrize(
    ("count", "again", "cause"), [(64, 0, ""), (64, 3, "class_missing"), (256, 0, "class_missing")]
)
def test_a_class_is_absent_once_an_epoch_or_many_examples_were_seen(count, again, cause):
    labels, logits = torch.zeros(count, dtype=torch.long), torch.zeros(count, 2)
    loop = Loop(step=5)
    loop = dataclasses.replace(loop, batches=dataclasses.replace(loop.batches, again=again))
    assert diag.class_counts(logits=logits, labels=labels, inputs=logits, loop=loop).verdict().cause == cause


@pytest.mark.parametrize("outputs_finite", [False, True])
def test_a_loss_that_the_network_lost_follows_from_the_layer_that_did(outputs_finite):
    lost = dataclasses.replace(empty_history({"w": 4}, 3), loss_finite=numpy.array([True, False, False]))
    origin = OriginFacts(2, batch_finite=True, outputs_finite=outputs_finite)
    verdict = diag.finite_steps(history=lost, loop=Loop(step=3, origin=origin)).verdict()
    assert (Cause.NOT_FINITE in verdict.explained_by) == (not outputs_finite)


def test_the_ratio_of_classes_that_is_told_is_no_larger_than_the_true_one():
    generator = torch.Generator().manual_seed(0)
    rare = (torch.rand(4000, 64, generator=generator) < 1 / 24).sum(1)
    told = [times_rarer(64 - k, k) for k in rare.tolist() if k]
    assert sum(ratio > 23 for ratio in told) < 0.03 * len(told)
    assert times_rarer(1980, 20) == pytest.approx(66.1, abs=0.1)


@pytest.mark.parametrize(
    ("course", "level"), [((0.7, 0.3), "unknown"), ((0.7, 0.65), "warning"), ((0.3,), "warning")]
)
def test_a_network_on_its_way_down_to_the_class_frequencies_is_not_said_to_have_stopped(course, level):
    labels = (torch.arange(200) % 40 == 0).long()
    looks = []
    for loss in course:
        right = math.log(math.expm1(loss))  # what makes the loss of a frequent row this one
        logits = torch.stack([torch.zeros(200), torch.full((200,), right)], 1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        looks.append(diag.trivial_predictor(logits=logits, labels=labels, losses=losses))
    assert looks[-1]._worse()
    assert TrivialPredictor.trend([(100 * i + 100, r) for i, r in enumerate(looks)]).level == level
