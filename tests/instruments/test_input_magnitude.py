"""Input magnitude: the identity for a linear layer, and what it cannot see."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.gradients import MatrixGradients
from diag.result import Level
from diag.testing import refusal

magnitude = diag.input_magnitude


def directions(n=200, d=6):
    torch.manual_seed(0)
    return F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1)


def linear(x, bias=False):
    """A linear layer whose output gradient is the same for every example."""
    model = nn.Sequential(nn.Linear(x.shape[1], 1, bias=bias)).double()
    return magnitude(diag.Snapshot(model, lambda o, t: o.mean(), (x, torch.zeros(len(x)))))


def test_constant_output_gradient_gives_slope_one():
    sizes = torch.logspace(-1, 2, 200, dtype=torch.float64)
    result = linear(directions() * sizes[:, None])
    assert result.slope == pytest.approx(1, abs=1e-10)
    assert result.correlation == pytest.approx(1, abs=1e-10)
    squares = sizes.square()
    assert result.top_share == pytest.approx(float(squares.sort().values[-2:].sum() / squares.sum()), rel=1e-10)


def test_the_bias_adds_one():
    """|g_i|^2 = |delta|^2 (|x_i|^2 + 1)."""
    x = directions() * torch.linspace(0.1, 3, 200, dtype=torch.float64)[:, None]
    result = linear(x, bias=True)
    expected = (x.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(torch.tensor(result.gradient_norms), expected, rtol=1e-10, atol=0)


def test_scaled_inputs_scale_the_gradient():
    x = directions() * torch.linspace(1, 2, 200, dtype=torch.float64)[:, None]
    once, twice = linear(x), linear(2 * x)
    torch.testing.assert_close(
        torch.tensor(twice.gradient_norms), 2 * torch.tensor(once.gradient_norms), rtol=1e-10, atol=0
    )
    assert twice.condition == pytest.approx(once.condition)


def test_inputs_of_one_size_have_no_slope():
    result = linear(directions())
    assert math.isnan(result.slope) and math.isnan(result.correlation)
    assert "too little to fit a slope" in result.verdict().sentence


def test_without_a_gradient_in_the_layer_it_says_that_and_nothing_of_the_inputs():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    model[0].bias.data.fill_(-100)
    x = directions() * torch.logspace(-1, 1, 200, dtype=torch.float64)[:, None]
    result = magnitude(diag.Snapshot(model, lambda o, t: o.mean(), (x, torch.zeros(len(x)))))
    sentence = result.verdict().sentence
    assert sentence.startswith("No verdict: 0 of 200 examples have a gradient other than zero in 0")
    assert "differ" not in sentence


def test_condition_of_a_known_spectrum():
    x = torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    assert linear(x).condition == pytest.approx(9 / (11 / 3))


def test_it_describes_and_does_not_judge():
    result = linear(directions() * torch.linspace(1, 9, 200, dtype=torch.float64)[:, None])
    verdict = result.verdict()
    assert verdict.level == Level.NOT_APPLICABLE and "has not been tested" in verdict.sentence


def test_refusals():
    gradients = MatrixGradients(torch.randn(6, 3))
    given = {"per_example_gradients": gradients}
    assert "not one floating tensor" in refusal(magnitude, inputs=torch.arange(6), **given)
    assert "There is no layer 'x'" in refusal(magnitude, inputs=torch.randn(6, 2), layer="x", **given)
