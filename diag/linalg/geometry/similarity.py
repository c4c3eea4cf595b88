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


def cka_with_error(k: Tensor, m: Tensor, blocks: int = CKA_BLOCKS) -> tuple[float, float]:
    """CKA and its jackknife standard error, one block of examples left out at a time; NaN from too few examples."""
    n = len(k)
    if n < 4 * blocks:
        return unbiased_cka(k, m) if n >= 4 else math.nan, math.nan
    rest = [torch.arange(n, device=k.device) % blocks != b for b in range(blocks)]
    without = torch.tensor([unbiased_cka(k[r][:, r], m[r][:, r]) for r in rest], dtype=torch.float64)
    spread = (without - without.mean()).square().sum() * (blocks - 1) / blocks
    return unbiased_cka(k, m), float(spread.sqrt())


def cka_between(grams: list[Tensor], blocks: int = CKA_BLOCKS) -> tuple[Tensor, Tensor]:
    """`cka_with_error` of all pairs of Gram matrices (n, n) of the same examples: (L, L) each.

    With U-centred matrices the U-statistic is an inner product, so all pairs are one product of matrices.
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
