"""Which examples' losses move most, which way, and whether the two ends trade places from step to step.

D (T, n) float64 holds the change of every example's loss at T consecutive steps (or kicks).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def ends(change: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Index tensors of the k largest and the k smallest entries of (n,), largest (smallest) first.

    Ties go to the first rows at both ends: examples that move alike then trade places together.
    """
    return change.argsort(descending=True, stable=True)[:k], change.argsort(stable=True)[:k]


def share(changes: Tensor, rows: Tensor) -> float:
    """sum |D[:, rows]| / sum |D|: the part of all movement that these examples carry; 2k/n by chance."""
    total = float(changes.abs().sum())
    return float(changes[..., rows].abs().sum()) / total if total > 0 else math.nan


def swap_and_persistence(changes: Tensor, k: int) -> tuple[float, float]:
    """Means over consecutive steps: the part of the k risers and k fallers that change ends, and that stay.

    Chance level of each: k/n. NaN for fewer than two steps.
    """
    pairs = [tuple(set(end.tolist()) for end in ends(row, k)) for row in changes]
    if len(pairs) < 2:
        return math.nan, math.nan
    swaps, stays = [], []
    for (up, down), (next_up, next_down) in itertools.pairwise(pairs):
        swaps.append((len(up & next_down) + len(down & next_up)) / (2 * k))
        stays.append((len(up & next_up) + len(down & next_down)) / (2 * k))
    return sum(swaps) / len(swaps), sum(stays) / len(stays)


def leading_mode(changes: Tensor) -> Tensor:
    """(n,): the first right singular vector of D, uncentred, its largest entry positive."""
    small = changes @ changes.T  # T x T: far fewer steps than examples
    _, vectors = torch.linalg.eigh(small)
    mode = changes.T @ vectors[:, -1]
    norm = torch.linalg.vector_norm(mode)
    mode = mode / norm if float(norm) > 0 else mode
    signed: Tensor = mode * torch.sign(mode[mode.abs().argmax()])
    return signed


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's; NaN where one of the two does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y)
    return float((x * y).sum() / size) if float(size) > 0 else math.nan


def lag_one(x: Tensor) -> float:
    """Correlation of a series with itself one step later: -1 for an oscillation of period two."""
    return correlation(x[1:], x[:-1]) if len(x) > 2 else math.nan


def rank_auc(scores: Tensor, members: Tensor) -> float:
    """The chance that a member (True in the mask) scores above a non-member; ties count half."""
    inside, outside = scores[members].double(), scores[~members].double().sort().values
    if not len(inside) or not len(outside):
        return math.nan
    below = torch.searchsorted(outside, inside, right=False)
    up_to = torch.searchsorted(outside, inside, right=True)
    return float((below + up_to).double().mean() / (2 * len(outside)))
