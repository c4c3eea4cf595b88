"""Follows each row of the data through training's own batches: its margin at each sight.

A step costs one number a row of its batch; on a device these stay there, and are read some steps later in one copy
that nothing waits for; in a long training, a part of the steps is followed once each row has been seen a few times.
What checks are told changes once all rows have come round again (`ROUNDS`), so that what they say depends on the
training alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.loop.rows import Moved, RowFacts
from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.observe.loop.moment import Moment
from diag.watching.observe.loop.rows.course import MarginCourse
from diag.watching.observe.loop.rows.identity import NOT_AGAIN, Hashes, Places, hashes_of
from diag.watching.observe.loop.rows.scores import RowLogits, RowScores, scores_of
from diag.watching.observe.rows import Readback

READ_TOGETHER, READS_WAITING = 16, 4  # calls whose numbers are read together, and copies that may be under way
SEVERAL = 0.05  # of the calls: from there on rows have no one label
MET_BEFORE = 8  # rows of a batch that were met before, at least, to tell that its labels are others
OTHERS = 0.4  # of these
STRETCHES = 64
LOOKED_AT = 4  # batches that are looked at for rows that are alike
NO_TARGET = "no loss of training was seen with one target a row"
TWO_TARGETS = "the loss of a row has two targets (mixed rows?)"
ALL_STEPS, ALL_SIGHTS = 1 << 10, 8  # steps, and sights of a row, up to which every step is followed
TIMES_HALVED = 2  # then every second one, and at last every fourth
# 2^32 over the golden ratio: its multiples fall evenly, whatever number of batches an epoch has.
GOLDEN_SHARE = 0x9E3779B1
COUNTED_TOGETHER = 8  # batches


class RowObserver:
    """Follows the rows of one model's training."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._who: Places | Hashes | None = None
        self._known: list[Batch] = []
        self._course: MarginCourse | None = None
        # The rows of the batch under way, as numbers or hashes, and how many they are.
        self._now: tuple[Any, int] | None = None
        self._pending: tuple[Any, RowScores | RowLogits, int, Any] | None = None
        # Batches that are counted together, as that takes a third of the time; and how many rows they have.
        self._held: list[tuple[Any, RowScores | RowLogits, int]] = []
        self._rows_held = 0
        self._away: deque[tuple[Readback, list[tuple[slice, int]]]] = deque()
        self._waiting: list[tuple[Any, Tensor, slice, int]] = []
        self._stamp = numpy.zeros(0, numpy.int32)
        self._places = numpy.arange(0)
        self._fit = self._several = self._looked = 0
        self._compared = self._changed = self._sights = 0
        self._next_round = 1
        self._moved: list[list[int]] = []
        self._last_moved, self._over, self._counted = -1, 0, 0
        self._told = RowFacts()
        self.needed = True  # whether anything will ask for the facts
        self._every, self._later = 1, (0, 1)  # of so many steps one is followed; from which step on, of how many

    def know(self, batches: Iterable[Batch]) -> None:
        """Rows without a DataLoader that are among these are named by their place there."""
        self._known = list(batches)

    # What the loop does

    def training_call(
        self, args: Any, kwargs: Mapping[str, Any], places: NDArray[numpy.int64], dataset: Any
    ) -> None:
        """The model was called in training; `places` of its rows in the data set, none where they are not known."""
        self._commit()
        self._now = None
        if not self._follows() or (self._who is not None and self._who.reason):
            return
        size = next((len(t) for t in tensors_in((args, dict(kwargs))) if t.ndim), 0)
        if not size:
            return
        if len(places) == size and self._takes(dataset):
            self._now = places, size
        elif isinstance(self._who, Hashes) or self._who is None:
            self._who = self._who or Hashes(self._known)
            hashes = hashes_of(args, kwargs, size)
            if hashes is not None and hashes.device.type != "mps":  # it has no numbers of 64 bits to send
                self._now = (hashes.numpy() if hashes.is_cpu else hashes), size

    def _follows(self) -> bool:
        """Whether the rows of the step under way are followed."""
        step, (begins, every) = self._moment.step, self._later
        if step >= begins:
            self._every = every
        return self.needed and (self._every == 1 or (step * GOLDEN_SHARE & 0xFFFFFFFF) * self._every < 1 << 32)

    def _takes(self, dataset: Any) -> bool:
        """Whether rows are told apart by their place in this data set."""
        if self._who is None:
            try:
                self._who = Places(dataset, len(dataset))
            except TypeError:  # a stream
                return False
        return isinstance(self._who, Places) and self._who.dataset is dataset

    def loss_called(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss function of torch returned a value that has a graph."""
        if self._now is None:
            return
        _, target = input_and_target(args, kwargs)
        if self._pending is not None:
            if not _same(self._pending[3], target):
                self._several += 1
                self._now = self._pending = None
            return
        found = scores_of(name, args, kwargs, self._now[1])
        if found is not None:
            self._pending = self._now[0], found, self._moment.step, target

    def step_ended(self) -> None:
        """The step under way is over."""
        self._commit()

    def _commit(self) -> None:
        """The call under way is over: its rows count."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        who, found, step, _ = pending
        self._fit += 1
        if found.on_host and isinstance(who, numpy.ndarray):
            self._held.append((who if found.rows.step == 1 else who[found.rows], found, step))
            self._rows_held += len(found.label)
            # Nothing waits past a round, so what is told is told at the step at which it would be otherwise.
            n = 1 if self._course is None else max(self._course.n, 1)
            over = (self._sights + self._rows_held) // n >= self._next_round
            if over or len(self._held) >= COUNTED_TOGETHER:
                self._count_held()
        else:
            self._send(who, found.scores(), step)

    def _count_held(self) -> None:
        held, self._held, self._rows_held = self._held, [], 0
        for who, found, step in held:
            self._count(who, found.scores(), step)

    # From a device

    def _send(self, who: Any, found: RowScores, step: int) -> None:
        who = who[found.rows]
        who = who.view(torch.float64) if isinstance(who, Tensor) else who
        margin = found.margin
        parts = [margin, found.label.to(margin.dtype), found.answer.to(margin.dtype)]
        self._waiting.append((who, torch.stack(parts), found.rows, step))
        if len(self._waiting) >= READ_TOGETHER:
            self._start_reading()
        self._read(wait=len(self._away) > READS_WAITING)

    def _start_reading(self) -> None:
        """One copy of all that waits is begun."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            numbers = [n for who, scores, _, _ in waiting for n in (who, scores)]
            self._away.append((Readback(numbers), [(rows, step) for _, _, rows, step in waiting]))

    def _read(self, wait: bool) -> None:
        while self._away and (wait or self._away[0][0].ready()):
            numbers, calls = self._away.popleft()
            values = numbers.values()
            for (rows, step), who, scores in zip(calls, values[::2], values[1::2], strict=True):
                # Hashes travel as the bits of a float64.
                who = numpy.ascontiguousarray(who)
                who = who.view(numpy.int64) if who.dtype == numpy.float64 else who
                margin, label, answer = numpy.reshape(scores, (3, -1))
                found = RowScores(rows, margin, label.astype(numpy.int64), answer.astype(numpy.int64))
                self._count(who, found, step)

    # Counting

    def _count(self, who: NDArray[numpy.int64], found: RowScores, step: int) -> None:
        assert self._who is not None
        if isinstance(self._who, Hashes) and self._looked < LOOKED_AT:
            self._looked += 1
            self._who.look(who)
        rows, margin, label, answer = self._who.rows(who), found.margin, found.label, found.answer
        if self._who.reason:
            return
        if self._course is None:
            self._course = MarginCourse(self._who.capacity)
        kept = self._first_of_batch(rows)
        kept &= ~numpy.isnan(margin)
        places = self._arange(len(rows)) * found.rows.step
        if not kept.all():
            rows, margin, label, answer, places = (a[kept] for a in (rows, margin, label, answer, places))
        if not len(rows):
            return
        self._course.make_room(self._who.largest)
        before, others = self._course.meet(rows, margin, label, answer, step, places)
        self._sights += len(rows)
        self._note(before, others, step)
        self._tell(step)

    def _arange(self, size: int) -> NDArray[numpy.int64]:
        if size > len(self._places):
            self._places = numpy.arange(size)
        return self._places[:size]

    def _first_of_batch(self, rows: NDArray[numpy.int64]) -> NDArray[numpy.bool_]:
        """Which places count: of a row that is there twice one, and of a row that is not followed none."""
        assert self._who is not None
        if self._who.largest > len(self._stamp):
            self._stamp = numpy.zeros(2 * self._who.largest, numpy.int32)
        at = self._arange(len(rows))
        self._stamp[rows] = at
        one: NDArray[numpy.bool_] = self._stamp[rows] == at
        return one if self._who.all_followed else one & (rows >= 0)

    def _note(self, before: int, others: int, step: int) -> None:
        """Of the rows of a batch that were met before, so many have another label: is that a stretch?"""
        self._compared += before
        self._changed += others
        self._counted += 1
        if before >= MET_BEFORE and others >= OTHERS * before:
            if self._moved and self._last_moved == self._counted - 1:
                self._moved[-1][1:] = step, self._moved[-1][2] + others
            elif len(self._moved) < STRETCHES:
                self._moved.append([step, step, others])
            self._last_moved = self._counted
        elif before >= MET_BEFORE and self._over < len(self._moved):
            self._over = len(self._moved)  # only a stretch that is over is one
            self._moment.news(("labels moved", self._over), "rows")

    # Facts

    def _tell(self, step: int) -> None:
        """Once all rows have come round, what is told is made new."""
        assert self._course is not None
        rounds = self._sights // max(self._course.n, 1)
        every = 1 << min(rounds // ALL_SIGHTS, TIMES_HALVED) if step > ALL_STEPS else 1
        if every > self._later[1]:
            # From a step on that is later than any at which this one's numbers may have been read from a device.
            self._later = step + 2 * READ_TOGETHER * READS_WAITING, every
        if rounds >= self._next_round:
            # Each of the first, then ever fewer: what is kept grows with the logarithm of their number.
            self._next_round = rounds + max(1, rounds // 8)
            self._told = self._facts()
            self._moment.news(("rows", rounds), "rows")

    def _facts(self) -> RowFacts:
        assert self._course is not None and self._who is not None
        found = self._course.facts()
        return replace(
            found,
            counted_in=self._who.counted_in,
            inputs=self._who.inputs,
            every=self._who.every,
            number=self._who.numbers(found.n).astype(numpy.int32),
        )

    def facts(self) -> RowFacts:
        """As plain data; what is on a device is read now."""
        self._count_held()
        self._start_reading()
        self._read(wait=True)
        moved = tuple(Moved(*m) for m in self._moved[: self._over])
        return replace(
            self._told,
            reason=self._why(),
            several=self._several,
            calls=self._fit + self._several,
            compared=self._compared,
            changed=self._changed,
            moved=moved,
            steps=self._moment.step - 1,
        )

    def _why(self) -> str:
        if self._several > SEVERAL * (self._fit + self._several):
            return TWO_TARGETS
        if self._who is not None and self._who.reason:
            return self._who.reason
        if not self._fit:
            return NO_TARGET
        again = self._course is not None and self._sights > self._course.n
        return "" if again or isinstance(self._who, Places) else NOT_AGAIN


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    alike = isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape
    return alike and one.is_cpu and other.is_cpu and torch.equal(one, other)
