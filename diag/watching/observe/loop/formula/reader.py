"""When the parts of a loss are read for one kind of thing, and the looks that are kept of it."""

from __future__ import annotations

import abc
from typing import Generic, TypeVar

from diag.watching.observe.loop.formula.parts import Summand
from diag.watching.observe.loop.moment import Moment, due

READINGS_KEPT = 64
READINGS_TOLD = (3, 6)  # after which checks may judge

Reading = TypeVar("Reading")


def keep_look(looks: list[Reading], look: Reading, moment: Moment, name: str) -> None:
    """Add a look: of many the first and the last are kept, and after a few checks may judge. name: of the fact that
    it becomes a part of."""
    if len(looks) >= READINGS_KEPT:
        looks.pop(READINGS_KEPT // 2)
    looks.append(look)
    if len(looks) in READINGS_TOLD:
        moment.news((name, len(looks)), name)


class Reader(abc.ABC, Generic[Reading]):
    """Reads a few backward passes: 1, 2, 3, 10, 30, 100, ..., and where something was found every `EVERY`-th of
    those that are listened to."""

    NAME: str
    EVERY: int

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._passes = 0
        self.looks: list[Reading] = []

    @property
    def looking(self) -> bool:
        """Whether the next backward pass is to be read, so that what comes before it matters."""
        number = self._passes + 1
        return due(number) or (bool(self.looks) and number % self.EVERY == 0)

    def begins(self) -> bool:
        """A backward pass begins; whether it is to be read."""
        looking = self.looking
        self._passes += 1
        return looking

    def read(self, parts: list[Summand]) -> None:
        """Look at the parts of the loss of a pass that is to be read."""
        look = self._look(parts)
        if look is not None:
            keep_look(self.looks, look, self._moment, self.NAME)

    @abc.abstractmethod
    def _look(self, parts: list[Summand]) -> Reading | None:
        """What the parts say; None where they hold nothing of the kind."""
