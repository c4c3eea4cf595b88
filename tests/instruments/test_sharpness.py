"""Sharpness against its closed forms on quadratics, and what may be said of it: comparisons only."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import diag
from diag.curvature.neighbourhood.surroundings import Ball, Surroundings
from diag.display import format_number
from diag.errors import InvalidInput
from diag.instruments.sharpness import Sharpness, _preconditions
from diag.result import Level
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


def ball_maximum(h, g, rho):
    """max of <g, e> + 1/2 e^T H e over |e| <= rho, by the secular equation |(mu I - H)^-1 g| = rho."""
    values, vectors = torch.linalg.eigh(h)
    b = vectors.T @ g
    low, high = max(float(values[-1]), 0.0), float(values[-1]) + float(g.norm()) / rho + 1
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if ((b / (mu - values)) ** 2).sum() > rho**2 else (low, mu)
    e = vectors @ (b / (high - values))
    return float(g @ e + 0.5 * e @ h @ e)


def dense(seed, size=6, shift=0.0):
    """A symmetric matrix (with eigenvalues of both signs where shift is 0) and a point."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=generator, dtype=torch.float64)
    w = torch.randn(size, generator=generator, dtype=torch.float64)
    return (a + a.T) / 2 + shift * torch.eye(size, dtype=torch.float64), w


