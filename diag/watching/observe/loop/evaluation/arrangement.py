"""Whether the numbers of an input stand in one arrangement in training and in evaluation: images that are mirrored
or turned in all rows of one of the two, sequences whose order is random in one.

Sums over the rows are kept: of images, how often two pixels are bright together. The part of these moments that a
mirror turns into its negative has the same sign in both sides where both are as they are, the opposite one where
all rows of one are mirrored, and is small where half are, as by augmentation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.snapshot.loop.evaluated import ArrangementFacts

IMAGE_SIDE = 8  # pixels, to which images are averaged
SHORTEST_ORDER = 8  # places along an axis
ROWS_ARRANGED = 1024
PIXELS = torch.arange(IMAGE_SIDE**2).view(IMAGE_SIDE, IMAGE_SIDE)
MIRRORED_PIXELS = {"left to right": PIXELS.flip(1).flatten(), "upside down": PIXELS.flip(0).flatten()}
ROWS_FOR_COLUMNS, TRANSPOSED_PIXELS = "rows for columns", PIXELS.T.flatten()


class _Sums:
    """Of the rows of one side that differ: moments of pixels, and products of neighbours along each axis of
    sequences."""

    def __init__(self) -> None:
        self.rows = 0
        self.moments = self.squares = torch.zeros(())
        self.neighbours: dict[int, list[float]] = {}
        self._known: set[int] = set()

    def add(self, t: Tensor, shift: float) -> None:
        """These rows, (rows, channels, height, width) or (rows, length, features), where they are new."""
        if self.rows >= ROWS_ARRANGED:
            return
        marks = [hash(row.numpy().tobytes()) for row in t.contiguous()]
        fresh = [i for i, mark in enumerate(marks) if mark not in self._known]
        if not fresh:
            return
        self._known.update(marks)
        self.rows, t = self.rows + len(fresh), t[fresh]
        if t.ndim == 4:
            z = F.adaptive_avg_pool2d(t.mean(1, keepdim=True), IMAGE_SIDE).flatten(1).double() - shift
            self.moments, self.squares = self.moments + z.T @ z, self.squares + z.square().T @ z.square()
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
    """The part of the moments that a way of turning images makes negative, and the variance of its noise."""

    moments: Tensor
    noise: float

    @property
    def signal(self) -> float:
        """Its size over that of its noise."""
        return float(self.moments.square().sum()) / self.noise if self.noise > 0 else 0.0


class Arrangement:
    """Follows the first floating tensor of calls in training and in evaluation."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()
        self._shift = 0.0
        self._training, self._evaluated = _Sums(), _Sums()

    def add(self, t: Tensor | None, evaluated: bool) -> None:
        """The first rows of a call of one of the two."""
        shape = tuple(t.shape[1:]) if t is not None else ()
        if t is None or t.ndim not in (3, 4) or (self._shape and shape != self._shape):
            return
        if not self._shape:
            self._shape, self._shift = shape, float(t.double().mean())
        if min(shape[1:]) >= IMAGE_SIDE or len(shape) == 2:
            (self._evaluated if evaluated else self._training).add(t.float(), self._shift)

    def facts(self) -> ArrangementFacts:
        """As plain data."""
        own, other = self._training, self._evaluated
        if not own.rows or not other.rows:
            return ArrangementFacts()
        about: dict[str, Any] = {"rows": own.rows, "evaluated": other.rows}
        if len(self._shape) == 3:
            return ArrangementFacts(**about, mirrored=tuple(_ways(own, other, self._shape)))
        return ArrangementFacts(**about, order=tuple(_orders(own, other, self._shape)))


def _ways(own: _Sums, other: _Sums, shape: tuple[int, ...]) -> list[tuple[str, float, float, float]]:
    """For each way: the scale of training's part in evaluation's, their correlation, the smaller of the signals."""
    ways = [(way, _mirrored(own, way), _mirrored(other, way)) for way in MIRRORED_PIXELS]
    if shape[1] == shape[2]:
        ways.append(
            (ROWS_FOR_COLUMNS, _odd(*_means(own), TRANSPOSED_PIXELS), _odd(*_means(other), TRANSPOSED_PIXELS))
        )
    return [(way, *_compared(here, there)) for way, here, there in ways]


def _means(side: _Sums) -> tuple[Tensor, float]:
    """The moments, (pixels, pixels), and the variance of their noise, summed."""
    moments = side.moments / side.rows
    return moments, float((side.squares / side.rows - moments.square()).clamp_min(0).sum()) / side.rows


def _odd(moments: Tensor, noise: float, order: Tensor) -> _Part:
    return _Part((moments - moments[order][:, order]) / 2, noise / 2)


def _mirrored(side: _Sums, way: str) -> _Part:
    """What a mirror makes negative, after the other one was made to change nothing: its flips are drawn apart."""
    part = _odd(*_means(side), MIRRORED_PIXELS[way])
    across = next(order for other, order in MIRRORED_PIXELS.items() if other != way)
    return _Part((part.moments + part.moments[across][:, across]) / 2, part.noise / 2)


def _compared(own: _Part, other: _Part) -> tuple[float, float, float]:
    product = float((own.moments * other.moments).sum())
    sizes = float(own.moments.square().sum()), float(other.moments.square().sum())
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
