"""Sharpness against its closed forms on quadratics, and what may be said of it: comparisons only."""

import math

import pytest
import torch
from torch import nn

import diag
from diag.errors import InvalidInput
from diag.instruments.sharpness import Sharpness
from diag.result import Level, Precondition
from diag.testing import Quadratic, check_result, classification, leaves_no_trace


def quadratic(diagonal, weights, constant=1.0):
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    model = Quadratic(matrix, torch.tensor(weights, dtype=torch.float64), constant)
    data = (torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    return diag.Snapshot(model, lambda outputs, targets: outputs.mean(), data)


def test_oracle_10a_at_a_minimum():
    """At the minimum: worst case 1/2 rho^2 lambda_max, average 1/2 rho^2 Tr H."""
    result = diag.sharpness(quadratic([4.0, 1.0, 0.25], [0.0, 0.0, 0.0]), rho=0.1, sigma=0.1)
    assert result.worst_case == pytest.approx(0.5 * 0.01 * 4, rel=1e-6)
    assert abs(result.average - 0.5 * 0.01 * 5.25) < 4 * result.average_standard_error
    # Each of the 50 pairs of draws varies by about 1.1 times its mean, so their mean by 15 %.
    assert result.average_standard_error < 0.25 * result.average
    assert result.quadratic_ratio == pytest.approx(4, rel=1e-9)
    assert result.gradient_norm == 0 and result.one_step == 0
    check_result(result)


def test_worst_case_away_from_a_minimum():
    """The maximum of g d + 1/2 d^T H d on the sphere, by its secular equation, 1 % below it at most."""
    h, w, rho = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([0.1, 1.0, 4.0]).double(), 0.5
    g = h * w
    low, high = 4.0, 100.0
    for _ in range(80):
        mu = (low + high) / 2
        low, high = (mu, high) if ((g / (mu - h)) ** 2).sum() > rho**2 else (low, mu)
    d = g / (low - h)
    exact = float(g @ d + 0.5 * (h * d) @ d)
    result = diag.sharpness(quadratic(h.tolist(), w.tolist()), rho=rho)
    assert exact * 0.99 <= result.worst_case <= exact * (1 + 1e-9)
    assert result.one_step <= result.worst_case


def test_sams_step_has_length_rho():
    h, w = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([0.5, 2.0, 4.0]).double()
    g = h * w
    d = 0.05 * g / g.norm()
    result = diag.sharpness(quadratic(h.tolist(), w.tolist()), rho=0.05)
    assert result.one_step == pytest.approx(float(g @ d + 0.5 * (h * d) @ d), rel=1e-9)


def test_adaptive_forms_are_invariant_and_plain_ones_are_not():
    """Rescaled by D = diag(10, .1, 3) at equal function, lambda_max goes from 4 to 100; the adaptive stays 4."""
    h, w, d = (torch.tensor(v).double() for v in ([4.0, 1.0, 0.25], [0.5, 2.0, 4.0], [10.0, 0.1, 3.0]))
    before = diag.sharpness(quadratic(h.tolist(), w.tolist()), rho=0.01, tolerance=1e-6)
    after = diag.sharpness(quadratic((h / d**2).tolist(), (w * d).tolist()), rho=0.01, tolerance=1e-6)
    assert (before.lambda_max, after.lambda_max) == (pytest.approx(4), pytest.approx(100))
    for name in ("adaptive_lambda_max", "adaptive_one_step", "adaptive_worst_case", "adaptive_average"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-6), name
    assert before.adaptive_lambda_max == pytest.approx(4)
    assert after.worst_case > 2 * before.worst_case


def test_a_relu_pair_rescaled_has_the_same_adaptive_worst_direction_bound():
    """Oracle 10b on a real network: W1 x 5, W2 / 5 keeps the function and changes lambda_max, not the adaptive."""
    problem = classification()
    model = problem.model.double()
    data = (problem.data[0].double(), problem.data[1])
    before = diag.sharpness(diag.Snapshot(model, problem.loss_fn, data), rho=0.01, num_draws=4, steps=2)
    with torch.no_grad():
        model[0].weight.mul_(5)
        model[0].bias.mul_(5)
        model[2].weight.div_(5)
    after = diag.sharpness(diag.Snapshot(model, problem.loss_fn, data), rho=0.01, num_draws=4, steps=2)
    assert after.loss == pytest.approx(before.loss, rel=1e-12)
    assert abs(after.lambda_max / before.lambda_max - 1) > 0.2
    assert after.adaptive_lambda_max == pytest.approx(before.adaptive_lambda_max, rel=2e-2)
    assert after.adaptive_one_step == pytest.approx(before.adaptive_one_step, rel=1e-6)


def test_function_space_is_the_divergence_to_second_order():
    """1/2 d^T F d over KL(softmax f || softmax f_d) tends to 1 as the radius goes to 0: 1 % at rho = 1e-3."""
    problem = classification()
    model = problem.model.double()
    x, y = problem.data[0].double(), problem.data[1]
    rho = 1e-3
    result = diag.sharpness(diag.Snapshot(model, problem.loss_fn, (x, y)), rho=rho, num_draws=4)
    before = model(x).log_softmax(1).detach()
    gradients = torch.autograd.grad(problem.loss_fn(model(x), y), list(model.parameters()))
    length = torch.cat([g.reshape(-1) for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.add_(g, alpha=rho / float(length))
        divergence = nn.functional.kl_div(model(x).log_softmax(1), before, log_target=True, reduction="batchmean")
    assert result.function_space / float(divergence) == pytest.approx(1, abs=0.01)


def test_the_verdict_only_describes_and_the_trend_only_compares():
    sharp = diag.sharpness(quadratic([400.0, 1.0], [0.1, 0.1]))
    flat = diag.sharpness(quadratic([0.4, 1e-3], [0.1, 0.1]))
    for result in (sharp, flat):
        assert result.verdict().level is Level.OK
        assert "this describes and judges nothing" in result.verdict().sentence
        assert "neither flat nor sharp says how well a network generalises" in result.verdict().advice
        assert result.verdict().confidence == "contested"
    trend = Sharpness.trend([(10, sharp), (20, flat)])
    assert trend.level is Level.OK
    assert "From step 10 to 20 the worst rise within rho = 0.05 went from" in trend.sentence


def test_no_verdict_below_the_rounding_of_the_losses():
    result = diag.sharpness(quadratic([1e-9, 1e-9], [1.0, 1.0], constant=1e6))
    assert result.verdict().level is Level.NOT_APPLICABLE
    assert "is to be above the rounding of the losses, 2.2e-08; give a larger rho." in result.verdict().sentence
    check_result(result)


@pytest.mark.parametrize("settings", [{"rho": 0.0}, {"sigma": -1.0}, {"steps": 0}, {"m": 0}, {"num_draws": 3}])
def test_refused_settings(settings):
    with pytest.raises(InvalidInput, match="give positive radii, at least 1 example in a group, 1 step and 4 draws"):
        diag.sharpness(quadratic([1.0, 2.0], [1.0, 1.0]), **settings)


def test_without_a_fisher_the_function_space_is_not_given():
    assert math.isnan(
        diag.sharpness(losses_at=_Line(), hessian=diag.Snapshot(*_linear()).quantity("hessian")).function_space
    )


def _linear():
    return nn.Linear(1, 1).double(), nn.functional.mse_loss, (torch.ones(3, 1).double(), torch.ones(3, 1).double())


class _Line:
    center = torch.tensor([1.0, 2.0], dtype=torch.float64)
    num_examples = 1

    def __call__(self, point):
        return point.square().sum()[None]

    def step(self, point):
        return self(point), 2 * point


def test_the_draws_have_the_radius_on_average():
    result = diag.sharpness(quadratic([4.0, 1.0, 0.25, 1.0], [0.0] * 4), rho=0.1)
    assert result.sigma == pytest.approx(0.05)
    assert abs(result.average - 0.5 * 0.05**2 * 6.25) < 4 * result.average_standard_error


def test_the_slope_tells_a_minimum_from_a_hillside():
    """L = 1/2 h w^2 + c from w: the rise within rho is h w rho + 1/2 h rho^2 along the gradient."""
    hillside = diag.sharpness(quadratic([1.0], [3.0]), rho=0.01)
    assert hillside.slope == pytest.approx(math.log2((0.03 + 0.5e-4) / (0.015 + 0.125e-4)), rel=1e-6)
    bottom = diag.sharpness(quadratic([1.0], [1e-9]), rho=0.01)
    assert bottom.slope == pytest.approx(2, abs=1e-5)


def test_measuring_leaves_the_parameters_as_they_are():
    problem = classification()
    with leaves_no_trace(problem.model):
        diag.sharpness(problem.snapshot(), num_draws=4, steps=2)


def test_two_networks_are_compared_at_equal_loss_only():
    start, kind = [0.5, 0.5], Sharpness
    sharp = diag.sharpness(quadratic([40.0, 1.0], start, -5.125 + 1), rho=0.1)
    flat = diag.sharpness(quadratic([0.4, 0.1], start, -0.0625 + 1), rho=0.1)
    assert sharp.loss == pytest.approx(flat.loss)
    verdict = sharp.compared_with(flat)
    assert verdict.level is Level.OK and "the adaptive average rises differ" in verdict.sentence
    assert flat.compared_with(flat).level is Level.UNKNOWN
    lower = diag.sharpness(quadratic([0.4, 0.1], start, 0.0), rho=0.1)
    assert "differ by more than 5 %" in sharp.compared_with(lower).sentence
    wider = kind(**{**vars(flat), "rho": 0.2})
    assert "the radii, sigmas or norms differ" in flat.compared_with(wider).sentence
    for verdict in (sharp.compared_with(lower), flat.compared_with(wider)):
        assert verdict.level is Level.NOT_APPLICABLE


def test_an_eigenvalue_that_has_not_converged_is_not_judged():
    result = diag.sharpness(quadratic([1.0, 2.0], [1.0, 1.0]))
    unmet = tuple(Precondition(p.name, p.name != "converged", p.detail) for p in result.preconditions)
    assert "has not converged" in type(result)(**{**vars(result), "preconditions": unmet}).verdict().sentence
