"""How alike two sets of features are, and how many directions one of them uses.

Linear CKA compares the Gram matrices of the same examples in two spaces, blind to rotations and to a scale. Its
usual estimate is biased upward where the features are many and the examples few; the U-statistic here is not (Song
et al. 2012; Nguyen, Raghu, Kornblith 2021).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCKS = 10


def covariance_rank(eigenvalues: Tensor) -> float:
    """exp of the entropy of a covariance's eigenvalues, scaled to sum 1; 0 where all are 0."""
    p = eigenvalues.clamp_min(0)
    if float(p.sum()) == 0:
        return 0.0
    p = p / p.sum()
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def centred_gram(features: Tensor) -> Tensor:
    """The Gram matrix (n, n) of centred features in float64."""
    h = features.double()
    h = h - h.mean(0)
    return h @ h.T


def unbiased_hsic(k: Tensor, m: Tensor) -> float:
    """The U-statistic of HSIC from two Gram matrices (n, n), n >= 4; it may be negative."""
    n = len(k)
    k, m = (a - torch.diag(a.diagonal()) for a in (k, m))
    rows = k.sum(0), m.sum(0)
    total = (k * m).sum() + rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows[0] @ rows[1]
    return float(total) / (n * (n - 3))


def unbiased_cka(k: Tensor, m: Tensor) -> float:
    """Linear CKA by U-statistics: 1 for the same space, about 0 for independent ones; NaN where one is constant."""
    own = unbiased_hsic(k, k), unbiased_hsic(m, m)
    if min(own) <= 1e-12 * max(float(k.square().mean()), float(m.square().mean()), 1e-300):
        return math.nan
    return unbiased_hsic(k, m) / math.sqrt(own[0] * own[1])


def cka_with_error(k: Tensor, m: Tensor, blocks: int = BLOCKS) -> tuple[float, float]:
    """CKA and its jackknife standard error, one block of examples left out at a time; NaN from too few examples."""
    n = len(k)
    if n < 4 * blocks:
        return unbiased_cka(k, m) if n >= 4 else math.nan, math.nan
    rest = [torch.arange(n, device=k.device) % blocks != b for b in range(blocks)]
    without = torch.tensor([unbiased_cka(k[r][:, r], m[r][:, r]) for r in rest], dtype=torch.float64)
    spread = (without - without.mean()).square().sum() * (blocks - 1) / blocks
    return unbiased_cka(k, m), float(spread.sqrt())
