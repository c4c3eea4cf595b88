"""Do the columns of a table stand in another order in evaluation? Told by their distributions and correlations.

A column is known by how its numbers are distributed and by how it goes with the others. An order is told only where
every column fits the one that it is taken for, within what rows of one source differ by, and those that moved do
not fit the column at their own place. Columns that nothing tells apart are not told of.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from diag.linalg.assignment import best_assignment

MOST_ORDERED, FEWEST_COLUMNS_MOVED = 128, 2  # to find the order of so many takes a fifth of a second
ROWS_OF_ORDER = 64  # of a side
ROUNDS = 8
QUANTILES = 33
# Mean of squared differences between a column's correlations, in standard errors above what two samples of one
# source give; one of these differences, in its standard deviations; distances between distributions
# (Kolmogorov-Smirnov) in theirs, whose 99.99 % point is 2.2.
FIT, ONE_CORRELATION = 4.0, 6.0
DISTANCE_FITS, DISTANCE_TOO_LARGE = 2.2, 4.0


def columns_moved(own: Tensor, other: Tensor) -> tuple[tuple[int, int], ...]:
    """The columns of `other` (m, d) that are not what stands at their place in `own` (n, d) and are what stands at
    another, as (place there, place in `own`); none where the order is the same or not certain."""
    # The same rows come again in each epoch and evaluation.
    own, other, d = own.unique(dim=0), other.unique(dim=0), own.shape[1]
    if min(len(own), len(other)) < ROWS_OF_ORDER or not FEWEST_COLUMNS_MOVED <= d < MOST_ORDERED:
        return ()
    pair, stay = _Pair(own.double(), other.double()), torch.arange(d)
    unfit = pair.unfit()
    if int(unfit.sum()) < FEWEST_COLUMNS_MOVED:
        return ()
    order = pair.best()
    if not bool(pair.fits(order).all()):
        return ()
    return tuple((int(at), int(order[at])) for at in (unfit & (order != stay)).nonzero().flatten())


class _Pair:
    """Two tables of d columns each; `rows`: as many as a difference between the two is right by."""

    def __init__(self, own: Tensor, other: Tensor) -> None:
        self._rows = len(own) * len(other) / (len(own) + len(other))
        self._tables = own, other
        self._own, self._other = _correlations(own), _correlations(other)

    @functools.cached_property
    def _distance(self) -> Tensor:
        """How far the distribution of each column there is from that of each here, (d, d)."""
        return self._rows**0.5 * _distances(*self._tables)

    def _apart(self, order: Tensor) -> Tensor:
        """For each column there, taken for the column `order` of it here: squared differences of its correlations,
        in what chance gives at most."""
        return (self._other - self._own[order][:, order]).square() * self._rows

    def fits(self, order: Tensor) -> Tensor:
        """Whether each column fits the one that it is taken for."""
        at = self._distance[torch.arange(len(order)), order]
        others = len(order) - 1
        alike = self._apart(order).sum(1) / others <= 1 + FIT * (2 / others) ** 0.5
        return alike & (at <= DISTANCE_FITS)

    def unfit(self) -> Tensor:
        """Whether each is surely another than the one at its own place."""
        at = self._rows**0.5 * _distances_at_place(*self._tables)
        stay = torch.arange(len(at))
        return (self._apart(stay).amax(1) >= ONE_CORRELATION**2) | (at >= DISTANCE_TOO_LARGE)

    def best(self) -> Tensor:
        """The order in which all fit the best that was found."""
        profiles = self._own.sort(1).values, self._other.sort(1).values
        alike, distance = _squares_between(profiles[1], profiles[0]) * self._rows, self._distance.square()
        found = [self._settled(start) for start in (distance + alike, distance + 10 * alike, distance)]
        return min(found, key=self._misfit)

    def _misfit(self, order: Tensor) -> float:
        at = self._distance[torch.arange(len(order)), order]
        return float(self._apart(order).sum() / (len(order) - 1) + at.square().sum())

    def _settled(self, cost: Tensor) -> Tensor:
        """From a first cost of taking each column there for each here: assigned, and assigned again by how well
        the correlations of a column there with the others fit those of each here under the last order."""
        order = best_assignment(-cost)
        for _ in range(ROUNDS):
            sums = _squares_between(self._other, self._own[:, order]) * self._rows * len(order)
            following = best_assignment(-(self._distance.square() + sums))
            if torch.equal(following, order):
                break
            order = following
        return order


def _squares_between(there: Tensor, here: Tensor) -> Tensor:
    """Mean squared differences between the rows of two matrices (d, d): (d, d)."""
    return torch.cdist(there, here).square() / there.shape[1]


def _correlations(rows: Tensor) -> Tensor:
    """Of the columns' ranks, which no outlier decides; zero with a column that does not vary."""
    columns = rows.T.contiguous()
    ordered = columns.sort(1).values
    below, up_to = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    found = torch.corrcoef((below + up_to).double()).nan_to_num(0.0)
    return found.fill_diagonal_(1.0)


def _distances_at_place(own: Tensor, other: Tensor) -> Tensor:
    """The largest distance between the distributions of each column there and that at its place here: (d,)."""
    points = _quantiles(own)
    here, there = (torch.searchsorted(t.T.contiguous().sort(1).values, points, right=True) for t in (own, other))
    return (here.double() / len(own) - there.double() / len(other)).abs().amax(1)


def _quantiles(own: Tensor) -> Tensor:
    """Points at which distributions are compared, of each column: (d, points)."""
    return torch.quantile(own, torch.linspace(0, 1, QUANTILES, dtype=torch.float64), dim=0).T.contiguous()


def _distances(own: Tensor, other: Tensor) -> Tensor:
    """The largest distances between the distributions of each column there (m, d) and each here (n, d): (d, d)."""
    points = _quantiles(own)
    own_share = _share_below(own, points).diagonal().T  # (d, points)
    return (_share_below(other, points) - own_share[None]).abs().amax(2)


def _share_below(rows: Tensor, points: Tensor) -> Tensor:
    """For each column (d') of rows and each set (d) of points, the share of the column's numbers up to each point:
    (d', d, points)."""
    ordered = rows.T.contiguous().sort(1).values
    flat = points.reshape(1, -1).expand(len(ordered), -1).contiguous()
    below = torch.searchsorted(ordered, flat, right=True).double() / ordered.shape[1]
    return below.reshape(len(ordered), *points.shape)
