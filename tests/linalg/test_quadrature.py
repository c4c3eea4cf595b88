"""Densities, traces and norms against the spectra that were planted, within their own standard errors."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diag.errors import InvalidInput
from diag.linalg.lanczos import Eigenpairs, eigenpairs, run_lanczos
from diag.linalg.operator import FunctionOperator, LinearOperator
from diag.linalg.quadrature import SpectralMeasure, measure_of, quadrature_rule, spectral_measure
from diag.linalg.trace import trace_and_norm

Planted = Callable[..., LinearOperator]


def share_below(spectrum: Tensor, grid: Tensor) -> Tensor:
    return (spectrum[:, None] <= grid).double().mean(0)


def test_quadrature_integrates_polynomials_exactly(planted: Planted, o6c: Tensor) -> None:
    """The Gauss rule of 4 steps is exact to degree 7: v^T A^p v = sum of weights times nodes^p."""
    operator = planted(o6c)
    run = run_lanczos(operator, None, max_products=4)
    nodes, weights = quadrature_rule(run.first_cycle)
    v = run.space.basis[0]
    image = v
    for power in range(8):
        assert abs((weights * nodes**power).sum() / (v @ image) - 1) < 1e-10, power
        image = operator.matvec(image)


@pytest.mark.parametrize("deflated", [False, True])
def test_distribution_function_and_mass(planted: Planted, o6c: Tensor, deflated: bool) -> None:
    operator = planted(o6c, torch.float32)
    known = eigenpairs(operator, largest=3).vectors if deflated else None
    measure = spectral_measure(operator, num_probes=8, steps=40, deflate=known)
    grid = torch.linspace(-0.12, 11, 30, dtype=torch.float64)
    (low, high), truth = measure.distribution_bounds(grid, deviations=4), share_below(o6c, grid)
    assert ((low <= truth) & (truth <= high)).all()
    assert measure.distribution(grid)[-1] == pytest.approx(1, abs=1e-6)
    fine = torch.linspace(-2, 12, 40_000, dtype=torch.float64)
    assert torch.trapezoid(measure.density(fine, width=0.05), fine) == pytest.approx(1, abs=1e-6)
    if deflated:  # three eigenvalues of 200 are atoms, exactly
        assert measure.distribution(torch.tensor([3.0]).double()) == pytest.approx(1 - 2 / 200, abs=1e-6)


def test_standard_errors_are_honest(planted: Planted, o6c: Tensor) -> None:
    """Over 30 seeds the true trace and norm lie within 2 standard errors about 95 % of the time."""
    operator = planted(o6c, torch.float32)
    inside = {"trace": 0, "norm": 0, "hutchinson": 0}
    for seed in range(30):
        measure = spectral_measure(operator, num_probes=6, steps=3, seed=seed)
        trace, probes = measure.trace(), trace_and_norm(operator, num_probes=12, seed=seed).trace
        inside["trace"] += abs(trace.value - o6c.sum()) < 2 * trace.standard_error
        inside["hutchinson"] += abs(probes.value - o6c.sum()) < 2 * probes.standard_error
        norm = measure.frobenius_norm()
        inside["norm"] += abs(norm.value - o6c.norm()) < 2 * norm.standard_error
    # 24 of 30 has a probability below 1 % at a coverage of 95 %; spreads of 6 skewed samples cover less.
    assert inside["trace"] >= 24
    assert inside["hutchinson"] >= 24
    assert inside["norm"] >= 20


def test_one_probe_has_a_standard_error_of_the_right_size(planted: Planted, o6c: Tensor) -> None:
    """Theory for one Gaussian direction: sqrt(2 (|A|_F^2 - tr^2 / n)); its plug-in scatters by a factor."""
    theory = (2 * (o6c.square().sum() - o6c.sum() ** 2 / 200)).sqrt()
    operator = planted(o6c)
    errors = [spectral_measure(operator, steps=4, seed=s).trace().standard_error for s in range(30)]
    assert 0.5 < torch.tensor(errors).square().mean().sqrt() / theory < 1.6


def test_where_no_direction_is_special_chance_has_no_part(planted: Planted) -> None:
    """n v^T (c I) v = c n for every unit vector v: (tr B)^2 / n takes all of tr B^2 away."""
    measure = spectral_measure(planted([3.0] * 40), steps=3, seed=0)
    assert measure.trace().value == pytest.approx(120, rel=1e-12) and measure.trace().standard_error < 1e-6


def test_errors_have_the_unit_of_what_they_belong_to(planted: Planted, o6c: Tensor) -> None:
    one, ten = (trace_and_norm(planted(c * o6c), num_probes=6) for c in (1.0, 10.0))
    for of in ("trace", "frobenius_norm"):
        small, large = (getattr(found, of).standard_error for found in (one, ten))
        assert large == pytest.approx(10 * small, rel=1e-9) and small > 0


@pytest.mark.parametrize("sign", [1, -1])
def test_deflation_sharpens_and_a_negative_trace_is_fine(planted: Planted, o6c: Tensor, sign: int) -> None:
    operator, truth = planted(sign * o6c), sign * o6c.sum()
    known = eigenpairs(operator, magnitude=3, tolerance=1e-8).vectors
    plain = trace_and_norm(operator, num_probes=16)
    deflated = trace_and_norm(operator, num_probes=16, deflate=known)
    assert sign * truth > 10
    assert abs(plain.trace.value - truth) < 4 * plain.trace.standard_error
    assert abs(deflated.trace.value - truth) < 4 * deflated.trace.standard_error
    assert deflated.trace.standard_error < 0.3 * plain.trace.standard_error
    assert deflated.num_products == 19
    assert abs(deflated.frobenius_norm.value - o6c.norm()) < 4 * deflated.frobenius_norm.standard_error


def test_deflation_by_wrong_directions_stays_unbiased(planted: Planted, o6c: Tensor) -> None:
    """tr A = tr U A U^T + tr P A P for any orthonormal U, and |A|_F^2 with the cross term."""
    anything = torch.randn(5, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    estimate = trace_and_norm(planted(o6c), num_probes=400, deflate=anything)
    assert abs(estimate.trace.value - o6c.sum()) < 4 * estimate.trace.standard_error
    assert abs(estimate.frobenius_norm.value - o6c.norm()) < 4 * estimate.frobenius_norm.standard_error


@pytest.mark.parametrize("with_residuals", [False, True])
def test_the_norm_takes_what_couples_the_known_to_the_rest_twice(with_residuals: bool) -> None:
    """A diagonal matrix but for its first row and column, which are known: probes of +-1 are exact on the rest."""
    matrix = torch.diag(torch.linspace(1, 2, 30, dtype=torch.float64))
    matrix[0, 5] = matrix[5, 0] = 3.0
    matrix[0, 9] = matrix[9, 0] = -2.0
    known: Tensor | Eigenpairs = torch.eye(30, dtype=torch.float64)[:1]
    if with_residuals:
        residual = torch.tensor([13.0], dtype=torch.float64).sqrt()
        known = Eigenpairs(matrix[:1, 0], known, residual, residual, residual < 0, 1, 0.0, 0)
    found = trace_and_norm(LinearOperator.from_matrix(matrix), num_probes=3, deflate=known)
    assert found.frobenius_norm.value == pytest.approx(float(matrix.norm()), rel=1e-12)
    assert found.trace.value == pytest.approx(45, rel=1e-12)
    assert found.frobenius_norm.standard_error == pytest.approx(0, abs=1e-12)


def test_the_density_is_smoothed_by_a_hundredth_of_the_range_unless_told() -> None:
    """One node of weight 1 among nodes from 2 to 4: at the node 1 / (width sqrt(2 pi)), the width being .02."""
    nodes = torch.tensor([[2.0, 2.5, 4.0]], dtype=torch.float64)
    weights = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    measure = SpectralMeasure(nodes, weights, torch.zeros(0), 3, 0, 3)
    peak = measure.density(torch.tensor([2.5], dtype=torch.float64))
    assert float(peak) == pytest.approx(1 / (0.02 * math.sqrt(2 * math.pi)))
    single = SpectralMeasure(nodes[:, 1:2], weights[:, 1:2], torch.zeros(0), 3, 0, 1)  # no range: a spike, finite
    assert 1e6 < float(single.density(torch.tensor([2.5], dtype=torch.float64))) < math.inf


def test_eigenvalues_density_and_trace_from_one_run(planted: Planted, o6c: Tensor) -> None:
    operator = planted(o6c)
    run = run_lanczos(operator, None, max_products=40)
    measure = measure_of([run], 200, 0, torch.zeros(0), run.num_products)
    assert operator.num_products == 40
    torch.testing.assert_close(run.ritz.values.flip(0)[:3], o6c[:3], rtol=1e-10, atol=0)
    trace = measure.trace()
    assert abs(trace.value - o6c.sum()) < 4 * trace.standard_error


def test_breakdown_leaves_the_quadrature_of_the_start_vector(planted: Planted) -> None:
    measure = spectral_measure(planted([2.0] * 10 + [0.0] * 30), num_probes=30, steps=10)
    assert torch.allclose(measure.weights.sum(1), torch.ones(30, dtype=torch.float64))
    middle = torch.tensor([1.0], dtype=torch.float64)
    error = (2 * 0.75 * 0.25 / 42 / 30) ** 0.5
    assert abs(float(measure.distribution(middle)) - 0.75) < 4 * error


# How far the distribution function can be off, with one probe too.


def bulk_with_a_tail() -> Tensor:
    return torch.randn(300, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3


def low_rank() -> Tensor:
    return torch.cat([torch.linspace(0.5, 3, 20, dtype=torch.float64), torch.zeros(180, dtype=torch.float64)])


@pytest.mark.parametrize("steps", [6, 25])
@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("values", [bulk_with_a_tail(), low_rank()], ids=["tail", "low rank"])
def test_the_bounds_of_the_distribution_hold(values: Tensor, probes: int, steps: int) -> None:
    """Two standard deviations hold the truth at each point in 95 of 100 seeds or more: of 24, fewer than 20 has a
    probability of 1 %."""
    operator = FunctionOperator(lambda v: values * v, len(values), torch.float64)
    grid = torch.quantile(values, torch.linspace(0, 1, 21, dtype=torch.float64)) + 1e-7
    truth = share_below(values, grid)
    inside = torch.zeros(len(grid))
    for seed in range(24):
        measure = spectral_measure(operator, num_probes=probes, steps=steps, seed=seed)
        low, high = measure.distribution_bounds(grid)
        estimate = measure.distribution(grid)
        assert ((low <= estimate + 1e-12) & (estimate <= high + 1e-12) & (low >= 0) & (high <= 1)).all()
        inside += ((low <= truth) & (truth <= high)).float()
    assert inside.min() >= 20


@pytest.mark.parametrize(("probes", "known"), [(1, 0), (4, 0), (1, 150)])
def test_two_deviations_of_chance_are_as_wide_as_two(probes: int, known: int) -> None:
    """The measures of Gaussian vectors themselves, which leave nothing unresolved but one node: at a point the
    truth lies outside the bounds in 4.6 of 100 cases at most, and in no fewer than 1 (2.5 deviations with the
    node); half the width would leave out 32 or more. 600 cases know the share within .009."""
    size, rest = 300, 300 - known
    generator = torch.Generator().manual_seed(0)
    nodes = torch.arange(rest, dtype=torch.float64).expand(probes, rest)
    atoms = rest + torch.arange(known, dtype=torch.float64)
    grid = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64) * rest - 0.5
    truth = (nodes[0][:, None] <= grid).double().sum(0) / size
    outside = torch.zeros(3)
    for _ in range(600):
        weights = torch.randn(probes, rest, generator=generator, dtype=torch.float64).square()
        weights *= rest / size / weights.sum(1, keepdim=True)
        measure = SpectralMeasure(nodes, weights, atoms, size, 0, probes)
        low, high = measure.distribution_bounds(grid)
        outside += ((truth < low) | (high < truth)).float()
    assert float(outside.min()) / 600 > 0.01 and float(outside.max()) / 600 < 0.07


def test_without_chance_a_rule_bounds_its_own_measure_strictly() -> None:
    """The inequalities of Chebyshev, Markov and Stieltjes: F_v of the start vector, from its squared entries,
    is between the sums, at every point and for every seed."""
    values = bulk_with_a_tail()
    operator = FunctionOperator(lambda v: values * v, len(values), torch.float64)
    grid = torch.linspace(-30, 30, 501, dtype=torch.float64)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(len(values), generator=generator, dtype=torch.float64)
        run = run_lanczos(operator, None, max_products=8, start=start)
        measure = measure_of([run], len(values), 0, torch.zeros(0), 8)
        low, high = measure.distribution_bounds(grid, deviations=0)
        weights = start.square() / start.square().sum()
        exact = (weights[:, None] * (values[:, None] <= grid)).sum(0)
        assert (low <= exact + 1e-9).all() and (exact <= high + 1e-9).all()
        assert float((high - low).mean()) < 0.3  # and they say something


def test_the_chance_of_one_probe_is_beta_distributed() -> None:
    """The variance of the share of squared normal numbers, 2 p (1 - p) / (n + 2), from 200 probes within 20 %."""
    values = torch.cat([torch.zeros(60, dtype=torch.float64), torch.ones(40, dtype=torch.float64)])
    operator = FunctionOperator(lambda v: values * v, 100, torch.float64)
    middle = torch.tensor([0.5], dtype=torch.float64)
    one = [spectral_measure(operator, steps=2, seed=s) for s in range(200)]
    spread = torch.stack([m.distribution(middle) for m in one]).std()
    assert float(spread) == pytest.approx((2 * 0.6 * 0.4 / 102) ** 0.5, rel=0.2)
    # With all of one value deflated nothing is left to chance.
    measure = spectral_measure(operator, steps=2, deflate=torch.eye(100, dtype=torch.float64)[60:])
    assert float(measure.distribution(middle)) == pytest.approx(0.6, abs=1e-12)


def test_refusals(planted: Planted, o6c: Tensor) -> None:
    with pytest.raises(InvalidInput, match="expected at least 2, which a standard error needs"):
        trace_and_norm(planted(o6c), num_probes=1)
    with pytest.raises(InvalidInput, match="expected at least 1 of each"):
        spectral_measure(planted(o6c), num_probes=0)
