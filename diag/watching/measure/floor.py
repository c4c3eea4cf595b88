"""Checks that look at the probe set with one forward pass: at set steps and the last, whatever the budget.

The steps are 1, 10, 30, 100, 300, 1000, ... (`is_floor` has two more, for what costs no pass). At most
`FLOOR_EXAMPLES` of the probe set are looked at, fewer where training has not shown as many yet. The time that it
takes is taken from the budget, so that the expensive measurements have what is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from diag.watching.measure.schedule import MOST_STOPS

FLOOR_EXAMPLES = 256


def next_floor(step: int) -> int:
    """The first of 1, 10, 30, 100, 300, 1000, ... after `step`."""
    if step < 1:
        return 1
    power = 10
    while 3 * power <= step:
        power *= 10
    return power if power > step else 3 * power


class Floor:
    """Which checks look at the probe set, and when."""

    def __init__(self, names: Iterable[str], last_step: int = 0) -> None:
        self.names = list(names)
        self._due = next_floor(last_step)
        self._last = last_step  # the step of the last look
        self._stops: dict[str, int] = {}

    @property
    def due(self) -> float:
        """The step after which the next look is due; infinity where nothing looks."""
        return self._due if self.names else inf

    def is_due(self, step: int) -> bool:
        """Whether to look after `step`."""
        return step >= self._due and bool(self.names)

    def is_new(self, step: int) -> bool:
        """Whether no look has been taken at `step`."""
        return step > self._last and bool(self.names)

    def looked(self, step: int) -> None:
        """They have looked; the next one is due at the next of the steps."""
        self._due, self._last = next_floor(step), step

    def give_up(self, name: str) -> None:
        """Leave this check out from now on: what the run does not have for it now it will not have later."""
        self.names = [n for n in self.names if n != name]

    def stopped(self, name: str) -> None:
        """It took too long."""
        self._stops[name] = self._stops.get(name, 0) + 1
        if self._stops[name] >= MOST_STOPS:
            self.give_up(name)
