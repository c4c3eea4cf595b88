"""What is counted: draws of an estimate with its stated error, beside the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Draw:
    """One draw: the name of what is estimated, its true value, the estimate and the error stated."""

    of: str
    truth: float
    value: float
    error: float

    @property
    def known(self) -> bool:
        """Whether an error was stated at all."""
        return math.isfinite(self.error) and math.isfinite(self.value)

    @property
    def covered(self) -> bool:
        """Whether the truth is within two errors; where the error is 0 it must be met to rounding."""
        return abs(self.value - self.truth) <= 2 * self.error + 1e-9 * max(abs(self.truth), 1e-9)


@dataclass(frozen=True)
class Case:
    """Draws of one setting: `instrument`, `setting` and `draws(count)`."""

    instrument: str
    setting: str
    draws: Callable[[int], Iterator[Draw]]
