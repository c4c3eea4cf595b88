"""What could not be written waits in memory and is tried again; what is missing in the end is reported.

A disk that is full for a while, a folder that lost its permissions or a file that is gone must not end the record,
and what fails in one file must not keep the others waiting.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy

from diag.errors import RunError

BYTES_WAITING = 64 << 20  # bytes that wait for one file
EVERY = 0.1  # seconds between two tries
LOGGER = logging.getLogger("diag")


def log_line(text: str) -> None:
    """One line on the logger, whatever the user's handlers and filters do."""
    with contextlib.suppress(Exception):
        LOGGER.warning("%s", text)


class Append(NamedTuple):
    """A call that appends something at a step, and about how many bytes its arguments keep in memory."""

    step: int
    size: int
    call: Callable[..., None]
    arguments: tuple[Any, ...]


class Waiting:
    """The appends to one part of a run, in order; each is tried until it does not raise RunError.

    part: what is appended, for the sentences ("steps", "results"). report: takes (step, sentence) once
    all that had to wait has been written.
    """

    def __init__(self, part: str, report: Callable[[int, str], None]) -> None:
        self._part, self._report = part, report
        self._queue: deque[Append] = deque()
        self._size, self._tried = 0, 0.0
        self._first = self._last = 0
        self._lost, self._lost_from = 0, 0  # how many did not fit, and the step of the first
        self._reason = ""

    def append(self, step: int, size: int, call: Callable[..., None], *arguments: Any) -> None:
        """Append now, or after what waits; arrays are copied where they wait.

        Raises what `call` raises, but for RunError.
        """
        if self._reason and time.monotonic() - self._tried >= EVERY:
            self.flush()
        if not self._reason:
            try:
                call(*arguments)
                return
            except RunError as error:
                self._begin(step, str(error))
        kept = tuple(a.copy() if isinstance(a, numpy.ndarray) else a for a in arguments)
        self._keep(Append(step, size, call, kept))

    def flush(self) -> bool:
        """Write what waits, as far as that is possible; whether nothing waits any more."""
        self._tried = time.monotonic()
        try:
            while self._queue:
                append = self._queue[0]
                append.call(*append.arguments)
                self._size -= self._queue.popleft().size
        except RunError as error:
            self._reason = str(error)
            return False
        if self._reason:
            sentence, self._reason, self._lost = self.sentence(), "", 0
            self._report(self._last, sentence)
        return True

    def sentence(self) -> str:
        """What failed, from when to when, and what of it is missing."""
        reason = self._reason.rstrip(".")
        start = f"The {self._part} from step {self._first:,} to {self._last:,} could not be written ({reason})"
        missing = self._lost + len(self._queue)
        if not missing:
            return f"{start}; they were kept and written later, and none is missing."
        first = self._queue[0].step if self._queue else self._lost_from
        return f"{start}; {missing:,} of them are missing, from step {first:,} to {self._last:,}."

    def _begin(self, step: int, reason: str) -> None:
        self._reason, self._first, self._tried = reason, step, time.monotonic()
        log_line(
            f"The {self._part} of the watched run cannot be written since step {step:,} ({reason.rstrip('.')}); "
            f"they wait in memory, up to {BYTES_WAITING >> 20} MB, and are tried again. Training goes on."
        )

    def _keep(self, append: Append) -> None:
        self._last = append.step
        # Once one did not fit, what follows is lost, too.
        if self._size + append.size <= BYTES_WAITING and not self._lost:
            self._queue.append(append)
            self._size += append.size
            return
        if not self._lost:
            self._lost_from = append.step
        self._lost += 1
