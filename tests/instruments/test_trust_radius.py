"""The trust radius against a quadratic, a cubic and logistic regression with a known constant."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.trust_radius import trust_radius
from diag.result import Level
from diag.testing import check_result, classification, planted_spectrum, refusal


class Scalar(nn.Module):
    """One weight w, whose output for every example is power(w)."""

    def __init__(self, start, power):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        self.power = power

    def forward(self, x):
        return self.weight.pow(self.power).expand(len(x))


def mean(outputs, targets):
    return outputs.mean()


DATA = (torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3))


@pytest.mark.parametrize("start", [0.5, 2.0])
def test_a_cubic_has_its_distance_from_zero(start):
    """f = w^3: |f'(w + h) - f' - h f''| = 3 h^2 <= 3 w^2 up to |h| = w; bisected to 4^(1/2^10) - 1 = .14 %."""
    found = trust_radius(diag.Snapshot(Scalar(start, 3), mean, DATA))
    assert found.radius == pytest.approx(start, rel=2e-3)
    assert found.regularization == pytest.approx(3 * start**2 / start, rel=2e-3)
    # One number: (H + lambda)^-1 g = 3 w^2 / (6 w + 3 w) = w / 3.
    assert found.newton_length == pytest.approx(start / 3, rel=2e-3) and found.newton_cosine == pytest.approx(1)


def test_a_quadratic_is_linear_everywhere():
    model, loss, data = planted_spectrum([5.0, 1.0, 0.1])
    found = trust_radius(diag.Snapshot(model, loss, data))
    assert found.radius == math.inf and found.regularization == 0
    assert "as far as was looked" in found.verdict().sentence
    # Unregularised: the Newton step goes to the minimum, and all of the parameters are the step.
    assert found.newton_length == pytest.approx(float(model.weight.detach().norm()), rel=1e-6)
    check_result(found)


def test_the_bound_by_the_lipschitz_constant_of_logistic_regression():
    """gamma >= sqrt(2 |g| / L2) with L2 = mean |x|^3 / (6 sqrt 3): the largest second derivative of the sigmoid."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    y = (torch.rand(60, generator=generator) < 0.5).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Flatten(0)).double()
    found = trust_radius(diag.Snapshot(model, F.binary_cross_entropy_with_logits, (x, y)))
    constant = float(x.norm(dim=1).pow(3).mean()) / (6 * math.sqrt(3))
    assert found.radius >= math.sqrt(2 * found.gradient_norm / constant)


def test_on_a_snapshot_with_an_update_and_without_a_gradient():
    found = trust_radius(classification().snapshot())
    assert 0 < found.radius <= found.along_update and found.update_length > 0
    assert found.verdict().level is Level.DESCRIPTION and "the last update was" in found.verdict().sentence
    flat = trust_radius(diag.Snapshot(Scalar(0.0, 2), mean, DATA))
    assert flat.verdict().level is Level.NOT_APPLICABLE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_refused(dtype):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    snapshot = diag.Snapshot(nn.Linear(4, 3, dtype=dtype), F.cross_entropy, (x, torch.arange(12) % 3))
    assert "too coarse to be compared" in refusal(trust_radius, snapshot)
