"""Dropout that leaves nothing and a classifier with one input are told; usual networks are not."""

import pytest
import torch
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


def trained(model, inputs=6):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["capacity"]) as watcher:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, inputs)).square().mean().backward()
            optimizer.step()
    return [f.verdict for f in watcher.findings]


@pytest.mark.parametrize(
    "between", [[], [nn.Dropout(0.1)], [nn.BatchNorm1d(16)]], ids=["nothing", "dropout", "batch norm"]
)
def test_layers_without_an_activation_function_are_told(between):
    (verdict,) = trained(nn.Sequential(nn.Linear(6, 16), *between, nn.Linear(16, 16), nn.Linear(16, 3)))
    assert verdict.cause == Cause.UNDERFITTING and "the network's 3 linear layers" in verdict.sentence


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(6, 3)],
        [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)],
        [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3)],  # a projection before the last layer
        [nn.Linear(6, 2, bias=False), nn.Linear(2, 6)],  # narrower than both: principal components
        [nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)],
        [nn.Sequential(nn.Linear(6, 16), nn.Tanh()).requires_grad_(False), nn.Linear(16, 16), nn.Linear(16, 3)],
    ],
    ids=["one layer", "usual", "projection", "narrow", "layer norm", "frozen"],
)
def test_networks_that_are_not_linear_or_are_so_for_a_reason_are_fine(layers):
    assert trained(nn.Sequential(*layers)) == []


@pytest.mark.parametrize(
    ("between", "told"),
    [
        (lambda h, x: h * (h > 0), False),  # a ReLU
        (lambda h, x: h * (h > 0).float(), False),
        (lambda h, x: h * x, False),
        (lambda h, x: h / h.norm(dim=1, keepdim=True).detach(), False),
        (lambda h, x: h + x.relu(), False),
        (lambda h, x: 0.5 * h / 3, True),
    ],
    ids=["mask", "mask of numbers", "gate", "norm", "another input", "scale"],
)
def test_a_product_with_what_is_made_of_the_data_is_not_linear(between, told):
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(between(self.first(x), x))

    assert [v.cause for v in trained(Between())] == ([Cause.UNDERFITTING] if told else [])
