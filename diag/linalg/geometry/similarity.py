"""How alike two sets of features are, and how many directions one of them uses.

Linear CKA compares the Gram matrices of the same examples in two spaces, blind to rotations and to a scale. Its
usual estimate is biased upward where the features are many and the examples few; the U-statistic here is not (Song
et al. 2012; Nguyen, Raghu, Kornblith 2021).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CKA_BLOCKS = 10


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


def cka_between(grams: list[Tensor], blocks: int = CKA_BLOCKS) -> tuple[Tensor, Tensor]:
    """Linear CKA of all pairs of Gram matrices (n, n) of the same examples, and its standard errors: (L, L) each.

    By U-statistics: 1 for the same space, about 0 for independent ones, and maybe below; NaN where one is constant
    or n < 4. With U-centred matrices these are inner products, so all pairs are one product of matrices. Errors are
    the jackknife's, one block of examples left out at a time; NaN from too few examples.
    """
    n, device = len(grams[0]), grams[0].device
    if n < 4:
        unknown = torch.full((len(grams), len(grams)), math.nan, dtype=torch.float64)
        return unknown, unknown.clone()
    whole = _cka_of(grams, torch.ones(n, dtype=torch.bool, device=device))
    if n < 4 * blocks:
        return whole, torch.full_like(whole, math.nan)
    rest = [torch.arange(n, device=device) % blocks != b for b in range(blocks)]
    without = torch.stack([_cka_of(grams, r) for r in rest])
    spread = (without - without.mean(0)).square().sum(0) * (blocks - 1) / blocks
    return whole, spread.sqrt()


def _cka_of(grams: list[Tensor], rows: Tensor) -> Tensor:
    centred = torch.stack([_u_centred(g[rows][:, rows]).flatten() for g in grams])
    products = centred @ centred.T
    own = products.diagonal()
    scale = torch.stack([g[rows][:, rows].square().sum() for g in grams])
    own = torch.where(own > 1e-12 * scale, own, math.nan)  # constant features
    return (products / (own[:, None] * own[None]).sqrt()).cpu()


def _u_centred(k: Tensor) -> Tensor:
    n = len(k)
    k = k - torch.diag(k.diagonal())
    rows = k.sum(0)
    centred = k - (rows[:, None] + rows[None]) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag(centred.diagonal())
