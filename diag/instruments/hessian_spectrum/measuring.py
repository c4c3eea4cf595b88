"""The fields of a spectrum, from what Lanczos has found."""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.curvature.operators import CurvatureOperator
from diag.linalg.operator import LinearOperator
from diag.linalg.spectrum import Spectrum

NEAR_ZERO = 1e-3  # of the largest magnitude: what lies below counts as zero
GRID_POINTS = 400
SMOOTHING = 0.15  # of the density, in asinh(eigenvalue / (NEAR_ZERO * largest magnitude))


def extremes_and_sums(found: Spectrum, size: int) -> dict[str, Any]:
    """The eigenvalues that converged, the trace and the norm."""
    top, bottom = found.top, found.bottom
    # Where all eigenvalues were asked for, the smallest is the last of the largest.
    last = bottom if len(bottom.values) or len(top.values) < size else top.subset(slice(-1, None))
    return {
        "eigenvalues": top.values.numpy(),
        "residuals": (top.residuals + top.rounding).numpy(),
        "smallest": float(last.values[0]) if len(last.values) else math.nan,
        "smallest_residual": float(last.residuals[0]) + last.rounding if len(last.values) else math.nan,
        "trace": found.trace.value,
        "trace_standard_error": found.trace.standard_error,
        "frobenius_norm": found.frobenius_norm.value,
        "frobenius_norm_standard_error": found.frobenius_norm.standard_error,
        "num_parameters": size,
        "num_products": found.num_products,
    }


def of_the_density(found: Spectrum) -> dict[str, Any]:
    """The fields of the density and the distribution function, from the quadrature."""
    scale = NEAR_ZERO * found.magnitude or 1.0
    grid = _grid(found.extremes, scale)
    negative = torch.tensor([-scale], dtype=torch.float64)
    low, high = (side.numpy() for side in found.rest.distribution_bounds(grid))
    return {
        "negative_share": float(found.rest.distribution(negative)),
        "negative_share_standard_error": float(torch.stack(found.rest.distribution_bounds(negative)).diff(dim=0))
        / 4,
        "density_grid": grid.numpy(),
        "density": found.rest.density(grid, SMOOTHING, atoms=False, scale=scale).numpy(),
        "distribution": found.rest.distribution(grid).numpy(),
        "distribution_low": low,
        "distribution_high": high,
        "distribution_error": float((high - low).max() / 2),
    }


def _grid(extremes: Tensor, scale: float) -> Tensor:
    """Points that are even in asinh(eigenvalue / scale), from below the smallest value to above the largest."""
    low, high = (torch.asinh(extremes / scale) + torch.tensor([-0.5, 0.5], dtype=torch.float64)).tolist()
    return torch.sinh(torch.linspace(low, high, GRID_POINTS, dtype=torch.float64)) * scale


def notes_on_spectrum(
    hessian: LinearOperator, found: Spectrum, asked: int, inside: NDArray[numpy.bool_]
) -> tuple[str, ...]:
    """What has not converged or may be missing, and what the self-test of the product said."""
    notes = []
    missing = asked - len(found.top.values)
    if missing:
        notes.append(
            f"{missing} of the {asked} largest eigenvalues had not converged and are not reported: give a larger "
            "max_products=."
        )
    if len(inside) and inside.all() and len(inside) < hessian.size:
        notes.append("Every eigenvector asked for lies in the span of the class directions: there may be more.")
    if isinstance(hessian, CurvatureOperator):
        notes.append(hessian.self_test.sentence())
    return tuple(notes)
