"""Dropout that leaves nothing and a classifier with one input are told; usual networks are not."""

import pytest
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.data import LossFacts
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.loop.start import shape_of


def judged(model, function="cross_entropy", classes=3):
    losses = (LossFacts(function=function, input_shape=(16, classes)),)
    return diag.capacity(loop=Loop(step=3, losses=losses, shape=shape_of(model))).verdict()


def network(width=8, rate=0.5, outputs=3):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(rate), nn.Linear(width, outputs))


@pytest.mark.parametrize(
    ("model", "words"),
    [(network(rate=0.98), "leaves 2 % of the units"), (network(rate=1.0), "nothing is left"),
     (network(width=1), "3 classes by a single number")],
)  # fmt: skip
def test_what_lets_hardly_anything_through(model, words):
    verdict = judged(model)
    assert verdict.cause == Cause.UNDERFITTING and verdict.level == "warning" and words in verdict.sentence


@pytest.mark.parametrize("model", [network(), network(rate=0.8), nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 3))])
def test_usual_networks_are_fine(model):
    assert judged(model).level == "ok"


def test_one_input_is_fine_where_nothing_is_classified():
    assert judged(network(width=1), function="mse_loss").level == "ok"


def test_a_model_without_such_layers_is_not_judged():
    assert judged(nn.ReLU()).level == "not_applicable"
