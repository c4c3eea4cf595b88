"""What eigenvectors of a Hessian say: how they depend on the sample, where they live, whether classes span them."""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.curvature.layout import participation
from diag.curvature.operators import CurvatureOperator
from diag.linalg.deflation import orthonormal
from diag.linalg.lanczos import Eigenpairs
from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import dot, gram


def sampling_errors(
    hessian: Any, pairs: Eigenpairs, shift: float, seed: int, wanted: bool = True
) -> NDArray[numpy.float64]:
    """Half of |v^T H_A v - v^T H_B v| for each pair (k,), with A, B two halves of the data.

    As H = (H_A + H_B) / 2 that is |v^T H_A v - lambda|. NaN where they are not wanted or the data cannot be split;
    `shift` is in the pairs' values and not in the Hessian.
    """
    splits = isinstance(hessian, CurvatureOperator) and hessian.num_examples > 1
    if not wanted or not splits or not len(pairs.values):
        return unknown(pairs)
    assert pairs.vectors is not None
    images = hessian.subsample(hessian.num_examples // 2, seed=seed).matvecs(pairs.vectors)
    curvature = torch.stack([dot(v, image) for v, image in zip(pairs.vectors, images, strict=True)])
    return (curvature.cpu() + shift - pairs.values).abs().numpy()


def unknown(pairs: Eigenpairs) -> NDArray[numpy.float64]:
    """NaN for each pair."""
    return numpy.full(len(pairs.values), math.nan)


def overlaps(pairs: Eigenpairs, directions: Tensor | None) -> tuple[NDArray[numpy.float64], int]:
    """The squared length of each eigenvector in the span of the directions (those that do not vanish), (k,), and
    the span's dimension."""
    if directions is None or not len(pairs.values):
        return unknown(pairs), 0
    assert pairs.vectors is not None
    rows = directions.to(pairs.vectors)
    lengths = rows.norm(dim=1, keepdim=True)
    rows = rows[lengths[:, 0] > 0] / lengths[lengths[:, 0] > 0]
    if not len(rows):
        return unknown(pairs), 0
    span = orthonormal(rows)
    return gram(pairs.vectors, span).square().sum(1).cpu().numpy(), len(span)


def leading_run(inside: NDArray[numpy.bool_]) -> int:
    """How many of the first are inside without a gap."""
    return int(numpy.argmin(numpy.append(inside, False)))


def layer_shares(hessian: LinearOperator, pairs: Eigenpairs) -> dict[str, float]:
    """The share of the first eigenvector's squared length in each layer; empty for a bare matrix."""
    if not isinstance(hessian, CurvatureOperator) or not len(pairs.values):
        return {}
    assert pairs.vectors is not None
    return participation(hessian.layout, pairs.vectors[0])
