"""The one guard between torch and the watch: no exception passes, and the time is counted.

Whatever torch or the training loop calls of ours goes through `guarded`, `safely` or `shielded`; in these three
nothing can raise except what they call inside a `try`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from diag.snapshot.pause import is_measuring
from diag.snapshot.state.host import on_host
from diag.snapshot.state.modes import functions_seen, operations_seen, unseen

GIVE_UP_AFTER = 3
# What runs some twenty times a step is looked up once.
is_inference = torch.is_inference_mode_enabled


class Clock:
    """Seconds since training began, how many of them the watch took, and how often each of its parts has failed.

    measuring: seconds spent in measurements and checks on the probe set; checking: in the latter alone.
    """

    def __init__(self) -> None:
        self.closed = False
        self.measuring = self.checking = 0.0
        self.broken: dict[str, int] = {}
        self._started: float | None = None
        self.ours_before = 0.0  # seconds spent in the watch until it was called last
        self.entered: float | None = None  # when the watch was called, while it runs

    def start(self) -> None:
        """Training has begun, if it had not."""
        if self._started is None:
            self._started = perf_counter()

    def elapsed(self) -> float:
        """Seconds since training began."""
        return 0.0 if self._started is None else perf_counter() - self._started

    def ours(self) -> float:
        """Seconds spent in the watch, measurements included."""
        inside = 0.0 if self.entered is None else perf_counter() - self.entered
        return self.ours_before + inside

    def training(self) -> float:
        """Seconds since training began without those spent in the watch, as of when the watch was called."""
        now = perf_counter() if self.entered is None else self.entered
        return 0.0 if self._started is None else now - self._started - self.ours_before

    def overhead(self) -> float:
        """Seconds spent in what runs at every step."""
        return max(self.ours() - self.measuring, 0.0)

    def charge(self, seconds: float) -> None:
        """Count seconds by which a measurement made the training's own work longer."""
        self.ours_before += seconds
        self.measuring += seconds

    def gave_up(self, part: str) -> bool:
        """Whether this part has failed too often to go on."""
        return self.broken.get(part, 0) >= GIVE_UP_AFTER


class Guarded:
    """Has methods that the training loop calls; failed(part, error) records that something of ours broke there."""

    def __init__(self, clock: Clock, failed: Callable[[str, Exception], None]) -> None:
        self.clock, self._broke = clock, failed

    def _within(self, part: str, method: Callable[..., Any], *args: Any) -> None:
        """`method(*args)` as a part of its own, inside of a call that is guarded for another part."""
        if self.clock.broken and self.clock.gave_up(part):
            return
        try:
            method(*args)
        except Exception as error:
            with contextlib.suppress(Exception):
                self._failed(part, error)

    def _failed(self, part: str, error: Exception) -> None:
        self.clock.broken[part] = self.clock.broken.get(part, 0) + 1
        self._broke(part, error)


def guarded(part: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a method of something `Guarded` safe to call from the training loop.

    It does nothing once the watch is closed or while an instrument measures; an exception in it is recorded and
    not raised, whatever fails in recording it; after three, what belongs to `part` is no longer observed.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Guarded, *args: Any, **kwargs: Any) -> Any:
            try:
                clock = self.clock
                if clock.closed or is_measuring() or (clock.broken and clock.gave_up(part)):
                    return None
                began = 0.0
                if outermost := clock.entered is None:
                    began = clock.entered = perf_counter()
                try:
                    inference = is_inference()
                    if not (inference or functions_seen() or operations_seen()):
                        return method(self, *args, **kwargs)
                    # What is made in inference mode cannot be used in training afterwards.
                    plain = torch.inference_mode(False) if inference else contextlib.nullcontext()
                    with unseen(), plain, on_host():
                        return method(self, *args, **kwargs)
                finally:
                    if outermost:
                        clock.ours_before += perf_counter() - began
                        clock.entered = None
            except Exception as error:
                with contextlib.suppress(Exception):
                    self._failed(part, error)
                return None

        return call

    return decorate


def safely(function: Callable[..., Any], *args: Any, broke: Callable[[Exception], None] | None = None) -> Any:
    """What `function(*args)` returns; None where it raises, after `broke(error)` was called.

    For what torch calls that belongs to no watch, or to several.
    """
    try:
        return function(*args)
    except Exception as error:
        tell(broke, error)
        return None


def tell(broke: Callable[[Exception], None] | None, error: Exception) -> None:
    """Call `broke(error)`, if there is one; nothing that it raises goes further."""
    if broke is not None:
        with contextlib.suppress(Exception):
            broke(error)


def shielded(function: Callable[..., Any], broke: Callable[[Exception], None] | None = None) -> Callable[..., Any]:
    """The same function for torch to call: nothing that it raises gets there."""

    def call(*args: Any) -> Any:  # not a partial: by its home the function is known as diag's own
        try:
            return function(*args)
        except Exception as error:
            tell(broke, error)
            return None

    return call
