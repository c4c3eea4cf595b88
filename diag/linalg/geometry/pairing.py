"""Which rows of two sets of variables belong to each other: the Hilbert-Schmidt criterion of an order of the rows.

For centred kernels K of the one and L of the other, S = sum_ij K_ij L_ij is large where rows that are alike in the
one are alike in the other. Over all orders of the rows of L it has a mean and a variance in closed form
(Kazi-Aoual et al. 1995, "Refined approximations to permutation tests for multivariate inference", Comput. Stat.
Data Anal. 20), so that an order can be scored in standard deviations without drawing any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FEWEST_PAIRED = 8  # rows, for the variance to exist and mean something


def centred(kernel: Tensor) -> Tensor:
    """The kernel (n, n) of the same points about their mean."""
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def similarity(rows: Tensor, within: float = 0.5) -> Tensor:
    """A Gaussian of the distance between rows (n, d), as wide as the distance below which a share `within` of all
    pairs lies: half, or a few rows' worth to see only what is near; (n, n), not centred."""
    squared = torch.cdist(rows, rows).square()
    apart = squared[squared > 0]
    width = apart.kthvalue(max(1, int(within * apart.numel())))[0] if apart.numel() else squared.new_ones(())
    return torch.exp(-squared / width.clamp_min(1e-300))


def pairing_scores(kernel: Tensor, columns: Tensor, orders: Sequence[Tensor]) -> list[float]:
    """For each order of the rows of `columns`, how many standard deviations S lies above its mean over all orders.

    kernel (n, n), centred here; columns (n, k), whose products are L; orders: permutations of 0..n-1, each (n,).
    NaN where there are fewer than eight rows or one of the two does not vary.
    """
    n = len(columns)
    kernel, columns = centred(kernel.double()), columns.double()
    columns = columns - columns.mean(0)
    mean, deviation = _over_all_orders(kernel, columns @ columns.T) if n >= FEWEST_PAIRED else (0.0, 0.0)
    if not deviation > 0:
        return [math.nan] * len(orders)
    found = []
    for order in orders:
        ordered = columns[order]
        found.append((float((ordered * (kernel @ ordered)).sum()) - mean) / deviation)
    return found


def _over_all_orders(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of S over all orders of the rows of one side, both kernels centred."""
    n = float(len(one))
    trace, square, diagonal = _moments(one)
    trace_, square_, diagonal_ = _moments(other)
    first = 2 * ((n - 1) * square - trace**2) * ((n - 1) * square_ - trace_**2)
    first /= (n - 1) ** 2 * (n + 1) * (n - 2)
    second = n * (n + 1) * diagonal - (n - 1) * (trace**2 + 2 * square)
    second *= n * (n + 1) * diagonal_ - (n - 1) * (trace_**2 + 2 * square_)
    second /= (n + 1) * n * (n - 1) * (n - 2) * (n - 3)
    small = 1e-18 * max(square * square_, 0.0)  # what rounding leaves of a kernel that is zero
    variance = first + second
    return trace * trace_ / (n - 1), math.sqrt(variance) if variance > small else 0.0


def _moments(kernel: Tensor) -> tuple[float, float, float]:
    """tr K, tr K^2 and the sum of the squares of its diagonal."""
    return float(kernel.trace()), float(kernel.square().sum()), float(kernel.diagonal().square().sum())


def crossing_score(kernel: Tensor, columns: Tensor, first: Tensor) -> float:
    """How alike the relation of the two sides is in two parts of the rows: S between the parts, each centred by
    itself, in standard deviations of what it is over all orders of the first part's rows, where its mean is zero.
    Far below zero: what is alike across the parts in the one side is unlike in the other, as where two classes are
    exchanged in one part.

    kernel (n, n), columns (n, k), first (n,) bool: which rows are the first part. NaN for parts of fewer than eight
    rows or that do not vary.
    """
    a, b = first.nonzero().flatten(), (~first).nonzero().flatten()
    if min(len(a), len(b)) < FEWEST_PAIRED:
        return math.nan
    across = kernel.double()[a][:, b]
    across = across - across.mean(0) - across.mean(1, keepdim=True) + across.mean()
    own, others = columns.double()[a], columns.double()[b]
    own, others = own - own.mean(0), others - others.mean(0)
    seen = across @ others  # already centred over the rows of the first part
    variance = float(((own.T @ own) * (seen.T @ seen)).sum()) / (len(a) - 1)
    return float((own * seen).sum()) / math.sqrt(variance) if variance > 0 else math.nan
