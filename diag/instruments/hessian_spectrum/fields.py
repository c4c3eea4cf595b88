"""Eigenvalues that have converged, and the density, trace and norm of the Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.result import Result, measured


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredSpectrum(Result):
    """Eigenvalues that have converged, each with its residual; density, trace and norm with their errors."""

    eigenvalues: NDArray[numpy.float64] = measured("largest eigenvalues, descending", shape="(k,)")
    residuals: NDArray[numpy.float64] = measured(
        "|H v - lambda v|: an eigenvalue lies within this of each one given", shape="(k,)"
    )
    sampling_errors: NDArray[numpy.float64] = measured(
        "how far the curvature along each eigenvector may be off for other data of the same kind: two of "
        "them hold it in about 95 of 100 cases",
        remark="NaN where the data cannot be split",
        shape="(k,)",
    )
    smallest: float = measured("smallest eigenvalue", remark="NaN where it has not converged")
    smallest_residual: float = measured("residual of the smallest eigenvalue")
    trace: float = measured("trace of the Hessian")
    trace_standard_error: float = measured(
        "standard error of the trace", remark="0 where every eigenvalue is known"
    )
    frobenius_norm: float = measured("Frobenius norm of the Hessian")
    frobenius_norm_standard_error: float = measured("standard error of the Frobenius norm")
    negative_share: float = measured(
        "eigenvalues below -0.001 of the largest magnitude, by the quadrature", unit="share"
    )
    negative_share_standard_error: float = measured(
        "a quarter of the interval that holds that share in at least 95 of 100 cases", unit="share"
    )
    num_outliers: float = measured(
        "outliers: leading eigenvectors in the span of the class directions", remark="NaN without class directions"
    )
    overlaps: NDArray[numpy.float64] = measured(
        "squared length of each eigenvector in the span of the class directions", shape="(k,)", unit="share"
    )
    num_class_directions: int = measured("dimension of that span", remark="0 without class directions")
    layer_shares: dict[str, float] = measured("where the top eigenvector lives, by layer", unit="share")
    density_grid: NDArray[numpy.float64] = measured("eigenvalues at which the density is given", shape="(400,)")
    density: NDArray[numpy.float64] = measured(
        "share of the eigenvalues per unit of eigenvalue, without those in `eigenvalues`", shape="(400,)"
    )
    distribution: NDArray[numpy.float64] = measured(
        "share of all eigenvalues up to each point of `density_grid`", shape="(400,)", unit="share"
    )
    distribution_low: NDArray[numpy.float64] = measured(
        "least share up to each point: what the steps cannot resolve, and two standard deviations of the start "
        "vectors' chance",
        shape="(400,)",
        unit="share",
    )
    distribution_high: NDArray[numpy.float64] = measured(
        "largest share up to each point, likewise", shape="(400,)", unit="share"
    )
    distribution_error: float = measured(
        "how far the share of eigenvalues up to a value can be off, at the worst value, in at least 95 of "
        "100 cases",
        unit="share",
    )
    num_parameters: int = measured("size of the Hessian")
    num_products: int = measured("Hessian-vector products spent", remark="depends on the rounding of the dtype")
    eigenvectors: NDArray[numpy.floating[Any]] | None = measured(
        "the eigenvector of each eigenvalue, entries in the order of the parameters",
        remark="None unless asked for",
        shape="(k, P)",
        record=False,
        default=None,
    )

    @property
    def largest_magnitude(self) -> float:
        """The largest magnitude of an eigenvalue that is known."""
        known = [*numpy.abs(self.eigenvalues), abs(self.smallest), float(numpy.abs(self.density_grid).max())]
        return next((float(v) for v in known if math.isfinite(v) and v > 0), 1.0)
