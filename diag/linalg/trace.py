"""The trace and the Frobenius norm of an operator from random probes, each with its standard error.

Hutchinson (1990): for v with independent entries +-1, E v^T A v = tr A and E |A v|^2 = |A|_F^2, one product
each. Known eigenvectors U are deflated: tr A = tr U A U^T + tr P A P with P = I - U^T U (and the squared
norms likewise, with the cross term), and only the second is estimated, so that outliers no longer dominate
the noise. Errors are widened for the small number of probes (`diag.linalg.student`). The trace of a Hessian may
well be negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diag.errors import InvalidInput
from diag.linalg.deflation import DeflatedOperator
from diag.linalg.lanczos import Eigenpairs
from diag.linalg.operator import LinearOperator
from diag.linalg.quadrature import Estimate
from diag.linalg.reductions import dot
from diag.linalg.student import covering_skewed


@dataclass(frozen=True)
class TraceAndNorm:
    """`trace` and `frobenius_norm` from the same products, and how many there were."""

    trace: Estimate
    frobenius_norm: Estimate
    num_products: int


def trace_and_norm(
    operator: LinearOperator,
    *,
    num_probes: int = 16,
    deflate: Tensor | Eigenpairs | None = None,
    seed: int = 0,
) -> TraceAndNorm:
    """tr A and |A|_F from `num_probes` Rademacher probes.

    Args: deflate, directions that are known, orthonormal rows (k, size), at one product each beside the
    probes; or eigenpairs with their residuals, which cost none.
    Raises InvalidInput for fewer than two probes: one probe has no standard error.
    """
    if num_probes < 2:
        raise InvalidInput(f"num_probes is {num_probes}; expected at least 2, which a standard error needs.")
    target: LinearOperator = operator
    known, cross = torch.zeros(0, dtype=torch.float64), 0.0
    spent = num_probes
    if isinstance(deflate, Eigenpairs):
        assert deflate.vectors is not None
        target = DeflatedOperator(operator, deflate.vectors)
        known, cross = deflate.values, float(deflate.residuals.square().sum())
    elif deflate is not None:
        target = DeflatedOperator(operator, deflate)
        known, cross = target.known_part()
        spent += len(known)
    samples = _probe(target, num_probes, torch.Generator().manual_seed(seed))
    trace, square = samples.mean(0) + torch.stack([known.sum(), known.square().sum() + 2 * cross])
    trace_error, square_error = (covering_skewed(column.tolist()) for column in samples.T)
    norm = math.sqrt(float(square))
    return TraceAndNorm(
        trace=Estimate(float(trace), trace_error, num_probes, seed),
        frobenius_norm=Estimate(norm, square_error / (2 * norm) if norm else 0.0, num_probes, seed),
        num_products=spent,
    )


def _probe(operator: LinearOperator, count: int, generator: torch.Generator) -> Tensor:
    """(v^T A v, |A v|^2) for each probe: float64 (count, 2) on the host."""
    samples = []
    with operator.many_products():
        for _ in range(count):
            bits = operator.spread.drawn(
                operator.size, lambda n: torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8)
            )
            v = (2 * bits - 1).to(dtype=operator.dtype, device=operator.device)
            if isinstance(operator, DeflatedOperator):
                operator.project(v)
            product = operator.apply(v)
            samples.append(torch.stack([dot(a, product, operator.spread) for a in (v, product)]))
    return torch.stack(samples).cpu()
