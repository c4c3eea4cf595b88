"""Labels that belong to their inputs or do not: the test of independence, and what training adds to it."""

import dataclasses

import numpy
import pytest
import torch
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.instruments.data.dependence import independence_p_value
from diag.instruments.data.labels_belong import LabelsBelong
from diag.snapshot.history import empty_history
from diag.snapshot.loop.data import LossFacts
from diag.snapshot.loop.facts import Loop


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n=200, d=6, seed=0):
    return torch.randn(n, d, generator=random(seed))


PAIRS = torch.cartesian_prod(torch.arange(15), torch.arange(15))[torch.randperm(225, generator=random(1))]


@pytest.mark.parametrize(
    ("inputs", "answers"),
    [
        (normal(), normal()[:, :3].argmax(1)),
        (normal(), normal()[:, :2].square().sum(1)),  # uncorrelated with every input
        (normal() * torch.tensor([1e4, 1, 1, 1, 1, 1]), (normal()[:, 1] > 0).long()),  # scales do not hide it
        (normal().reshape(200, 1, 2, 3), normal()[:, 0]),
        (normal()[:, :5].gt(0).long(), normal()[:, 2].gt(0).long()),  # tokens
        (PAIRS, PAIRS.sum(1) % 15),  # of two pairs that share a number, the sums differ
    ],
)
def test_a_dependence_is_found_and_gone_when_one_side_is_shuffled(inputs, answers):
    assert independence_p_value(inputs, answers) == 1 / 100
    shuffled = answers[torch.randperm(len(answers), generator=random(4))]
    assert independence_p_value(inputs, shuffled) > 0.02


def test_the_p_values_of_independent_sets_are_spread_evenly():
    found = [
        independence_p_value(normal(60, 3, s), torch.randint(3, (60,), generator=random(s))) for s in range(200)
    ]
    # The distance of Kolmogorov and Smirnov from the even distribution, at 1 in 1,000: 1.95 / sqrt(200).
    places = (numpy.arange(200) + 1) / 200
    assert numpy.abs(numpy.sort(found) - places).max() < 1.95 / numpy.sqrt(200) + 1 / 200


def record(steps=150, ratio=1e-2):
    made = empty_history({"0.weight": 256, "2.weight": 256}, steps)
    ones = numpy.ones((steps, 2), numpy.float32)
    return dataclasses.replace(
        made, loss=numpy.full(steps, 1.1), gradient_norm=ones, parameter_norm=ones, update_norm=ratio * ones
    )


def measured(labels, logits, held_out_logits, history=None, n=200):
    held_out = torch.arange(n) % 3
    return diag.labels_belong(
        history=record() if history is None else history, inputs=normal(n), logits=logits, labels=labels,
        losses=F.cross_entropy(logits, labels, reduction="none"), held_out_logits=held_out_logits,
        held_out_labels=held_out, held_out_losses=F.cross_entropy(held_out_logits, held_out, reduction="none"),
    )  # fmt: skip


SHUFFLED, TRUE = torch.randint(3, (200,), generator=random(5)), normal()[:, :3].argmax(1)
NOTHING, KNOWN = torch.zeros(200, 3), torch.eye(3)[torch.arange(200) % 3] * 3


@pytest.mark.parametrize(
    ("result", "cause"),
    [
        (measured(SHUFFLED, NOTHING, 0.1 * normal(d=3)), Cause.LABELS_SHUFFLED),  # nothing gained by usual steps
        (measured(SHUFFLED, NOTHING, 0.1 * normal(d=3), record(ratio=1e-6)), ""),  # nothing could be gained
        (measured(SHUFFLED, torch.eye(3)[SHUFFLED] * 3, normal(d=3), record(ratio=1e-6)), Cause.LABELS_SHUFFLED),
        (measured(SHUFFLED, NOTHING, KNOWN), ""),  # held-out examples are answered
        (measured(TRUE, NOTHING, 0.1 * normal(d=3)), ""),  # labels have to do with the inputs
    ],
)
def test_labels_are_named_where_training_works_and_nothing_is_gained(result, cause):
    assert LabelsBelong.trend([(150, result)]).cause == cause


def test_what_was_gained_once_is_remembered():
    course = [(100, measured(SHUFFLED, NOTHING, KNOWN)), (150, measured(SHUFFLED, NOTHING, NOTHING))]
    assert LabelsBelong.trend(course[1:]).cause == Cause.LABELS_SHUFFLED
    assert LabelsBelong.trend(course).cause == ""


@pytest.mark.parametrize("history", [record(), record(steps=50)])
def test_what_is_not_judged(history):
    labels = torch.zeros(200, dtype=torch.long) if len(history) > 100 else SHUFFLED
    assert measured(labels, NOTHING, NOTHING, history).verdict().level == "not_applicable"


@pytest.mark.parametrize("function", ["mse_loss", "huber_loss", "smooth_l1_loss"])
def test_targets_of_a_regression(function):
    loss = getattr(F, function)
    targets = torch.randn(200, 1, generator=random(7))
    answers = targets + 0.3 * normal(d=1)  # learned by heart
    given = {
        "losses": loss(answers, targets, reduction="none").mean(1), "targets": targets,
        "held_out_losses": loss(normal(d=1, seed=8), normal(d=1, seed=9), reduction="none").mean(1),
        "held_out_targets": normal(d=1, seed=9),
    }  # fmt: skip
    loop = Loop(step=150, losses=(LossFacts(function, reduction="mean", root=True, factor=1.0),))
    result = diag.labels_belong(history=record(), inputs=normal(seed=4), loop=loop, **given)
    assert result.by_heart and LabelsBelong.trend([(150, result)]).cause == Cause.LABELS_SHUFFLED
    constant = loss(targets.mean().expand_as(targets), targets)
    assert result.gain == pytest.approx(float(constant - given["losses"].mean()), rel=1e-5)


def test_ids_that_hardly_two_rows_share_say_nothing():
    users, items = (torch.randint(3_000, (200,), generator=random(s)) for s in (1, 2))
    ratings = torch.randn(200, generator=random(3))
    arguments = {"history": record(), "losses": ratings.square(), "targets": ratings}
    alone = diag.labels_belong(inputs=torch.stack([users, items], 1), **arguments)
    assert alone.verdict().level == "not_applicable"
    shared = diag.labels_belong(inputs=torch.stack([users % 9, items % 9], 1), **arguments)
    assert shared.verdict().level == "unknown" and shared.p_value > 0.05


def test_weights_that_decay_has_taken_are_no_sign_against_the_labels():
    whole = record()
    decayed = dataclasses.replace(whole, parameter_norm=whole.parameter_norm * numpy.linspace(1, 0.1, 150)[:, None])
    assert measured(SHUFFLED, NOTHING, NOTHING).works
    assert not measured(SHUFFLED, NOTHING, NOTHING, history=decayed).works
