"""A flag that says "diag is measuring": the watch's own hooks do nothing while it is raised.

Hooks that ran while an instrument calls the model would record the instrument's passes as training steps.
The flag is a context variable, so it belongs to the thread or task that measures and to no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_measuring: ContextVar[bool] = ContextVar("diag_measuring", default=False)


is_measuring = _measuring.get
"""True while an instrument runs in this context."""


@contextmanager
def measuring() -> Iterator[None]:
    """Raise the flag for the duration of the context."""
    token = _measuring.set(True)
    try:
        yield
    finally:
        _measuring.reset(token)
