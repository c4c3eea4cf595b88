"""When the parts of a loss are read for one kind of thing, and the looks that are kept of it."""

from __future__ import annotations

import abc
from typing import Generic, TypeVar

from diag.watching.observe.loop.formula.parts import Summand
from diag.watching.observe.loop.moment import Moment, due

READINGS_KEPT = 64
READINGS_TOLD = (3, 6)  # after which checks may judge

Reading = TypeVar("Reading")


class Reader(abc.ABC, Generic[Reading]):
    """Reads a few backward passes: 1, 2, 3, 10, 30, 100, ..., and where something was found every `EVERY`-th of
    those that are listened to. Of many looks the first and the last are kept."""

    NAME: str
    EVERY: int

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._passes = 0
        self.looks: list[Reading] = []

    def begins(self) -> bool:
        """A backward pass begins; whether it is to be read."""
        self._passes += 1
        return due(self._passes) or (bool(self.looks) and self._passes % self.EVERY == 0)

    def read(self, parts: list[Summand]) -> None:
        """Look at the parts of the loss of a pass that is to be read."""
        look = self._look(parts)
        if look is None:
            return
        if len(self.looks) >= READINGS_KEPT:
            self.looks.pop(READINGS_KEPT // 2)
        self.looks.append(look)
        if len(self.looks) in READINGS_TOLD:
            self._moment.news((self.NAME, len(self.looks)))

    @abc.abstractmethod
    def _look(self, parts: list[Summand]) -> Reading | None:
        """What the parts say; None where they hold nothing of the kind."""
