"""Eigenpairs from approximate eigenvectors: block Rayleigh-Ritz, and the search for what a run has missed.

Residuals |A x - theta x| are measured, one product for each vector of the subspace. Pairs that are not within the
tolerance yet extend it by their residuals (block Davidson without a preconditioner; Davidson 1975, Knyazev 2001)
until they are.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from diag.errors import InvalidInput
from diag.linalg.deflation import DeflatedOperator, orthonormal
from diag.linalg.lanczos import Eigenpairs, run_lanczos
from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import IN_ONE_PROCESS, Spread, combine, gram, norm
from diag.linalg.ritz import Which, error_bounds


def refine(
    operator: LinearOperator,
    guess: Tensor,
    which: Which,
    others: Tensor | None = None,
    *,
    max_products: int = 200,
    seed: int = 0,
) -> Eigenpairs:
    """Improves approximate eigenvectors until the bounds of the wanted pairs are within the tolerance.

    Args: guess (p, size, or this process's part of it), p at least the number wanted; others, what is known of the
    remaining eigenvalues, for the gaps. Raises InvalidInput when the guess has fewer independent rows than
    eigenpairs are wanted.
    """
    basis, spread = orthonormal(guess, spread=operator.spread), operator.spread
    if len(basis) < min(which.count, operator.size):
        raise InvalidInput(
            f"The guess spans {len(basis)} dimensions and {which.count} eigenpairs are asked for; give more "
            f"vectors."
        )
    images = operator.applies(basis)
    while True:
        pairs, residual_vectors = rayleigh_ritz(basis, images, which, others, seed, spread)
        room = min(max_products, operator.size) - len(basis)
        extension = residual_vectors[~pairs.converged.to(basis.device)][: max(room, 0)]
        if len(extension):
            extension = orthonormal(extension, against=basis, spread=spread)
        if not len(extension):
            return pairs
        basis = torch.cat([basis, extension])
        images = torch.cat([images, operator.applies(extension)])


def rayleigh_ritz(
    basis: Tensor, images: Tensor, which: Which, others: Tensor | None, seed: int, spread: Spread = IN_ONE_PROCESS
) -> tuple[Eigenpairs, Tensor]:
    """The wanted Ritz pairs in the span of an orthonormal `basis` (p, size), with their residual vectors.

    `images` (p, size) are the operator's products with the rows of the basis, one each. What of the rest of
    the spectrum is known from elsewhere (`others`) is taken to be as wrong as the pair that it is compared
    with.
    """
    projected = gram(basis, images, spread).cpu()
    asymmetry = float((projected - projected.T).norm()) / 2
    values, columns = torch.linalg.eigh((projected + projected.T) / 2)
    vectors = combine(columns.T, basis, basis.dtype)
    residual_vectors = combine(columns.T, images, basis.dtype) - values.to(vectors)[:, None] * vectors
    residuals = torch.stack([norm(r, spread) for r in residual_vectors]).cpu()
    bounds = error_bounds(values, residuals, others, residuals[:, None])
    rounding = asymmetry + torch.finfo(basis.dtype).eps * float(values.abs().max())
    chosen = which.select(values)
    errors = (bounds if which.criterion == "bound" else residuals)[chosen] + rounding
    pairs = Eigenpairs(
        values=values[chosen],
        vectors=vectors[chosen],
        residuals=residuals[chosen],
        bounds=bounds[chosen] + rounding,
        converged=which.converged(values[chosen], errors),
        num_products=len(basis),
        rounding=rounding,
        seed=seed,
    )
    return pairs, residual_vectors[chosen]


def complete(
    operator: LinearOperator, pairs: Eigenpairs, which: Which, *, steps: int = 8, max_rounds: int = 5
) -> Eigenpairs:
    """Looks for eigenvalues that a run has missed, and adds them.

    A single start vector shows one copy of a multiple eigenvalue, and shows late what it hardly touches.
    Here an independent start vector is followed for a few `steps` with the known pairs taken out; where it
    sees something that ranks among the wanted, the pairs are refined with it and the search is repeated.
    An outlier is seen within a few steps; an eigenvalue that is near the bulk need not be.
    """
    products = pairs.num_products
    for round_ in range(max_rounds):
        assert pairs.vectors is not None
        search = run_lanczos(
            DeflatedOperator(operator, pairs.vectors), None, max_products=steps, seed=pairs.seed + 1 + round_
        )
        products += search.num_products
        everything = torch.cat(
            [pairs.values, search.ritz.values - search.ritz.residuals.copysign(search.ritz.values)]
        )
        found = which.select(everything)
        found = found[found >= len(pairs.values)] - len(pairs.values)
        if not len(found):
            break
        rows = combine(search.ritz.weights[found], search.space.basis[: search.space.steps], operator.dtype)
        pairs = refine(operator, torch.cat([pairs.vectors, rows]), which, seed=pairs.seed)
        products += pairs.num_products
    return dataclasses.replace(pairs, num_products=products)