@pytest.mark.parametrize("seed", range(4))
def test_every_measure_of_a_dense_quadratic(seed):
    """L = 1/2 w^T H w at a point that is no minimum, H of both signs; T = |w| in the adaptive forms. The worst case
    is searched and may fall short of the maximum by 2 %; draws are within four of their standard errors."""
    h, w = dense(seed)
    model = Quadratic(h, w.clone(), 1.0)
    data = (torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    rho = 0.4
    result = diag.sharpness(
        diag.Snapshot(model, lambda z, t: z.mean(), data), rho=rho, sigma=0.3, tolerance=1e-8, num_draws=200
    )
    g = h @ w
    assert result.gradient_norm == pytest.approx(float(g.norm()), rel=1e-12)
    for prefix, scale in (("", torch.ones_like(w)), ("adaptive_", w.abs())):
        scaled, slope = scale[:, None] * h * scale, scale * g
        e = rho * slope / slope.norm()
        found = {n: getattr(result, prefix + n) for n in ("one_step", "worst_case", "average", "lambda_max")}
        exact = ball_maximum(scaled, slope, rho)
        assert found["one_step"] == pytest.approx(float(slope @ e + 0.5 * e @ scaled @ e), rel=1e-9)
        assert exact * 0.98 <= found["worst_case"] <= exact * (1 + 1e-9)
        assert found["one_step"] <= found["worst_case"]
        error = getattr(result, prefix + "average_standard_error")
        assert abs(found["average"] - 0.5 * 0.3**2 * float(scaled.trace())) < 4 * error
        assert found["lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(scaled)[-1]), rel=1e-6)


def test_the_nearest_step_of_a_ball():
    e = torch.tensor([3.0, -4.0, 0.125]).double()
    assert Ball(1.0, "linf").nearest(e).tolist() == [1.0, -1.0, 0.125]
    assert torch.equal(Ball(1.0).nearest(e), e * (1.0 / e.norm())) and torch.equal(Ball(6.0).nearest(e), e)


def test_a_summit_inside_the_ball_is_climbed():
    """-w^2 / 2 rises from w = 0.2 by 0.02 at most, at 0: the climb's steps end below a tenth of the radius."""
    result = diag.sharpness(quadratic([-1.0], [0.2]), rho=1.0)
    assert 0.98 * 0.02 <= result.worst_case <= 0.02 * (1 + 1e-9)


def test_the_largest_entry_as_the_norm():
    """Within |e_i| <= rho a diagonal convex quadratic is largest in the corner along the gradient's signs."""
    h, w, rho = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([0.5, -2.0, 4.0]).double(), 0.2
    result = diag.sharpness(quadratic(h.tolist(), w.tolist()), rho=rho, norm="linf")
    for prefix, scale in (("", torch.ones_like(w)), ("adaptive_", w.abs())):
        exact = float((rho * scale * (h * w).abs() + 0.5 * h * (rho * scale) ** 2).sum())
        assert getattr(result, prefix + "one_step") == pytest.approx(exact, rel=1e-9)
        assert getattr(result, prefix + "worst_case") == pytest.approx(exact, rel=1e-9)
    assert result.sigma == pytest.approx(rho / math.sqrt(3))
    with pytest.raises(InvalidInput, match="norm is 'max'; expected one of l2, linf"):
        diag.sharpness(quadratic([1.0], [1.0]), norm="max")


class Quadratics(nn.Module):
    """Example i has the loss 1/2 (w - c_i)^T A_i (w - c_i)."""

    def __init__(self, matrices, centres, start):
        super().__init__()
        self.matrices, self.centres, self.w = matrices, centres, nn.Parameter(start)

    def forward(self, i):
        d = self.w - self.centres[i]
        return 0.5 * torch.einsum("np,npq,nq->n", d, self.matrices[i], d)


def by_example(n=12, size=4):
    pairs = [dense(100 + i, size, shift=3.0) for i in range(n)]
    matrices, centres = (torch.stack([p[k] for p in pairs]) for k in (0, 1))
    start = torch.linspace(0.5, 2, size, dtype=torch.float64)
    data = (torch.arange(n), torch.zeros(n, dtype=torch.float64))
    model = Quadratics(matrices, centres, start)
    return diag.Snapshot(model, lambda z, t: z.mean(), data), matrices, centres, start


@pytest.mark.parametrize("m", [1, 5])
def test_m_sharpness_is_the_mean_over_groups_of_their_own_steps(m):
    """Every group's loss is a quadratic of its own, whose one step and maximum are known."""
    snapshot, matrices, centres, w = by_example()
    result = diag.sharpness(snapshot, rho=0.3, m=m, seed=3)
    # The groups that the instrument draws; for m = 1 they are the examples, in whatever order.
    groups = torch.randperm(12, generator=torch.Generator().manual_seed(3)).split(m)
    for prefix, scale in (("", torch.ones_like(w)), ("adaptive_", w.abs())):
        one_step, worst = [], []
        for group in groups:
            h = scale[:, None] * matrices[group].mean(0) * scale
            g = scale * torch.stack([matrices[i] @ (w - centres[i]) for i in group]).mean(0)
            e = 0.3 * g / g.norm()
            one_step.append(float(g @ e + 0.5 * e @ h @ e) * len(group) / 12)
            worst.append(ball_maximum(h, g, 0.3) * len(group) / 12)
        assert getattr(result, prefix + "m_one_step") == pytest.approx(sum(one_step), rel=1e-9)
        found = getattr(result, prefix + "m_worst_case")
        assert 0.98 * sum(worst) <= found <= sum(worst) * (1 + 1e-9)
        if m == 1:
            expected = torch.tensor(one_step).mul(12).std() / math.sqrt(12) * 2.200985160 / 2  # t of eleven
            error = getattr(result, prefix + "m_one_step_standard_error")
            assert error == pytest.approx(float(expected), rel=1e-6)
    assert (result.m, result.num_groups) == (m, len(groups))
    check_result(result)


def test_groups_at_their_own_minimum_try_the_worst_step_of_the_whole():
    """Where no group has a gradient its own ascent goes nowhere, and yet it is not at its maximum."""
    _, matrices, centres, w = by_example()
    model = Quadratics(matrices, w.expand_as(centres), w.clone())
    data = (torch.arange(12), torch.zeros(12, dtype=torch.float64))
    result = diag.sharpness(diag.Snapshot(model, lambda z, t: z.mean(), data), rho=0.3, m=4, tolerance=1e-8)
    largest = float(torch.linalg.eigvalsh(matrices.mean(0))[-1])
    assert result.worst_case == pytest.approx(0.5 * 0.3**2 * largest, rel=1e-6)
    assert result.m_one_step == 0 and result.m_worst_case >= result.worst_case * (1 - 1e-12)


def test_m_sharpness_is_never_below_that_of_the_whole():
    """As the mean of the groups' maxima is not below the maximum of their mean; every group tries the latter."""
    problem = classification()
    found = {m: diag.sharpness(problem.snapshot(), m=m, num_draws=4, steps=3) for m in (10, 45, 90, 128)}
    for prefix in ("", "adaptive_"):
        whole = getattr(found[90], prefix + "worst_case")
        assert getattr(found[90], prefix + "m_worst_case") == whole == getattr(found[128], prefix + "m_worst_case")
        assert getattr(found[45], prefix + "m_worst_case") >= whole
        assert getattr(found[10], prefix + "m_worst_case") > whole
    assert [found[m].num_groups for m in (10, 45, 90, 128)] == [9, 2, 1, 1]
    assert (found[90].m, found[128].m) == (90, 90)
    assert found[90].m_worst_case_standard_error == found[90].m_one_step_standard_error == 0
    own = f"({format_number(found[10].m_worst_case)} for groups of m = 10 examples, each in its own)"
    assert own in found[10].verdict().sentence
    assert "for groups" not in found[90].verdict().sentence


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


def test_function_space_is_the_divergence_of_the_outputs_at_any_radius():
    """torch.distributions' own KL between the network and a copy that was moved by SAM's step."""
    problem = classification()
    model = problem.model.double()
    x, y = problem.data[0].double(), problem.data[1]
    for rho in (0.05, 1.0):
        result = diag.sharpness(diag.Snapshot(model, problem.loss_fn, (x, y)), rho=rho, num_draws=4, steps=1)
        gradients = torch.autograd.grad(problem.loss_fn(model(x), y), list(model.parameters()))
        length = torch.cat([g.reshape(-1) for g in gradients]).norm()
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), gradients, strict=True):
                p.add_(g, alpha=rho / float(length))
        before, after = (torch.distributions.Categorical(logits=net(x)) for net in (model, moved))
        expected = torch.distributions.kl_divergence(before, after).mean().detach()
        assert result.function_space == pytest.approx(float(expected), rel=1e-8)
    # At a radius of 1 the network is far from its second-order expansion.
    assert abs(result.function_space_quadratic / result.function_space - 1) > 0.1


