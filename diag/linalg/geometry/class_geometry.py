"""The geometry of labelled points: class means, their spread, and how near a set of vectors is to a simplex.

All sums in the dtype given (use float64). The global mean is the unweighted mean of the class means, and the
within-class covariance the average over classes, so that large classes do not decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DEGENERATE = 1e-8  # smallest over largest singular value of the class means from which two of them coincide


@dataclass(frozen=True)
class ClassMeans:
    """The class means of n points in d dimensions, K classes.

    classes (K,): their numbers, ascending; counts (K,); means (K, d); centre (d,); centred (K, d); within (K,):
    mean squared distance of each class's points from its mean; singular (r,) and axes (r, d): of the centred
    means, r = min(K - 1, d). Their rank is at most K - 1 by construction, so the last direction is left out
    rather than cut by a tolerance.
    """

    classes: Tensor
    counts: Tensor
    means: Tensor
    centre: Tensor
    centred: Tensor
    within: Tensor
    singular: Tensor
    axes: Tensor

    @property
    def degenerate(self) -> bool:
        """Two class means coincide, or the centred means span fewer directions than they could."""
        return not bool(self.singular[-1] > DEGENERATE * self.singular[0])

    def nearest(self, points: Tensor) -> Tensor:
        """The class number (n,) of the nearest mean."""
        # |h|^2 is the same for all classes, so the (n, K, d) differences are not needed.
        distances = self.means.square().sum(1) - 2 * points @ self.means.T
        return self.classes[distances.argmin(1)]


def means_of_sums(classes: Tensor, counts: Tensor, sums: Tensor) -> ClassMeans:
    """The class means from the sums (K, d) of the points of each class; `within` is not known yet and NaN."""
    means = sums / counts[:, None]
    centre = means.mean(0)
    rank = min(len(classes) - 1, sums.shape[1])
    if bool(torch.isfinite(means).all()):
        _, singular, axes = torch.linalg.svd(means - centre, full_matrices=False)
    else:
        singular, axes = means.new_full((rank,), math.nan), means.new_zeros(rank, sums.shape[1])
    within = torch.full_like(counts, math.nan)
    return ClassMeans(classes, counts, means, centre, means - centre, within, singular[:rank], axes[:rank])


def simplex_distance(gram: Tensor) -> float:
    """Frobenius distance of a (K, K) Gram matrix, scaled to norm 1, from (I - 11^T/K) / sqrt(K - 1)."""
    k = len(gram)
    simplex = (torch.eye(k, dtype=torch.float32).to(gram) - 1 / k) / math.sqrt(k - 1)
    return float((unit(gram) - simplex).norm())


def unit(a: Tensor) -> Tensor:
    """`a` scaled to Frobenius norm 1."""
    return a / a.norm()


def pairwise_cosines(m: Tensor) -> Tensor:
    """The cosines (K (K - 1) / 2,) between the rows of `m`."""
    directions = torch.nn.functional.normalize(m, dim=1)
    return _upper(directions @ directions.T)


def deviation_angle(w: Tensor, m: Tensor) -> float:
    """Mean over pairs of the angle between w_a - w_b and m_a - m_b, in degrees (Boundary Tilting, 2016)."""
    inner = _differences(w @ m.T)
    lengths = (_differences(w @ w.T) * _differences(m @ m.T)).clamp_min(0).sqrt()
    return float((inner / lengths).clamp(-1, 1).arccos().rad2deg().mean())


def distance_normalised_variance(by: ClassMeans) -> float:
    """Mean over pairs of (within_a + within_b) / (2 |mean_a - mean_b|^2)."""
    variance = _upper(by.within[:, None] + by.within[None]) / 2
    return float((variance / _differences(by.centred @ by.centred.T)).mean())


def effective_rank(singular: Tensor) -> float:
    """exp of the entropy of the squared singular values, normalised to sum 1."""
    p = singular.square() / singular.square().sum()
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def _differences(products: Tensor) -> Tensor:
    """<a_i - a_j, b_i - b_j> for all pairs i < j, from the products <a_i, b_j>."""
    d = products.diagonal()
    return _upper(d[:, None] + d[None] - products - products.T)


def _upper(square: Tensor) -> Tensor:
    i, j = torch.triu_indices(len(square), len(square), 1, device=square.device)
    return square[i, j]
