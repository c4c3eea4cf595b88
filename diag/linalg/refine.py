"""Eigenpairs from approximate eigenvectors: block Rayleigh-Ritz with the exact operator, verified by it.

Two levels: a cheap stand-in for the operator (bfloat16 products, a subsample of the data, an earlier step of
training) finds the subspace, and the exact operator spends about one product on each wanted pair to correct
the eigenvalues to second order and to measure true residuals |A x - theta x|. Pairs that are not within the
tolerance yet extend the subspace by their residuals (block Davidson without a preconditioner; Davidson 1975,
Knyazev 2001) until they are. What is reported rests on exact products alone.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from diag.errors import InvalidInput
from diag.linalg.deflation import DeflatedOperator, orthonormal
from diag.linalg.lanczos import Eigenpairs, run_lanczos
from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import combine, gram, norm
from diag.linalg.ritz import Wanted, error_bounds


def two_level_eigenpairs(
    operator: LinearOperator,
    cheap: LinearOperator,
    *,
    largest: int = 0,
    smallest: int = 0,
    magnitude: int = 0,
    tolerance: float = 1e-3,
    criterion: Literal["residual", "bound"] = "residual",
    max_products: int = 200,
    max_cheap_products: int = 1000,
    seed: int = 0,
) -> Eigenpairs:
    """The wanted eigenpairs of `operator`, found with `cheap` (same size, dtype and device) and verified.

    The cheap run stops by its residuals, as the bounds stop too early where eigenvalues are close; `criterion`
    is for the exact pairs (see `Wanted`), which rest on what the cheap run has found. `max_products` bounds
    the exact products; `num_products` of the result counts those alone.
    """
    if (cheap.size, cheap.dtype, cheap.device) != (operator.size, operator.dtype, operator.device):
        raise InvalidInput(f"{cheap!r} cannot stand in for {operator!r}; give one of its size, dtype and device.")
    wanted = Wanted(largest, smallest, magnitude, tolerance, criterion)
    cheaply = dataclasses.replace(wanted, criterion="residual")
    run = run_lanczos(cheap, cheaply, max_products=max_cheap_products, seed=seed)
    chosen = wanted.select(run.ritz.values)
    guess = combine(run.ritz.weights[chosen], run.space.basis[: run.space.steps], operator.dtype)
    others = torch.ones(len(run.ritz.values), dtype=torch.bool)
    others[chosen] = False
    del run.space.basis
    return refine(operator, guess, wanted, run.ritz.values[others], max_products=max_products, seed=seed)


def refine(
    operator: LinearOperator,
    guess: Tensor,
    wanted: Wanted,
    others: Tensor | None = None,
    *,
    max_products: int = 200,
    seed: int = 0,
) -> Eigenpairs:
    """Improves approximate eigenvectors until the bounds of the wanted pairs are within the tolerance.

    Args: guess (p, size), p at least the number wanted; others, what is known of the remaining eigenvalues,
    for the gaps. Raises InvalidInput when the guess has fewer independent rows than eigenpairs are wanted.
    """
    basis = orthonormal(guess)
    if len(basis) < min(wanted.count, operator.size):
        raise InvalidInput(
            f"the guess spans {len(basis)} dimensions and {wanted.count} eigenpairs are wanted; give more vectors."
        )
    images = operator.matvecs(basis)
    while True:
        pairs, residual_vectors = rayleigh_ritz(basis, images, wanted, others, seed)
        room = min(max_products, operator.size) - len(basis)
        extension = residual_vectors[~pairs.converged.to(basis.device)][: max(room, 0)]
        if len(extension):
            extension = orthonormal(extension, against=basis)
        if not len(extension):
            return pairs
        basis = torch.cat([basis, extension])
        images = torch.cat([images, operator.matvecs(extension)])


def rayleigh_ritz(
    basis: Tensor, images: Tensor, wanted: Wanted, others: Tensor | None, seed: int
) -> tuple[Eigenpairs, Tensor]:
    """The wanted Ritz pairs in the span of an orthonormal `basis` (p, size), with their residual vectors.

    `images` (p, size) are the operator's products with the rows of the basis, one each. What of the rest of
    the spectrum is known from elsewhere (`others`) is taken to be as wrong as the pair that it is compared
    with.
    """
    projected = gram(basis, images).cpu()
    asymmetry = float((projected - projected.T).norm()) / 2
    values, columns = torch.linalg.eigh((projected + projected.T) / 2)
    vectors = combine(columns.T, basis, basis.dtype)
    residual_vectors = combine(columns.T, images, basis.dtype) - values.to(vectors)[:, None] * vectors
    residuals = torch.stack([norm(r) for r in residual_vectors]).cpu()
    bounds = error_bounds(values, residuals, others, residuals[:, None])
    rounding = asymmetry + torch.finfo(basis.dtype).eps * float(values.abs().max())
    chosen = wanted.select(values)
    errors = (bounds if wanted.criterion == "bound" else residuals)[chosen] + rounding
    pairs = Eigenpairs(
        values=values[chosen],
        vectors=vectors[chosen],
        residuals=residuals[chosen],
        bounds=bounds[chosen] + rounding,
        converged=wanted.converged(values[chosen], errors),
        num_products=len(basis),
        rounding=rounding,
        seed=seed,
    )
    return pairs, residual_vectors[chosen]


def complete(
    operator: LinearOperator, pairs: Eigenpairs, wanted: Wanted, *, steps: int = 8, max_rounds: int = 5
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
        found = wanted.select(everything)
        found = found[found >= len(pairs.values)] - len(pairs.values)
        if not len(found):
            break
        rows = combine(search.ritz.weights[found], search.space.basis[: search.space.steps], operator.dtype)
        pairs = refine(operator, torch.cat([pairs.vectors, rows]), wanted, seed=pairs.seed)
        products += pairs.num_products
    return dataclasses.replace(pairs, num_products=products)
