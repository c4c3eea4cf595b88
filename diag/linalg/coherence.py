"""How far the gradients of single examples agree: coherence, its error, and the noise that disagreement makes.

All of it follows from squared norms ||g_i||^2 and inner products of sums over groups of examples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diag.linalg.student import covering


@dataclass(frozen=True)
class Coherence:
    """Of m gradients: `alpha` = ||mean g||^2 / mean ||g||^2, in [0, 1]; `corrected`, the same over pairs of
    different examples, with its jackknife `standard_error`; NaN where all gradients are zero."""

    alpha: float
    corrected: float
    standard_error: float
    m: int

    @property
    def m_alpha(self) -> float:
        """m-coherence: how many examples, itself included, one example's step helps on average."""
        return self.m * self.alpha


def random_blocks(m: int, count: int, seed: int) -> list[Tensor]:
    """`count` blocks of nearly equal size that part m examples at random, each an index tensor."""
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    return [order[i::count].sort().values for i in range(min(count, m))]


def coherence(gram: Tensor, squares: Tensor, blocks: Sequence[Tensor]) -> Coherence:
    """From the (B, B) inner products of the blocks' gradient sums, and (m,) squared norms, both float64."""
    m, total, energy = len(squares), float(gram.sum()), float(squares.sum())
    if not energy > 0:
        return Coherence(math.nan, math.nan, math.nan, m)
    return Coherence(
        total / (m * energy), _corrected(total, energy, m), _jackknife(gram, squares, blocks, total, energy), m
    )


def _corrected(total: float, energy: float, m: int) -> float:
    """(m alpha - 1) / (m - 1): the mean product of different gradients over the mean squared norm."""
    return (total / energy - 1) / (m - 1) if m > 1 and energy > 0 else math.nan


def _jackknife(gram: Tensor, squares: Tensor, blocks: Sequence[Tensor], total: float, energy: float) -> float:
    """Standard error of the corrected coherence from leaving out one block at a time (widened: see `student`)."""
    left_out = [
        _corrected(
            total - 2 * float(gram[b].sum()) + float(gram[b, b]),
            energy - float(squares[rows].sum()),
            len(squares) - len(rows),
        )
        for b, rows in enumerate(blocks)
    ]
    values = torch.tensor(left_out, dtype=torch.float64)
    if len(values) < 2 or bool(values.isnan().any()):
        return math.nan
    return covering(float(((len(values) - 1) * (values - values.mean()).square().mean()).sqrt()), len(values))


def between_groups(gram: Tensor, squares: Sequence[Tensor]) -> Tensor:
    """(K, K): the mean product of two different gradients, one of each group, over the groups' root mean squares.

    gram: (K, K) inner products of the groups' sums; squares: per group, the squared norms. NaN where a group has
    no pair of examples or only zero gradients.
    """
    if not squares:
        return gram
    counts = torch.tensor([len(s) for s in squares], dtype=torch.float64)
    energy = torch.stack([s.sum() for s in squares])
    pairs = counts[:, None] * counts[None, :] - torch.diag(counts)
    products = gram - torch.diag(energy)
    size = (energy / counts).sqrt()
    matrix = products / pairs / (size[:, None] * size[None, :])
    return torch.where((pairs > 0) & torch.isfinite(matrix), matrix, math.nan)


def noise_scale(found: Coherence) -> float:
    """B = tr(Cov g) / ||E g||^2, the batch size at which noise and gradient are equal; infinite where the
    gradients do not agree at all. Source: McCandlish et al. 2018, arXiv:1812.06162, equation 2.8."""
    if math.isnan(found.corrected):
        return math.nan
    return (1 - found.corrected) / found.corrected if found.corrected > 0 else math.inf


def across_halves(gram: Tensor, groups: int) -> Tensor:
    """(G, G): the mean over all halvings of the blocks of the cosine of group a on one half and b on the other.

    What two groups have in common by chance, as they are measured on the same examples, is on one side only; a
    group with itself shows what noise alone leaves of an agreement.

    gram: (G B, G B) inner products of the sums over B blocks of each of G groups, float64. With an odd number of
    blocks one half has one more. NaN with fewer than two blocks, or where a half of a group has no length.
    """
    table = gram.view(groups, -1, groups, gram.shape[0] // groups)
    half = _halvings(table.shape[1])
    if not len(half):
        return gram.new_full((groups, groups), math.nan)
    other = 1 - half
    products = torch.einsum("abcd,hb,hd->hac", table, half, other)
    own = torch.einsum("abad->abd", table)
    lengths = [torch.einsum("abd,hb,hd->ha", own, h, h).clamp_min(0).sqrt() for h in (half, other)]
    sizes = lengths[0][:, :, None] * lengths[1][:, None, :]
    cosines = torch.where(sizes > 0, products / sizes, math.nan).nanmean(0)
    return (cosines + cosines.T) / 2


def noise_floor(halves: Tensor, a: int, b: int) -> float:
    """What a cosine of 1 between groups a and b would be measured as across halves: the geometric mean of their
    own; NaN where noise leaves one of them none."""
    first, second = float(halves[a, a]), float(halves[b, b])
    return math.sqrt(first * second) if first > 0 and second > 0 else math.nan


def _halvings(blocks: int) -> Tensor:
    """(H, B): 1 for the blocks of a half, of every choice of B // 2 of them."""
    chosen = list(itertools.combinations(range(blocks), blocks // 2)) if blocks > 1 else []
    half = torch.zeros(len(chosen), blocks, dtype=torch.float64)
    for row, members in enumerate(chosen):
        half[row, list(members)] = 1
    return half
