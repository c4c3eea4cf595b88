"""What eigenvectors of a Hessian say: how they depend on the sample, where they live, whether classes span them."""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.curvature.operators import CurvatureOperator
from diag.errors import InvalidInput
from diag.linalg.deflation import orthonormal
from diag.linalg.lanczos import Eigenpairs
from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import IN_ONE_PROCESS, Spread, dot, gram
from diag.linalg.student import covering

DATA_BLOCKS, BLOCKS_TAKEN = 10, 5  # of the data, and those of them that are looked at: half a product for each pair


def sampling_errors(
    hessian: Any, pairs: Eigenpairs, shift: float, seed: int, with_vectors: bool = True
) -> NDArray[numpy.float64]:
    """How far v^T H v may be off for other data of the same kind, for each pair (k,): an interval of two of them
    covers the population's curvature along v in about 95 of 100 cases.

    The standard error over blocks of the data, and S, by how much the choice of v on these very data overstates
    it. By perturbation of the second order v^T H v - v^T E[H] v has the mean 2 S with
    S = sum_j E (v_j^T (H - E[H]) v)^2 / (lambda - lambda_j), which the blocks' images of v tell; directions that
    are not among the pairs count with an eigenvalue of zero. NaN where they are not asked for or there are fewer
    examples than blocks; `shift` is in the pairs' values and not in the Hessian.
    """
    splits = isinstance(hessian, CurvatureOperator) and hessian.num_examples >= DATA_BLOCKS
    if not with_vectors or not splits or not len(pairs.values):
        return unknown(pairs)
    assert pairs.vectors is not None
    try:
        parts = hessian.blocks(DATA_BLOCKS, seed)[:BLOCKS_TAKEN]
    except InvalidInput:
        return unknown(pairs)
    images = [part.applies(pairs.vectors) for part in parts]
    values = (pairs.values - shift).numpy()
    errors = []
    for k, v in enumerate(pairs.vectors):
        seen = torch.stack([dot(v, image[k], hessian.spread) for image in images]).cpu()
        chance = covering(float(seen.std()) / math.sqrt(DATA_BLOCKS), BLOCKS_TAKEN)
        errors.append(chance + _overstated(k, values, pairs.vectors, [i[k] for i in images], hessian.spread))
    return numpy.array(errors)


def _overstated(
    k: int, values: NDArray[numpy.float64], vectors: Tensor, images: list[Tensor], spread: Spread
) -> float:
    """S of the pair k, from the blocks' images of its vector."""
    gaps = values[k] - values
    total = 0.0
    for image in images:
        change = image - values[k] * vectors[k]
        along = gram(change[None], vectors, spread)[0].cpu().double().numpy() ** 2
        along[k] = 0.0
        own = float(dot(change, vectors[k], spread))
        rest = max(float(dot(change, change, spread)) - own**2 - along.sum(), 0.0)
        others = numpy.divide(along, gaps, out=numpy.zeros_like(along), where=gaps != 0)
        total += float(others.sum()) + (rest / values[k] if values[k] else 0.0)
    return abs(total) / len(images) / (DATA_BLOCKS - 1)


def unknown(pairs: Eigenpairs) -> NDArray[numpy.float64]:
    """NaN for each pair."""
    return numpy.full(len(pairs.values), math.nan)


def overlaps(
    pairs: Eigenpairs, directions: Tensor | None, spread: Spread = IN_ONE_PROCESS
) -> tuple[NDArray[numpy.float64], int]:
    """The squared length of each eigenvector in the span of the directions (those that do not vanish), (k,), and
    the span's dimension. The directions are whole, the eigenvectors this process's parts."""
    if directions is None or not len(pairs.values):
        return unknown(pairs), 0
    assert pairs.vectors is not None
    rows = directions.to(pairs.vectors)
    lengths = rows.norm(dim=1, keepdim=True)
    rows = rows[lengths[:, 0] > 0] / lengths[lengths[:, 0] > 0]
    if not len(rows):
        return unknown(pairs), 0
    span = orthonormal(spread.part(rows), spread=spread)
    return gram(pairs.vectors, span, spread).square().sum(1).cpu().numpy(), len(span)


def leading_run(inside: NDArray[numpy.bool_]) -> int:
    """How many of the first are inside without a gap."""
    return int(numpy.argmin(numpy.append(inside, False)))


def layer_shares(hessian: LinearOperator, pairs: Eigenpairs) -> dict[str, float]:
    """The share of the first eigenvector's squared length in each layer; empty for a bare matrix."""
    if not isinstance(hessian, CurvatureOperator) or not len(pairs.values):
        return {}
    assert pairs.vectors is not None
    return hessian.layer_shares(pairs.vectors[0])
