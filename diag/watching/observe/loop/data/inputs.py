"""The inputs of a few training calls and evaluations: how many rows differ, their mean and their spread.

What is on a device is left alone: telling rows apart would wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.data import OUTLIER_ROW
from diag.snapshot.loop.inputs import InputFacts
from diag.watching.observe.loop.modes import first_tensor, is_dense
from diag.watching.observe.loop.moment import Moment, due

INPUT_CALLS, EVALUATION_CALLS = 6, 4  # calls that are looked at, of training then ever fewer
WIDTH, MOST_ROWS_READ = 4096, 128  # numbers of an example, and examples of a call, that are read
FEWEST_OF_A_CALL = 8  # examples of a call
DATA_PLACES_KEPT = 1024  # of a data set
COLUMNS_COUNTED, NUMBERS_FOR_EACH_ROW = 64, 0.8  # columns of a call, and different numbers for each different row
COLUMNS_OF_NUMBERS, NUMBERS_OF_COLUMN = 8, 5  # columns, and different numbers in each


class Inputs:
    """Follows the first tensor that the model is called with."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._calls = self._looked = self._rows = self._distinct = 0
        self._different: set[float] = set()
        self._sums, self._evaluated_sums = Sums(), Sums()
        self._evaluated = self._evaluated_rows = 0
        self._shape: tuple[int, ...] | None = None
        self._alike = True
        self._others_differ = False
        self._places: dict[int, float] = {}
        self._continuous = True

    def training_call(self, args: Any, kwargs: Mapping[str, Any], places: Any = ()) -> None:
        """The model was called in training, with the rows at these places of a data set if that is known."""
        self._calls += 1
        if not (self._calls <= INPUT_CALLS or due(self._calls)):
            return
        rows = rows_of(args, kwargs)
        if rows is None:
            return
        marks = marks_of(rows)
        if len(set(marks)) == 1 and not self._others_differ:
            others = tensors_in((args, dict(kwargs)))[1:]
            self._others_differ = any(_rows_differ(t, len(rows)) for t in others)
        self._looked, self._rows = self._looked + 1, self._rows + len(rows)
        self._distinct += len(set(marks))
        self._different |= set(marks) if len(self._different) < 1 << 14 else set()
        self._sums.add(rows)
        alone = len(tensors_in((args, dict(kwargs)))) == 1
        if alone and len(places) >= len(rows) and len(self._places) < DATA_PLACES_KEPT:
            for place, mark in zip(places, marks, strict=False):
                self._places.setdefault(int(place), mark)
            self._continuous &= _is_continuous(rows, len(set(marks)))
        self._shape = tuple(rows.shape[1:])
        self._moment.news(("inputs", self._looked), "inputs")

    def evaluated(self, args: Any, kwargs: Mapping[str, Any], training: bool) -> None:
        """The model was called without gradients; training: not to evaluate it."""
        if training or self._shape is None or self._evaluated >= EVALUATION_CALLS:
            return
        rows = rows_of(args, kwargs)
        if rows is None:
            return
        self._evaluated, self._evaluated_rows = self._evaluated + 1, self._evaluated_rows + len(rows)
        self._alike &= tuple(rows.shape[1:]) == self._shape
        self._evaluated_sums.add(rows)
        self._moment.news(("evaluated inputs", self._evaluated), "inputs")

    def facts(self) -> InputFacts:
        """As plain data."""
        return InputFacts(
            looked=self._looked,
            rows=self._rows,
            distinct=self._distinct,
            different=len(self._different),
            mean=self._sums.mean,
            deviation=self._sums.deviation,
            evaluated=self._evaluated,
            evaluated_rows=self._evaluated_rows,
            evaluated_mean=self._evaluated_sums.mean,
            evaluated_deviation=self._evaluated_sums.deviation,
            shape_alike=self._alike,
            others_differ=self._others_differ,
            places=len(self._places),
            of_places=len(set(self._places.values())),
            continuous=bool(self._places) and self._continuous,
        )


class Sums:
    """Count, sum and sum of squares of floating numbers, in double precision; calls far larger than the median one
    are left out, as rows are within a call."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, float, float]] = []

    def add(self, rows: Tensor) -> None:
        """The numbers of these rows as well."""
        if rows.is_floating_point() and (numbers := usual(rows.double())).numel():
            self._calls.append((numbers.numel(), float(numbers.sum()), float(numbers.square().sum())))

    def _usual(self) -> tuple[int, float, float]:
        sizes = sorted(squares / count for count, _, squares in self._calls)
        limit = OUTLIER_ROW**2 * sizes[(len(sizes) - 1) // 2] if sizes else 0.0
        kept = [call for call in self._calls if call[2] / call[0] <= limit]
        return sum(c for c, _, _ in kept), sum(s for _, s, _ in kept), sum(q for _, _, q in kept)

    @property
    def mean(self) -> float:
        """The mean, NaN of none."""
        count, total, _ = self._usual()
        return total / count if count else math.nan

    @property
    def deviation(self) -> float:
        """The standard deviation, NaN of none."""
        count, _, squares = self._usual()
        return math.sqrt(max(squares / count - self.mean**2, 0.0)) if count else math.nan


def usual(rows: Tensor) -> Tensor:
    """The rows without those that are not finite or far larger than the median one."""
    sizes = rows.abs().amax(1)
    return rows[sizes <= OUTLIER_ROW * sizes.nanmedian()]  # not so where a number is none


def rows_of(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor of a call, (rows, numbers), if it is on the host and may hold examples."""
    tensor = first_tensor(args, kwargs)
    fits = tensor is not None and tensor.is_cpu and tensor.ndim > 1 and is_dense(tensor)
    if tensor is None or not fits or len(tensor) < FEWEST_OF_A_CALL or tensor.is_complex() or not tensor.numel():
        return None
    return tensor.detach()[:MOST_ROWS_READ].reshape(min(len(tensor), MOST_ROWS_READ), -1)[:, :WIDTH]


def _is_continuous(rows: Tensor, different: int) -> bool:
    """Whether some column has nearly as many different numbers as there are different rows, or several have more
    than a few, as pixels do."""
    if not rows.is_floating_point():
        return False
    columns = rows[:, :: -(-rows.shape[1] // COLUMNS_COUNTED)].sort(0).values
    numbers = 1 + (columns[1:] != columns[:-1]).sum(0)
    several = int((numbers >= NUMBERS_OF_COLUMN).sum()) >= COLUMNS_OF_NUMBERS
    return several or int(numbers.max()) >= NUMBERS_FOR_EACH_ROW * different


def _rows_differ(t: Tensor, rows: int) -> bool:
    there = t.is_cpu and is_dense(t) and t.ndim > 0 and len(t) >= rows
    return there and bool((t.detach()[:rows] != t.detach()[:1]).any())


def marks_of(rows: Tensor) -> list[float]:
    """A number for each row (n, d) that rows of equal entries share and others do not."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(rows.shape[1], generator=generator, dtype=torch.float64) + 0.5
    # One dot product a row, each in the same order, so that equal rows give equal sums.
    return [float(torch.dot(row, weights)) for row in rows.double()]
