"""Whether the numbers of an input stand in one arrangement in training and in evaluation: images that are mirrored
or turned in all rows of one of the two, sequences whose order is random in one.

Sums over the rows are kept. The part of the mean image that a mirror turns into its negative has the same sign in
both where both are as they are, the opposite one where all rows of one are mirrored, and is small where half are.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.snapshot.loop.evaluated import ArrangementFacts

IMAGE_SIDE = 16  # pixels, to which images are averaged
SHORTEST_ORDER = 8  # places along an axis
WAYS = {"left to right": (3,), "upside down": (2,)}
TURNED = "rows for columns"
CALLS_TOLD_APART = 64  # evaluations come again with the same rows


class _Sums:
    """Of the rows of one side: sums of the pixels, and of products of neighbours along each axis of sequences."""

    def __init__(self) -> None:
        self.rows = 0
        self.image = self.squares = torch.zeros(())
        self.neighbours: dict[int, list[float]] = {}
        self._known: set[bytes] = set()

    def add(self, t: Tensor) -> None:
        """These rows, (rows, channels, height, width) or (rows, length, features), if they are new."""
        mark = t[0].contiguous().numpy().tobytes()
        if mark in self._known or len(self._known) > CALLS_TOLD_APART:
            return
        self._known.add(mark)
        self.rows += len(t)
        if t.ndim == 4:
            height, width = (min(side, IMAGE_SIDE) for side in t.shape[2:])
            small = F.adaptive_avg_pool2d(t, (height, width)).double()
            self.image, self.squares = self.image + small.sum(0), self.squares + small.square().sum(0)
        else:
            for axis in (1, 2):
                self._add_neighbours(t.double(), axis)

    def _add_neighbours(self, t: Tensor, axis: int) -> None:
        if t.shape[axis] < SHORTEST_ORDER:
            return
        off = t - t.mean(axis, keepdim=True)
        n = t.shape[axis]
        products = float((off.narrow(axis, 0, n - 1) * off.narrow(axis, 1, n - 1)).sum())
        kept = self.neighbours.setdefault(axis, [0.0, 0.0, 0.0])
        for i, number in enumerate((products, float(off.square().sum()), float(t.numel()))):
            kept[i] += number


class _Part(NamedTuple):
    """The part of a mean image that a way of turning it makes negative, and the variance of its noise, summed."""

    image: Tensor
    noise: float

    @property
    def signal(self) -> float:
        """Its size over that of its noise."""
        return float(self.image.square().sum()) / self.noise if self.noise > 0 else 0.0


class Arrangement:
    """Follows the first floating tensor of calls in training and in evaluation."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()
        self._training, self._evaluated = _Sums(), _Sums()

    def add(self, t: Tensor | None, evaluated: bool) -> None:
        """The first rows of a call of one of the two."""
        shape = tuple(t.shape[1:]) if t is not None else ()
        if t is None or t.ndim not in (3, 4) or (self._shape and shape != self._shape):
            return
        self._shape = shape
        (self._evaluated if evaluated else self._training).add(t.float())

    def facts(self) -> ArrangementFacts:
        """As plain data."""
        own, other = self._training, self._evaluated
        if not own.rows or not other.rows:
            return ArrangementFacts()
        about: dict[str, Any] = {"rows": own.rows, "evaluated": other.rows}
        if len(self._shape) == 3:
            return ArrangementFacts(**about, mirrored=tuple(_ways(own, other)))
        return ArrangementFacts(**about, order=tuple(_orders(own, other, self._shape)))


def _ways(own: _Sums, other: _Sums) -> list[tuple[str, float, float, float]]:
    """For each way: the scale of training's part in evaluation's, their correlation, the smaller of the signals."""
    found = []
    for way, axes in WAYS.items():
        parts = [_mirrored(side, axes) for side in (own, other)]
        found.append((way, *_compared(*parts)))
    if own.image.shape[1] == own.image.shape[2]:
        found.append((TURNED, *_compared(*(_transposed(side) for side in (own, other)))))
    return found


def _mean(side: _Sums) -> tuple[Tensor, Tensor]:
    """The mean image and the variance of its pixels' means."""
    mean = side.image / side.rows
    return mean, (side.squares / side.rows - mean.square()).clamp_min(0) / side.rows


def _mirrored(side: _Sums, axes: tuple[int, ...]) -> _Part:
    """What a mirror makes negative, after the other axis was made even: it may be mirrored, too."""
    mean, variance = _mean(side)
    axis = [a - 1 for a in axes]
    across = [3 - a for a in axis]
    odd = (mean - mean.flip(axis)) / 2
    return _Part((odd + odd.flip(across)) / 2, float(variance.sum()) / 4)


def _transposed(side: _Sums) -> _Part:
    mean, variance = _mean(side)
    return _Part((mean - mean.transpose(1, 2)) / 2, float(variance.sum()) / 2)


def _compared(own: _Part, other: _Part) -> tuple[float, float, float]:
    product = float((own.image * other.image).sum())
    sizes = float(own.image.square().sum()), float(other.image.square().sum())
    if not min(sizes) > 0:
        return math.nan, math.nan, 0.0
    return product / sizes[1], product / math.sqrt(sizes[0] * sizes[1]), min(own.signal, other.signal)


def _orders(own: _Sums, other: _Sums, shape: tuple[int, ...]) -> list[tuple[int, float, float, int, int]]:
    """For each axis of sequences: the correlation of neighbours along it in training and in evaluation, and the
    fewest numbers that one of the two was told by, and its length."""
    found = []
    for axis in sorted(own.neighbours.keys() & other.neighbours.keys()):
        length = shape[axis - 1]
        (a, squares, n), (b, squares_, n_) = own.neighbours[axis], other.neighbours[axis]
        if squares > 0 and squares_ > 0:
            found.append((axis, a / squares, b / squares_, int(min(n, n_)), length))
    return found
