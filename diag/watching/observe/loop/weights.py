"""Weights that something other than an optimizer changes between a step and the next training call.

A few entries of a few parameters are read after each step and at the next call: on the host from memory, without an
operation of torch; elsewhere they are copied on the device and compared when the facts are asked for.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from diag.snapshot.loop.steps import OutsideChange
from diag.watching.observe.loop.moment import Moment
from diag.watching.observe.loop.zeroing import spread

SOME = 4  # parameters that are read
NUMBERS_OF_EACH = 4  # of each
# Where they lie: not all in one column, which may be that of an input that is always zero (the edge of a picture).
FIRST_ENTRY, TO_NEXT_ENTRY = 0.1429, 0.2113  # of the parameter's entries
CHANGES_KEPT = 8  # changes that are reported
TAKEN_BACK_KEPT = 64  # steps of which it is known which share was taken back
PAST = 512  # earlier states that are remembered, to tell where weights were set back to


@dataclass
class Sample:
    """Some entries of one parameter, read by `read()`."""

    parameter: nn.Parameter
    address: int
    read: Callable[[], Any]


class Weights:
    """Follows the values of a few parameters."""

    def __init__(self, parameters: Sequence[nn.Parameter], names: dict[int, str], moment: Moment) -> None:
        self._chosen = [p for p in spread([p for p in parameters if p.requires_grad], SOME) if p.numel()]
        self._names, self._moment = names, moment
        self._changes: list[OutsideChange] = []
        self._times = 0
        self._read = SOME
        self._taken_back: deque[float] = deque(maxlen=TAKEN_BACK_KEPT)
        self._away: list[tuple[int, list[Any], list[Any], Any]] = []
        self._start()

    def _start(self) -> None:
        """Begin to follow the weights in their present precision and place."""
        self._home = self._place()
        self._samples = [sample_of(p) for p in self._chosen]
        self._on_host = all(p.is_cpu for p in self._chosen)
        self._after: list[Any] | None = None
        self._before: list[Any] | None = None  # at the last training call
        self._versions: list[int] = []
        self._at_evaluation: list[Any] | None = None
        self._past: OrderedDict[Any, int] = OrderedDict()
        if self._on_host:
            self._past[tuple(self._values())] = 0

    def _place(self) -> Any:
        return (self._chosen[0].dtype, self._chosen[0].device) if self._chosen else None

    def _values(self) -> list[Any]:
        """Of the parameters that the last step was read at: of one only where it was not looked at closely."""
        values = []
        for s in self._samples[: self._read]:
            if s.parameter.data_ptr() != s.address:
                again = sample_of(s.parameter)
                s.address, s.read = again.address, again.read
            values.append(s.read())
        return values

    def _one(self) -> list[Any] | None:
        """Of the first parameter, while it is on the host and in its place: what is read at most steps."""
        first = self._samples[0] if self._on_host and self._samples else None
        if first is None or first.parameter.data_ptr() != first.address:
            return None
        if first.parameter.dtype != self._home[0]:
            return None
        return [first.read()]

    def stepped(self) -> None:
        """An optimizer that holds the model's parameters has stepped."""
        if not self._moment.attentive and (one := self._one()) is not None:
            self._read, self._after, self._at_evaluation = 1, one, None
            return
        if self._place() != self._home:
            self._start()
        close = self._moment.attentive
        self._read = SOME if close else 1
        self._after, self._at_evaluation = self._values(), None
        if not self._on_host:
            self._versions = [s.parameter._version for s in self._samples]
        elif close:
            key = tuple(self._after)
            self._past[key] = self._moment.step
            if len(self._past) > PAST:
                # The start is kept: weights that are initialised again are set back to it.
                start = next(iter(self._past))
                kept = self._past.pop(start)
                self._past.popitem(last=False)
                self._past[start] = kept
                self._past.move_to_end(start, last=False)

    def evaluated(self) -> None:
        """The model was called without gradients."""
        if self._after is not None and self._at_evaluation is None and self._place() == self._home:
            self._at_evaluation = self._values() if self._on_host else []

    def training_call(self) -> None:
        """The model is called in training: are the weights what the step left?"""
        if self._read == 1 and self._after is not None and self._one() == self._after:
            self._after = self._before = None
            return
        if self._place() != self._home:
            self._start()  # converted or moved by the loop: not other weights
        after, self._after = self._after, None
        if after is None:
            return
        if self._on_host:
            now, before = self._values(), self._before
            if now != after:
                self._changed(after, now)
                if before is not None and len(before) == len(after) == SOME:
                    self._taken_back += share_taken_back(self._samples, before, after, now)
            self._before = now
        elif [s.parameter._version for s in self._samples] != self._versions and len(self._away) < CHANGES_KEPT:
            self._away.append((self._moment.step, after, self._values(), self._at_evaluation is not None))

    def _changed(self, after: list[Any], now: list[Any]) -> None:
        at_evaluation, names = self._at_evaluation, []
        for s, before, value in zip(self._samples, after, now, strict=False):
            if before != value:
                names.append(self._names.get(id(s.parameter), ""))
        back = self._past.get(tuple(now))
        self._keep(self._moment.step, names, at_evaluation == now, back)

    def _keep(self, step: int, names: list[str], evaluated: bool, back: int | None) -> None:
        self._times += 1
        change = OutsideChange(step, tuple(n for n in names if n), evaluated, back)
        if len(self._changes) >= CHANGES_KEPT:
            self._changes.pop(CHANGES_KEPT // 2)
        self._changes.append(change)
        if self._times <= 3:
            self._moment.news(("weights changed", self._times), "outside")

    @property
    def times(self) -> int:
        """How often weights were changed."""
        return self._times

    @property
    def taken_back(self) -> tuple[float, ...]:
        """Of the last of these changes, the share of the step before that each took back."""
        return tuple(self._taken_back)

    def facts(self) -> tuple[OutsideChange, ...]:
        """The first and the last changes; what is on a device is compared now."""
        waiting, self._away = self._away, []
        for step, after, now, evaluated in waiting:
            pairs = zip(self._samples, after, now, strict=False)
            names = [self._names.get(id(s.parameter), "") for s, a, b in pairs if not torch.equal(a, b)]
            if names:
                self._keep(step, names, evaluated, None)
        return tuple(self._changes)


def share_taken_back(samples: Sequence[Sample], before: Any, after: Any, now: Any) -> list[float]:
    """The share of a step from `before` to `after` that is taken back in `now`: the smallest over the entries that
    the step moved. None where any of these is exactly what it was, as where rows are restored or masked, or has too
    few digits to tell."""
    shares: list[float] = []
    for sample, *values in zip(samples, before, after, now, strict=True):
        if not all(isinstance(v, bytes) for v in values) or sample.parameter.dtype is torch.bfloat16:
            return []
        kind = str(sample.parameter.dtype).removeprefix("torch.")
        a, b, c = (numpy.frombuffer(v, kind).astype(float) for v in values)
        moved = a != b
        if (a[moved] == c[moved]).any():
            return []
        shares += ((b - c)[moved] / (b - a)[moved]).tolist()
    return [min(shares)] if shares else []


def sample_of(p: nn.Parameter) -> Sample:
    """A reader of a few entries of the parameter, evenly spaced."""
    detached = p.detach()
    flat = detached.view(-1) if type(detached) is Tensor and detached.is_contiguous() else None
    if flat is None or not p.is_cpu or p.dtype is torch.bfloat16:
        return Sample(p, p.data_ptr(), _slow_reader(p))
    return Sample(p, p.data_ptr(), _some_of(flat).numpy().tobytes)


def _some_of(flat: Tensor) -> Tensor:
    """A view of the entries that are read."""
    first, apart = (int(share * len(flat)) for share in (FIRST_ENTRY, TO_NEXT_ENTRY))
    return flat[first :: max(apart, 1)][:NUMBERS_OF_EACH]


def _slow_reader(p: nn.Parameter) -> Callable[[], Any]:
    def read() -> Any:
        flat = getattr(p, "to_local", p.detach)().detach().reshape(-1)  # of a sharded one its own part
        some = _some_of(flat).clone(memory_format=torch.contiguous_format)
        bits = some.view(torch.uint8)  # not as numbers: NaN is not equal to itself
        return bits.numpy().tobytes() if p.is_cpu else bits

    return read
