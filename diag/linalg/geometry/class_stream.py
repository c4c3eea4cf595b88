"""Class means and the spread around them in two passes over blocks of points, with memory independent of their
number.

stream = ClassStream(labels)               # class numbers of all points (n,)
for start, block in blocks():              # first pass
    stream.add(block, start)
by = stream.means()
for start, block in blocks():              # second pass
    stream.add_spread(block, start)
stream.within_over_between()               # NC1
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diag.linalg.geometry.class_geometry import ClassMeans, means_of_sums
from diag.linalg.reductions import ELEMENTS_AT_ONCE


def row_blocks(points: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of `points` (n, d), some millions of numbers at a time."""
    step = max(1, ELEMENTS_AT_ONCE // max(points.shape[1], 1))
    for start in range(0, len(points), step):
        yield start, points[start : start + step]


class ClassStream:
    """Sums in float64 for points that come in blocks; each block says which rows of `labels` it is.

    labels (n,): class numbers. classes: those to count, by default all among the labels; points of others are left
    out.
    """

    def __init__(self, labels: Tensor, by: ClassMeans | None = None) -> None:
        self.classes = labels.unique() if by is None else by.classes
        self.labels = labels
        self.by = by
        self._sums: Tensor | None = None
        self._counts = torch.zeros(len(self.classes), dtype=torch.float64, device=labels.device)
        self._seen = self._counts.clone()
        self._within = self._counts.clone()
        self._mistakes = self._lengths = 0.0
        self._spread: Tensor | None = None

    def _of(self, block: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The points of known classes in float64, and the row of each one's class."""
        y = self.labels[start : start + len(block)].to(block.device)
        known = torch.isin(y, self.classes.to(block.device))
        h = block.double()
        return (
            (h, torch.searchsorted(self.classes.to(y), y))
            if bool(known.all())
            else (
                h[known],
                torch.searchsorted(self.classes.to(y), y[known]),
            )
        )

    def add(self, block: Tensor, start: int) -> None:
        """First pass: points (b, d), rows `start` and following of the labels."""
        h, own = self._of(block, start)
        if self._sums is None:
            self._sums = h.new_zeros(len(self.classes), h.shape[1])
        self._sums.index_add_(0, own, h)
        self._counts = self._counts.to(h) + torch.bincount(own, minlength=len(self.classes))

    def means(self) -> ClassMeans:
        """The class means; their `within` is filled in by the second pass."""
        assert self._sums is not None, "no block was added"
        self.by = means_of_sums(self.classes, self._counts, self._sums)
        return self.by

    def add_spread(self, block: Tensor, start: int) -> None:
        """Second pass: the same points again, or others around the means given at the start."""
        assert self.by is not None, "the means come before the spread"
        h, own = self._of(block, start)
        self._mistakes += float((self.by.nearest(h) != self.by.classes[own]).sum())
        self._lengths += float(h.norm(dim=1).sum())
        h = h - self.by.means[own]
        self._seen = self._seen.to(h) + torch.bincount(own, minlength=len(self.classes))
        self._within = self._within.to(h).index_add_(0, own, h.square().sum(1))
        if self._spread is None:
            self._spread = h.new_zeros(len(self.classes), len(self.by.singular))
        self._spread.index_add_(0, own, (h @ self.by.axes.T).square_())

    def finished(self) -> ClassMeans:
        """The class means with the spread around them."""
        assert self.by is not None
        return dataclasses.replace(self.by, within=self._within / self._seen.clamp_min(1))

    def within_over_between(self) -> float:
        """NC1 = Tr(S_W S_B^+) / K, averaged over the classes that are present; NaN where two means coincide."""
        if self._spread is None or self.by is None or self.by.degenerate:
            return math.nan
        present = self._seen > 0
        spread = (self._spread[present] / self._seen[present, None]).mean(0)
        return float((spread / self.by.singular.square()).sum())

    @property
    def mistakes(self) -> float:
        """Share of the points whose nearest class mean is not that of their own class."""
        return self._mistakes / float(self._seen.sum()) if bool(self._seen.any()) else math.nan

    @property
    def mean_length(self) -> float:
        """Mean length of the points."""
        return self._lengths / float(self._seen.sum()) if bool(self._seen.any()) else math.nan


def streamed(points: Tensor, labels: Tensor, by: ClassMeans | None = None) -> ClassStream:
    """Both passes over points (n, d) in memory; with `by`, the spread around those means alone."""
    stream = ClassStream(labels, by)
    if by is None:
        for start, block in row_blocks(points):
            stream.add(block, start)
        stream.means()
    for start, block in row_blocks(points):
        stream.add_spread(block, start)
    return stream
