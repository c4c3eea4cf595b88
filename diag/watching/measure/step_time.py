"""How long a training step takes, without the watch and without being read."""

from __future__ import annotations

import math
import statistics
from collections import deque

from diag.watching.guard import Clock

STEPS_FOR_TIME = 9  # steps that tell what a step takes


class StepTime:
    """Times the training steps, in seconds."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._usual: deque[float] = deque(maxlen=STEPS_FOR_TIME)
        self._last: float | None = None
        self._shortest = math.inf
        self.timed = False  # whether the last step was

    @property
    def known(self) -> bool:
        """Whether a step has been timed."""
        return bool(self._usual)

    def shortest(self, steps: int) -> float:
        """What a step takes: the shortest, as the first ones include what happens once, such as compiling."""
        return self._shortest if self._shortest < math.inf else self._clock.elapsed() / steps

    def pause(self) -> None:
        """A step ended that is not timed."""
        self._last = None

    def step_ended(self, read: bool) -> float:
        """Time the step that ended; gives by how many seconds reading it, if it was read, made it longer."""
        training, longer = self._clock.training(), 0.0
        self.timed = self._last is not None
        if self._last is not None:
            taken = training - self._last
            if not read:
                self._usual.append(taken)
                self._shortest = min(self._shortest, taken)
            elif self._usual:
                longer = max(taken - statistics.median(self._usual), 0.0)
                self._clock.charge(longer)
                training -= longer
        self._last = training
        return longer
