"""What stands between the watch and the training loop: no exception passes, and the time is counted."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from diag.snapshot import pause

GIVE_UP_AFTER = 3


class Clock:
    """Seconds since training began, those of them that the watch took, and what of it has broken how often.

    measuring: seconds spent in measurements and checks on the probe set; checking: in the latter alone.
    """

    def __init__(self) -> None:
        self.closed = False
        self.measuring = self.checking = 0.0
        self.broken: dict[str, int] = {}
        self._started: float | None = None
        self._ours = 0.0
        self._entered: float | None = None

    def start(self) -> None:
        """Training has begun, if it had not."""
        if self._started is None:
            self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since training began."""
        return 0.0 if self._started is None else time.perf_counter() - self._started

    def ours(self) -> float:
        """Seconds spent in the watch, measurements included."""
        inside = 0.0 if self._entered is None else time.perf_counter() - self._entered
        return self._ours + inside

    def overhead(self) -> float:
        """Seconds spent in what runs at every step."""
        return max(self.ours() - self.measuring, 0.0)

    def charge(self, seconds: float) -> None:
        """Seconds of the training's own that a measurement made it longer by."""
        self._ours += seconds
        self.measuring += seconds

    def enter(self) -> bool:
        """The watch is called; False where it is at work already."""
        if self._entered is not None:
            return False
        self._entered = time.perf_counter()
        return True

    def leave(self) -> None:
        """The watch goes back to the loop."""
        if self._entered is not None:
            self._ours += time.perf_counter() - self._entered
            self._entered = None


class Guarded:
    """Has methods that the training loop calls; failed(part, error) records that something of ours broke there."""

    def __init__(self, clock: Clock, failed: Callable[[str, Exception], None]) -> None:
        self.clock, self._broke = clock, failed


def guarded(part: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a method of something `Guarded` safe to call from the training loop.

    It does nothing once the watch is closed or while an instrument measures; an exception in it is recorded and
    not raised; after three, what belongs to `part` is no longer observed.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Guarded, *args: Any, **kwargs: Any) -> Any:
            clock = self.clock
            if clock.closed or pause.is_measuring() or clock.broken.get(part, 0) >= GIVE_UP_AFTER:
                return None
            outermost = clock.enter()
            try:
                if torch.is_inference_mode_enabled():  # what is made there cannot be used in training afterwards
                    with torch.inference_mode(False):
                        return method(self, *args, **kwargs)
                return method(self, *args, **kwargs)
            except Exception as error:
                clock.broken[part] = clock.broken.get(part, 0) + 1
                self._broke(part, error)
                return None
            finally:
                if outermost:
                    clock.leave()

        return call

    return decorate
