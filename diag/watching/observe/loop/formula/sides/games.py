"""Games of two networks (GANs): one judges rows, the other generates them, each with backward passes of its own.

The judge is known by its parameters: a backward pass trains them alone, another one goes through them to the
parameters of the generator. What either loss asks of the judge's output is the gradient there, taken from the
loop's own backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import leaves_before
from diag.snapshot.loop.games import GameFacts, GameLook
from diag.watching.guard import safely
from diag.watching.observe.loop.formula.reader import keep_look
from diag.watching.observe.loop.formula.sides.judged import (
    JudgedCall,
    RowsSeen,
    calls_of,
    direction_of_pull,
    distance_of_rows,
    range_made_by,
    rows_seen,
    split_by_direction,
)
from diag.watching.observe.loop.moment import Moment, due

PASSES_ALWAYS, EVERY_PASS = 10, 16
PASSES_OF_A_ROUND = 12  # a judge may take several steps to one of the generator
SETS_KEPT = 4
FEWEST_ROWS_OF_A_GAME, ROUNDING_OF_A_ROW = 8, 1e-5  # of a batch that may be all alike; of the size of its numbers
MOST_LEAVES_SEARCHED = 6000  # nodes
# distance_of_rows from the group that is not alike, and over that from the one that is
CLEARLY_APART, NEARER = 0.2, 5.0


class Games:
    """Follows backward passes. `names`: of the model's parameters, by id."""

    def __init__(self, moment: Moment, names: Mapping[int, str]) -> None:
        self._moment, self._names = moment, names
        self._passes = self._open = 0
        self._sets: list[frozenset[int]] = []
        self._judge: frozenset[int] | None = None
        self._both: frozenset[int] = frozenset()
        self._groups: dict[str, RowsSeen] = {}
        self._calls: list[tuple[str, RowsSeen]] = []  # of the judge: the direction on all rows, "" for no one
        self.looks: list[GameLook] = []

    def backward_called(self, root: Any) -> None:
        """A backward pass begins at this node."""
        self._passes += 1
        if self._passes <= PASSES_ALWAYS or due(self._passes) or (self.looks and self._passes % EVERY_PASS == 0):
            self._open = PASSES_OF_A_ROUND
        if not self._open:
            return
        self._open -= 1
        trained = leaves_before(root, MOST_LEAVES_SEARCHED)
        if self._judge is None:
            self._learn(root, trained)
        elif trained == self._judge:
            for call in calls_of(root, self._judge):
                call.last.register_prehook(partial(_taken, self._judging, (call.inputs,)))
        elif trained == self._both and self._groups:
            self._making(calls_of(root, self._judge))

    def _learn(self, root: Any, trained: frozenset[int]) -> None:
        """Look for a pass that goes through all of what another one trains alone, and then further."""
        for inner in self._sets:
            if inner and inner < trained and self._goes_through(root, inner, trained - inner):
                self._judge, self._both = inner, trained
                return
        if trained and trained not in self._sets and len(self._sets) < SETS_KEPT:
            self._sets.append(trained)

    @staticmethod
    def _goes_through(root: Any, inner: frozenset[int], outer: frozenset[int]) -> bool:
        calls = calls_of(root, inner)
        makers = [leaves_before(call.maker, MOST_LEAVES_SEARCHED) for call in calls if call.maker is not None]
        return bool(calls) and len(makers) == len(calls) and all(made and made <= outer for made in makers)

    def _judging(self, inputs: Tensor, pull: Tensor) -> None:
        """The judge's own pass has come to its output."""
        groups = split_by_direction(inputs, pull)
        for name, rows in groups.items():
            self._groups[name] = rows_seen(rows)
        self._calls.append((next(iter(groups)) if len(groups) == 1 else "", rows_seen(inputs)))

    def _making(self, calls: list[JudgedCall]) -> None:
        """The generator's pass begins."""
        if len(calls) == 1:
            about = (calls[0].inputs, range_made_by(calls[0].maker))
            calls[0].last.register_prehook(partial(_taken, self._made, about))

    def _made(self, inputs: Tensor, bounded: str, pull: Tensor) -> None:
        groups, self._groups, self._open = self._groups, {}, 0
        calls, self._calls = self._calls, []
        if len(pull) != len(inputs):
            return
        made, (asked_for, slope) = rows_seen(inputs), direction_of_pull(pull)
        alike = _alike(made, groups)
        other = groups.get({"up": "down", "down": "up"}.get(alike, ""))
        look = GameLook(
            step=self._moment.step,
            alike=alike,
            asked_for=asked_for,
            generated=made.size,
            others=other.size if other is not None else math.nan,
            slope=slope,
            bounded=bounded,
            outside=other.outside.get(bounded, 0.0) if other is not None else 0.0,
            one_row=len(inputs) >= FEWEST_ROWS_OF_A_GAME
            and _is_one_row(made)
            and not all(map(_is_one_row, groups.values())),
            one_answer=_one_answer(made, calls),
        )
        keep_look(self.looks, look, self._moment, "games")

    def facts(self) -> GameFacts:
        """As plain data."""
        judge = self._judge or frozenset()
        found = [tuple(sorted(n for i in ids if (n := self._names.get(i)))) for ids in (judge, self._both - judge)]
        return GameFacts(tuple(self.looks), *found)


def _taken(tell: Any, about: tuple[Any, ...], gradients: Any) -> None:
    """The gradient at a node, in the middle of a backward pass: nothing raises into it. about: holds no node, since
    the hook belongs to one, and a circle of the two would outlive the step."""
    if gradients and isinstance(gradients[0], Tensor):
        safely(tell, *about, gradients[0])


def _is_one_row(rows: RowsSeen) -> bool:
    return bool((rows.deviations <= ROUNDING_OF_A_ROW * max(rows.size, 1e-30)).all())


def _one_answer(made: RowsSeen, calls: list[tuple[str, RowsSeen]]) -> str:
    """The direction of all calls of the judge, where one had rows like the generated ones and another had not."""
    directions = {direction for direction, _ in calls}
    if len(calls) < 2 or len(directions) > 1:
        return ""
    distances = sorted(distance_of_rows(made, rows) for _, rows in calls)
    return directions.pop() if _clearly(distances[0], distances[-1]) else ""


def _clearly(near: float, far: float) -> bool:
    return far > CLEARLY_APART and near * NEARER < far


def _alike(made: RowsSeen, groups: Mapping[str, RowsSeen]) -> str:
    """Which of the two groups is like the generated rows, where the other one is not."""
    if set(groups) != {"up", "down"}:
        return ""
    near, far = sorted(groups, key=lambda name: distance_of_rows(made, groups[name]))
    return near if _clearly(distance_of_rows(made, groups[near]), distance_of_rows(made, groups[far])) else ""
