"""The Python state of a model, put back to the bit after each pass of a measurement.

A counter that anneals, a memory of the last batch, a cache, a schedule: what a network keeps between calls must not
move because it was measured. Around a whole measurement the state is read once (`kept_state`), and each pass inside
puts it back (`restoring`), so that every pass sees the same network. What cannot be put back is replaced for the
time (see `standins`); where something was changed all the same, the model is refused and the reason names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import nn

from diag.errors import Unsupported
from diag.snapshot.state.hooks import forget_new
from diag.snapshot.state.kinds import Kept
from diag.snapshot.state.standins import may_have_stand_in, stand_in
from diag.snapshot.state.walk import Walk

CANNOT_PUT_BACK = (
    "A call of the model changes {}, which measuring cannot put back ({}); keep it in a list, a dict or a buffer "
    "of the model, or leave it out."
)


class StateLost(Unsupported):
    """A measurement changed what it could not put back."""


_states: ContextVar[tuple[State, ...]] = ContextVar("diag_states", default=())


class State:
    """What Python holds for a model and for what is called with it, at one moment."""

    def __init__(self, model: nn.Module, *others: Any) -> None:
        self.model = model
        self._kept = Walk(model, [o for o in others if o is not None]).kept
        self._standing_in = list(_replaced([kept for _, kept in self._kept]))
        self.lost = ""  # what could not be put back, as the sentence of a refusal

    def arm(self) -> None:
        """Put the stand-ins in their places."""
        for kept, place, item in self._standing_in:
            kept.put(place, stand_in(item))

    def put_back(self, after_a_pass: bool = False) -> None:
        """Put back what is not as it was; after a pass a large tensor that counts no write is as it was."""
        for name, kept in self._kept:
            try:
                if not (kept.looks_the_same() if after_a_pass else kept.same()):
                    kept.put_back()
            except Exception as error:
                self.lost = self.lost or CANNOT_PUT_BACK.format(
                    name, str(error).rstrip(".") or type(error).__name__
                )


def _replaced(every: Iterable[Kept]) -> Iterator[tuple[Kept, Any, Any]]:
    looked_at: dict[type, bool] = {}
    for kept in every:
        for place, item in kept.items():
            kind = type(item)
            if kind not in looked_at:
                looked_at[kind] = may_have_stand_in(kind)
            if looked_at[kind] and stand_in(item) is not item:
                yield kept, place, item


@contextmanager
def kept_state(model: nn.Module, *others: Any, again: bool = False) -> Iterator[None]:
    """Around a measurement: what the model and `others` (a loss function, hooks) keep is read here, once.

    again: within a measurement too, so that what was set on the model since then is a part of its state. Raises
    StateLost at the end where something was changed that cannot be put back.
    """
    if _state_of(model) is not None and not again:
        yield
        return
    state = State(model, *others)
    token = _states.set((*_states.get(), state))
    try:
        state.arm()
        yield
    finally:
        _states.reset(token)
        state.put_back()
    if state.lost:
        raise StateLost(state.lost)


def renew(model: nn.Module) -> None:
    """Before a call of the model: what an earlier call in the same measurement has moved is put back, too."""
    forget_new()
    state = _state_of(model)
    if state is not None:
        state.put_back(after_a_pass=True)
        state.arm()


def _state_of(model: nn.Module) -> State | None:
    return next((state for state in reversed(_states.get()) if state.model is model), None)


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Around a pass: afterwards the state is what it was at the beginning of the measurement."""
    with kept_state(model) if _state_of(model) is None else nullcontext():
        try:
            yield
        finally:
            renew(model)
