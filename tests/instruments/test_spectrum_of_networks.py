"""The spectrum of five kinds of network against the dense float64 Hessian, within what the result itself states."""

import importlib.util
from pathlib import Path

import numpy
import pytest
import torch

import diag

_path = Path(__file__).parent.parent / "quantities" / "curvature_cases.py"
_spec = importlib.util.spec_from_file_location("curvature_cases", _path)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


def within_its_bounds(result, dense):
    """What must hold of a result beside the exact ascending eigenvalues."""
    exact = dense.flip(0).numpy()
    error = numpy.abs(result.eigenvalues - exact[: len(result.eigenvalues)])
    # float32 products of a network of a thousand parameters round in the seventh digit of the largest eigenvalue.
    rounding = 2e-6 * numpy.abs(exact).max()
    assert (error <= result.residuals + rounding).all()
    assert abs(result.smallest - exact[-1]) <= result.smallest_residual + rounding
    assert abs(result.trace - exact.sum()) <= 4 * result.trace_standard_error + len(exact) * rounding
    norm = numpy.linalg.norm(exact)
    assert abs(result.frobenius_norm - norm) <= 4 * result.frobenius_norm_standard_error + 1e-5 * norm


def distance_of_distributions(result, dense):
    """Kolmogorov's, of the eigenvalues not reported one by one, away from zero, where they are smoothed."""
    mass = numpy.diff(result.density_grid) * (result.density[1:] + result.density[:-1]) / 2
    rest = dense[1:-10].numpy()
    points = result.density_grid[1:]
    exact = (rest <= points[:, None]).sum(1) / len(dense)
    away = numpy.abs(points) > 2e-3 * numpy.abs(dense.numpy()).max()
    return numpy.abs(numpy.cumsum(mass) - exact)[away].max()


@pytest.mark.parametrize("case", cases.MODELS, ids=lambda case: case.__name__)
def test_every_number_is_within_its_own_bound(case):
    model, loss, data = cases.build(case)
    reference = cases.Reference(model, loss, data)
    snapshot = diag.Snapshot(model, loss, [(*batch.args, batch.targets) for batch in data])
    for name, matrix in (("hessian", reference.hessian()), ("gauss_newton", reference.gauss_newton())):
        result = diag.hessian_spectrum(hessian=snapshot.quantity(name), steps=60)
        exact = torch.linalg.eigvalsh(matrix.detach())
        within_its_bounds(result, exact)
        assert len(result.eigenvalues) == 10
        # The weights of one Gaussian start vector of P entries: sqrt(1 / (2 P)) for the distribution, .06 to .07
        # here, and the distance is the largest of many.
        assert distance_of_distributions(result, exact) < 0.15
