"""Densities, traces and norms against the spectra that were planted, within their own standard errors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diag.errors import InvalidInput
from diag.linalg.lanczos import eigenpairs, run_lanczos
from diag.linalg.operator import LinearOperator
from diag.linalg.quadrature import measure_of, quadrature_rule, spectral_measure
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
@pytest.mark.parametrize("storage", [None, torch.bfloat16])
def test_distribution_function_and_mass(
    planted: Planted, o6c: Tensor, deflated: bool, storage: torch.dtype | None
) -> None:
    operator = planted(o6c, torch.float32)
    known = eigenpairs(operator, largest=3).vectors if deflated else None
    measure = spectral_measure(operator, num_probes=8, steps=40, deflate=known, storage=storage)
    grid = torch.linspace(-0.12, 11, 30, dtype=torch.float64)
    error = (measure.distribution(grid) - share_below(o6c, grid)).abs()
    assert (error <= 4 * measure.distribution_standard_error(grid) + 1e-3).all()
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
    error = measure.distribution_standard_error(middle)
    assert abs(measure.distribution(middle) - 0.75) < 4 * error


def test_refusals(planted: Planted, o6c: Tensor) -> None:
    with pytest.raises(InvalidInput, match="at least 2 are needed for a standard error"):
        trace_and_norm(planted(o6c), num_probes=1)
    with pytest.raises(InvalidInput, match="give at least 1 of each"):
        spectral_measure(planted(o6c), num_probes=0)
