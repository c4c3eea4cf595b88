"""The range of a number that a caller gives: part of its annotation, so that it is converted, checked and explained
by one declaration.

    def dead_units(activations, *, alarm_at: Share = 0.75) -> DeadUnits: ...

For a type checker `Share` is a float.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Within:
    """From `low` to `high`, both included. above: without `low` itself. infinite: with infinity, if no `high`."""

    low: float
    high: float = math.inf
    above: bool = False
    infinite: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range; NaN never does."""
        beyond = value > self.low if self.above else value >= self.low
        return beyond and value <= self.high and (self.infinite or math.isfinite(value))

    def __str__(self) -> str:
        """In words, after "a number".

        >>> print(Within(0, 1), Within(1), Within(0, above=True), Within(0, 1, above=True), sep="; ")
        from 0 to 1; of 1 or more; above 0; above 0 and up to 1
        """
        if self.high == math.inf:
            return f"above {self.low:,}" if self.above else f"of {self.low:,} or more"
        return (
            f"above {self.low:,} and up to {self.high:,}" if self.above else f"from {self.low:,} to {self.high:,}"
        )


Share = Annotated[float, Within(0, 1)]
Tolerance = Annotated[float, Within(0, 1, above=True)]
Positive = Annotated[float, Within(0, above=True)]
Size = Annotated[float, Within(0)]
# Thresholds: 0 is passed by everything, infinity by nothing.
Threshold = Annotated[float, Within(0, infinite=True)]
Times = Annotated[float, Within(1, infinite=True)]
Count = Annotated[int, Within(1)]
WholeNumber = Annotated[int, Within(0)]
GridPoints = Annotated[int, Within(3)]  # of a line: both ends and one between
Seed = Annotated[int, Within(0, 2**62)]
