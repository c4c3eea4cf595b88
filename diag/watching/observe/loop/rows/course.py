"""The course of each row's margin over its sights, in bounded memory.

Of each row so many means are kept: one a sight while there is room, then one of every two sights, of every four,
and so on. What is kept so depends on the training alone, never on the time that anything takes.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from diag.snapshot.loop.rows import RowFacts
from diag.watching.observe.loop.rows.identity import RowNumbers

MARGINS_KEPT = 1 << 23  # margins that are kept in all: 32 MiB
MOST_COLUMNS, FEWEST_COLUMNS = 64, 8  # of one row
BEGIN = 1 << 10


class MarginCourse:
    """Margins, labels and sights of rows by their number; `capacity`: how many rows there can be."""

    margins: NDArray[numpy.float32]
    looks: NDArray[numpy.int32]
    labels: NDArray[numpy.int32]
    answers: NDArray[numpy.int32]
    first_step: NDArray[numpy.int32]
    first_place: NDArray[numpy.int32]

    def __init__(self, capacity: int) -> None:
        self._capacity = max(capacity, 1)
        self._columns = (
            min(MOST_COLUMNS, max(FEWEST_COLUMNS, MARGINS_KEPT // self._capacity)) & ~1
        )  # pairs are folded
        self.width, self.n, self._room = 1, 0, 0
        self._grow(min(BEGIN, self._capacity))

    def _grow(self, room: int) -> None:
        def larger(name: str, fill: float, dtype: type, *more: int) -> None:
            new: NDArray[Any] = numpy.full((room, *more), fill, dtype)
            if self._room:
                new[: self._room] = getattr(self, name)
            setattr(self, name, new)

        larger("margins", numpy.nan, numpy.float32, self._columns)
        larger("looks", 0, numpy.int32)
        larger("labels", -1, numpy.int32)
        larger("answers", -1, numpy.int32)
        larger("first_step", 0, numpy.int32)
        larger("first_place", 0, numpy.int32)
        self._room = room

    def make_room(self, rows: int) -> None:
        """There is a place for so many rows."""
        self.n = max(self.n, rows)
        if rows > self._room:
            self._grow(min(max(2 * self._room, rows), max(self._capacity, rows)))

    def meet(
        self,
        rows: RowNumbers,
        margins: NDArray[Any],
        labels: RowNumbers,
        answers: RowNumbers,
        step: int,
        places: RowNumbers,
    ) -> tuple[int, int]:
        """One sight of each of these rows, none of them twice, with labels from 0 on: how many were met before, and
        how many of these have another label now. Such a sight does not count for the row."""
        same = self.labels[rows] == labels
        others = 0
        before = len(rows)
        if not same.all():
            new = self.looks[rows] == 0
            met = rows[new]
            self.first_step[met], self.first_place[met], self.labels[met] = step, places[new], labels[new]
            same |= new
            before -= len(met)
            others = len(rows) - int(numpy.count_nonzero(same))
            rows, margins, answers = rows[same], margins[same], answers[same]
        if len(rows):
            self._add(rows, margins, answers)
        return before, others

    def _add(self, rows: RowNumbers, margins: NDArray[Any], answers: RowNumbers) -> None:
        looks = self.looks[rows]
        if int(looks.max()) >= self._columns * self.width:
            self._fold()
        if self.width == 1:
            self.margins[rows, looks] = margins
        else:
            column, k = looks // self.width, looks % self.width
            before = self.margins[rows, column]
            self.margins[rows, column] = numpy.where(k == 0, margins, before + (margins - before) / (k + 1))
        self.looks[rows] = looks + 1
        wrong = margins <= 0
        if wrong.any():
            self.answers[rows[wrong]] = answers[wrong]

    def _fold(self) -> None:
        """Means of two sights become means of twice as many."""
        pairs = self.margins.reshape(self._room, -1, 2)
        sights = self.looks[:, None] - 2 * self.width * numpy.arange(pairs.shape[1])
        second = numpy.clip(sights - self.width, 0, self.width)
        first = numpy.clip(sights, 0, self.width)
        with numpy.errstate(invalid="ignore", divide="ignore"):
            held = numpy.where(second > 0, pairs[:, :, 1], 0) * second + pairs[:, :, 0] * first
            folded = held / (first + second)
        self.margins[:] = numpy.nan
        self.margins[:, : pairs.shape[1]] = folded
        self.width *= 2

    def facts(self) -> RowFacts:
        """A copy of what is known of the rows so far."""
        n = self.n
        used = max(1, -(-int(self.looks[:n].max(initial=0)) // self.width))
        return RowFacts(
            width=self.width,
            margins=self.margins[:n, :used].copy(),
            looks=self.looks[:n].copy(),
            labels=self.labels[:n].copy(),
            answers=self.answers[:n].copy(),
            first_step=self.first_step[:n].copy(),
            first_place=self.first_place[:n].copy(),
            reason="",
        )
