"""A whole spectrum from one Lanczos run: both ends with residuals, the quadrature of the rest, trace and norm.

The start vector is Gaussian, so the run that finds the extreme pairs is a quadrature rule of the density, too.
The pairs that have converged are taken out of that rule: their weight at its nodes is dropped, and what is left
stands for the rest of the spectrum. Trace and norm come from further probes that are orthogonal to those pairs, so
that the outliers add no noise to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diag.linalg.lanczos import Eigenpairs, LanczosRun, eigenpairs, extract, run_lanczos
from diag.linalg.operator import LinearOperator
from diag.linalg.quadrature import Estimate, SpectralMeasure, quadrature_rule, spectral_measure
from diag.linalg.refine import complete
from diag.linalg.ritz import Which
from diag.linalg.trace import TraceAndNorm, trace_and_norm

SINGLE_WEIGHT = 11.0  # the 99.9 % quantile of chi-squared with one degree of freedom


@dataclass(frozen=True)
class Spectrum:
    """`top` and `bottom`: the extreme pairs that have converged, best first. `rest`: the quadrature of all other
    eigenvalues, its atoms being those of `top` and `bottom`. `trace`, `frobenius_norm`. `extremes` (2,): the
    smallest and the largest value seen, converged or not. `num_products`."""

    top: Eigenpairs
    bottom: Eigenpairs
    rest: SpectralMeasure
    trace: Estimate
    frobenius_norm: Estimate
    extremes: Tensor
    num_products: int

    @property
    def magnitude(self) -> float:
        """The largest magnitude of an eigenvalue."""
        return float(self.extremes.abs().max())


def spectrum(
    operator: LinearOperator,
    *,
    largest: int = 10,
    tolerance: float = 1e-3,
    steps: int = 80,
    num_probes: int = 1,
    trace_probes: int = 10,
    max_products: int = 300,
    memory: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Spectrum:
    """The `largest` eigenvalues and the smallest one, the density of the rest, trace and Frobenius norm.

    A pair is reported where its residual is within `tolerance` of the largest magnitude, and the largest ones only
    up to the first that has not converged. The run takes at least `steps` products and at most `max_products`;
    `num_probes` above one draws as many new start vectors for the density, of `steps` products each; `trace_probes`
    (at least two) are for the trace. `memory`: a cap in bytes on the basis. `checkpoint`: a folder in which the run
    is saved every few products, so that a killed one resumes there; its file is removed with the run's end.
    Raises InvalidInput where a product is not finite, CheckpointError where the folder cannot be used.
    """
    which = Which(largest=min(largest, operator.size), tolerance=tolerance)
    limits: dict[str, Any] = {"max_products": max(max_products, steps), "min_products": steps, "memory": memory}
    run = run_lanczos(operator, which, seed=seed, checkpoint=checkpoint, **limits)
    limit = tolerance * float(run.ritz.values.abs().max())
    top = extract(run, which, seed)
    bottom, more = _smallest(operator, run, which.count, limit, steps, memory, seed)
    products = run.num_products + more
    if run.satisfied and not run.space.exhausted:  # one start vector shows one copy of a multiple eigenvalue
        top = complete(operator, top, which)
        products += top.num_products - run.num_products
    top = top.subset(slice(0, [*_within(top, limit), False].index(False)))
    known = top.joined(bottom)
    if run.space.exhausted:
        rest, trace, norm = _exact_rest(run, known, operator.size, seed)
    else:
        rest = _rest_of(run, known, operator.size, seed)
        deflate = known if len(known.values) else None
        if num_probes > 1:
            probes: dict[str, Any] = {"num_probes": num_probes, "steps": steps, "memory": memory, "seed": seed + 1}
            rest = spectral_measure(operator, deflate=deflate.vectors if deflate else None, **probes)
        probed = trace_and_norm(operator, num_probes=trace_probes, seed=seed, deflate=deflate)
        trace, norm = _at_least(rest, probed)
        products += rest.num_products + probed.num_products
    if run.file is not None:
        run.file.unlink(missing_ok=True)
    return Spectrum(top, bottom, rest, trace, norm, run.ritz.values[[0, -1]], products)


def _at_least(rest: SpectralMeasure, probed: TraceAndNorm) -> tuple[Estimate, Estimate]:
    """Trace and norm with errors not below what the rest of the spectrum says: few probes may happen to agree.

    Of k normal probes the trace has the variance 2 tr A^2 / k, and |A|_F^2 has 2 tr A^4 / k.
    """
    trace, norm = probed.trace, probed.frobenius_norm
    alone = SpectralMeasure(rest.nodes, rest.weights, rest.atoms[:0], rest.size, rest.seed, 0)
    second, fourth = (max(alone.moment(power).value, 0.0) for power in (2, 4))
    known = math.sqrt(2 * second / trace.num_probes)
    of_norm = math.sqrt(2 * fourth / norm.num_probes) / (2 * norm.value) if norm.value else 0.0
    return (
        replace(trace, standard_error=max(trace.standard_error, known)),
        replace(norm, standard_error=max(norm.standard_error, of_norm)),
    )


def _within(pairs: Eigenpairs, limit: float) -> list[bool]:
    return (pairs.residuals + pairs.rounding <= limit).tolist()


def _smallest(
    operator: LinearOperator, run: LanczosRun, largest: int, limit: float, steps: int, memory: int | None, seed: int
) -> tuple[Eigenpairs, int]:
    """The smallest pair of the run, or of a short run of its own where that has not come within `limit`; none where
    it is one of the largest or does not converge. Beside it the products that were spent.

    The main run does not wait for it: relative to its own tiny size it converges late, which can double the cost.
    """
    one = Which(smallest=1)
    pair = extract(run, one, seed)
    if len(run.ritz.values) <= largest:
        return pair.subset(slice(0, 0)), 0
    spent = 0
    if not _within(pair, limit)[0] and not run.space.exhausted:
        relative = min(0.5, limit / max(abs(float(pair.values[0])), limit))
        options: dict[str, Any] = {"tolerance": relative, "max_products": max(steps, 20), "memory": memory}
        pair = eigenpairs(operator, smallest=1, start=pair.vectors, seed=seed, **options)
        spent = pair.num_products
    return pair.subset(slice(0, int(_within(pair, limit)[0]))), spent


def _exact_rest(
    run: LanczosRun, known: Eigenpairs, size: int, seed: int
) -> tuple[SpectralMeasure, Estimate, Estimate]:
    """Where the run has spanned the whole space: each other eigenvalue weighs 1 / size, and sums are exact."""
    values = run.ritz.values
    rest = values[~torch.isin(values, known.values)]
    measure = SpectralMeasure(rest[None], torch.full_like(rest, 1 / size)[None], known.values, size, seed, 0, True)
    return measure, Estimate(float(values.sum()), 0.0, 0, seed), Estimate(float(values.norm()), 0.0, 0, seed)


def _rest_of(run: LanczosRun, known: Eigenpairs, size: int, seed: int) -> SpectralMeasure:
    """The run's own quadrature rule without the known eigenvalues."""
    nodes, weights = quadrature_rule(run.first_cycle)
    near = (nodes[:, None] - known.values).abs() <= known.residuals + known.rounding
    one = near.sum(1) / size  # what the known eigenvalues at a node weigh on average
    # A single eigenvalue's weight is chi-squared over size. More than SINGLE_WEIGHT of that is a multiple
    # eigenvalue, such as the zeros of a matrix of low rank, of which one start vector shows one copy: the others
    # stay.
    weights = torch.where(near.any(1), torch.where(weights > SINGLE_WEIGHT * one, weights - one, 0), weights)
    weights = weights / weights.sum().clamp_min(1e-300) * (size - len(known.values)) / size
    return SpectralMeasure(nodes[None], weights[None], known.values, size, seed, 0)