def test_function_space_tends_to_its_second_order_form():
    """Oracle 10b: 1/2 d^T F d over the divergence tends to 1, linearly, as the next term is of third order."""
    snapshot = classification().snapshot(dtype=torch.float64)
    gaps = []
    for rho in (1e-2, 1e-3):
        result = diag.sharpness(snapshot, rho=rho, num_draws=4, steps=1)
        gaps.append(abs(result.function_space_quadratic / result.function_space - 1))
    assert gaps[1] < 0.01 and gaps[1] == pytest.approx(gaps[0] / 10, rel=0.2)


def test_function_space_of_a_linear_regression_is_exactly_its_second_order_form():
    """Outputs x . w of unit variance: the divergence is the mean of 1/2 (x . d)^2, and F = x^T x / n."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1, bias=False).double(), torch.randn(20, 3).double()
    y = torch.randn(20, 1).double()
    result = diag.sharpness(diag.Snapshot(model, nn.functional.mse_loss, (x, y)), rho=0.7)
    (g,) = torch.autograd.grad(nn.functional.mse_loss(model(x), y), model.weight)
    d = 0.7 * g.flatten() / g.norm()
    expected = float((x @ d).square().mean() / 2)
    assert result.function_space == pytest.approx(expected, rel=1e-10)
    assert result.function_space_quadratic == pytest.approx(expected, rel=1e-10)


def test_function_space_below_the_rounding_of_the_outputs_is_not_given():
    found = diag.sharpness(classification().snapshot(), rho=1e-6, num_draws=4, steps=1)
    assert math.isnan(found.function_space)
    assert diag.sharpness(classification().snapshot(), rho=1e-2, num_draws=4, steps=1).function_space > 0


@pytest.mark.parametrize("outputs", [{"a": 0}, ("a", "b")])
def test_outputs_without_logits_have_no_function_space_and_all_the_rest(outputs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            z = self.layer(x)
            return {"a": z, "b": z.sum(1)} if isinstance(outputs, dict) else (z.sum(1), z)

    torch.manual_seed(0)
    key = "a" if isinstance(outputs, dict) else 1
    data = (torch.randn(30, 4), torch.arange(30) % 3)
    snapshot = diag.Snapshot(Net(), lambda z, t: nn.functional.cross_entropy(z[key], t), data)
    result = diag.sharpness(snapshot, num_draws=4, steps=1)
    assert math.isnan(result.function_space_quadratic) and result.worst_case > 0


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
    assert "must be above the rounding of the losses, 2.2e-08; give a larger rho." in result.verdict().sentence
    check_result(result)


@pytest.mark.parametrize("settings", [{"rho": 0.0}, {"sigma": -1.0}, {"steps": 0}, {"m": 0}, {"num_draws": 3}])
def test_refused_settings(settings):
    (name,) = settings
    with pytest.raises(InvalidInput, match=rf"sharpness\.{name} takes a .* (above 0|of [14] or more)"):
        diag.sharpness(quadratic([1.0, 2.0], [1.0, 1.0]), **settings)


def test_quantities_by_name_do_without_a_fisher_and_a_divergence():
    result = diag.sharpness(losses_at=_Line(), hessian=diag.Snapshot(*_linear()).quantity("hessian"), m=1)
    assert math.isnan(result.function_space) and math.isnan(result.function_space_quadratic)


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
    stopped = SimpleNamespace(worst_case=1.0, converged=False)
    unmet = _preconditions(stopped, stopped, rounding=1e-9)
    assert "has not converged" in type(result)(**{**vars(result), "preconditions": unmet}).verdict().sentence


def test_the_climb_goes_on_from_step_to_step_and_slows_down():
    """L = -|x - a|^2 with a = (1, .6): in the unit disc it is highest on the way to a."""

    class Hill:
        center = torch.zeros(2, dtype=torch.float64)
        num_examples = 1

        def __call__(self, point):
            return -(point - torch.tensor([1.0, 0.6])).square().sum()[None]

        def step(self, point):
            return self(point), -2 * (point - torch.tensor([1.0, 0.6]))

    around = Surroundings(Hill(), torch.ones(2, dtype=torch.float64), Ball(1.0))
    start = torch.tensor([0.0, -1.0], dtype=torch.float64)
    rise, e = around.worst_case([start], 20)
    top = torch.tensor([1.0, 0.6], dtype=torch.float64) / math.hypot(1, 0.6)
    _, first = around.worst_case([torch.zeros(2, dtype=torch.float64)], 1)
    assert torch.allclose(first, top / 2)  # half the radius at first
    assert torch.allclose(e, top, atol=0.05) and rise == pytest.approx(around.rise(top), abs=5e-3)
