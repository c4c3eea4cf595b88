"""Which rows of two sets of variables belong to each other: the Hilbert-Schmidt criterion of an order of the rows.

For centred kernels K of the one and L of the other, S = sum_ij K_ij L_ij is large where rows that are alike in the
one are alike in the other. Over all orders of the rows of L it has a mean and a variance in closed form
(Kazi-Aoual et al. 1995, "Refined approximations to permutation tests for multivariate inference", Comput. Stat.
Data Anal. 20), so that an order can be scored in standard deviations without drawing any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

FEWEST_PAIRED = 8  # rows, for the variance to exist and mean something
ROUNDING_OF_SQUARES = 16  # of squared distances between equal rows, in units of rounding of the largest


def centred(kernel: Tensor) -> Tensor:
    """The kernel (n, m) between points, each side about its mean, in float64."""
    across, down = kernel.mean(1, keepdim=True, dtype=torch.float64), kernel.mean(0, dtype=torch.float64)
    return (kernel - across).sub_(down - down.mean())


def similarity(rows: Tensor, within: float = 0.5) -> Tensor:
    """A Gaussian of the distance between rows (n, d), as wide as the distance below which a share `within` of all
    pairs that are apart lies: half, or a few rows' worth to see only what is near; (n, n), not centred, in the
    precision of the rows."""
    squared = torch.cdist(rows, rows).square_()
    return squared.div_(-_quantile_of_apart(squared, within)).exp_()


def _quantile_of_apart(squared: Tensor, within: float) -> float:
    """Below which number a share `within` of those lies that are more than rounding; 1 where none is."""
    rounding = ROUNDING_OF_SQUARES * torch.finfo(squared.dtype).eps * squared.amax() if squared.numel() else 0.0
    apart = int((squared > rounding).sum())
    if not apart:
        return 1.0
    at = squared.numel() - apart + max(1, int(within * apart)) - 1
    # Several times as fast as torch's kthvalue of those that are apart.
    return float(numpy.partition(squared.cpu().numpy(), at, axis=None)[at])


def pairing_scores(kernel: Tensor, columns: Tensor, orders: Sequence[Tensor]) -> list[float]:
    """For each order of the rows of `columns`, how many standard deviations S lies above its mean over all orders.

    kernel (n, n), `centred`; columns (n, k), whose products are L; orders: permutations of 0..n-1, each (n,). NaN
    where there are fewer than eight rows or one of the two does not vary.
    """
    n, columns = len(columns), columns.double()
    columns = columns - columns.mean(0)
    mean, deviation = _over_all_orders(kernel, columns) if n >= FEWEST_PAIRED else (0.0, 0.0)
    if not deviation > 0:
        return [math.nan] * len(orders)
    ordered = columns[torch.stack(list(orders), 1)]  # (n, orders, k)
    seen = (kernel @ ordered.flatten(1)).view_as(ordered)
    sums = (ordered * seen).sum((0, 2))
    return ((sums - mean) / deviation).tolist()


def _over_all_orders(kernel: Tensor, columns: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of S over all orders of the rows of one side, both sides centred."""
    n = float(len(kernel))
    trace, square, diagonal = _moments(kernel)
    trace_, square_, diagonal_ = _moments_of_products(columns)
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
    return float(kernel.trace()), float(kernel.norm()) ** 2, float(kernel.diagonal().square().sum())


def _moments_of_products(columns: Tensor) -> tuple[float, float, float]:
    """The same of the products of the rows (n, k), without the n^2 of them."""
    lengths = columns.square().sum(1)
    return float(lengths.sum()), float((columns.T @ columns).square().sum()), float(lengths.square().sum())


def crossing_score(kernel: Tensor, columns: Tensor, at: int) -> float:
    """How alike the relation of the two sides is in the rows before `at` and in those from it on: S between these
    two parts, each centred by itself, in standard deviations of what it is over all orders of the first part's
    rows, where its mean is zero. Far below zero: what is alike across the parts in the one side is unlike in the
    other, as where two classes are exchanged in one part.

    kernel (n, n), columns (n, k). NaN for parts of fewer than eight rows or that do not vary.
    """
    if min(at, len(columns) - at) < FEWEST_PAIRED:
        return math.nan
    across = centred(kernel[:at, at:])
    own, others = columns.double()[:at], columns.double()[at:]
    own, others = own - own.mean(0), others - others.mean(0)
    seen = across @ others  # already centred over the rows of the first part
    variance = float(((own.T @ own) * (seen.T @ seen)).sum()) / (at - 1)
    return float((own * seen).sum()) / math.sqrt(variance) if variance > 0 else math.nan
