"""Losses of the probe set over consecutive optimizer steps, for the instruments that declare a `StepWindow`.

Where the record is not required, the first measurement needs none; later ones record a window where the steps
use the same examples again and again (in mini-batch training the noise of the batches is in the changes, and
nothing can be judged). A window is a forward pass over the probe set after each of its steps, and what the
instrument's record measures at its two ends; all of it is charged to the instrument.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import inf, nan
from typing import Any

from diag.registry import Instrument, StepRecording, StepWindow
from diag.snapshot.snapshot import Snapshot
from diag.watching.measure.schedule import MeasurementSchedule
from diag.watching.observe.examples import StepExamples

WINDOW_FAILURES = 2
STEADY = 1e-2  # relative (our choice): a term that is added to the loss moves their ratio by more
MINI_BATCHES = (
    "Steps are taken on different mini-batches, so {} judges no oscillation from step to step; {} records the "
    "steps all the same."
)
WINDOW_GIVEN_UP = "The window of steps that {} was recording was given up at step {:,} ({})."


@dataclass
class Window:
    """A window that is open: what has been recorded and the seconds that it took."""

    name: str
    length: int
    recording: StepRecording
    seconds: float


class Windows:
    """Decides when a window is recorded, records it, and hands out its record.

    note(key, sentence): tell once what went wrong. info(key, sentence): tell once how it is done. measuring(
    snapshot): what to measure inside of.
    """

    def __init__(
        self,
        instruments: Mapping[str, Instrument],
        settings: Mapping[str, Mapping[str, Any]],
        schedule: MeasurementSchedule,
        note: Callable[[str, str], None],
        info: Callable[[str, str], None],
        measuring: Callable[[Snapshot], AbstractContextManager[Any]],
    ) -> None:
        self._declared: dict[str, StepWindow] = {}
        self._lengths: dict[str, int] = {}
        self._always: set[str] = set()
        for name, window in ((n, i.window) for n, i in instruments.items() if i.window is not None):
            chosen = instruments[name].all_settings(settings.get(name, {}))
            if (length := window.length(chosen)) >= window.least:
                self._declared[name], self._lengths[name] = window, length
                self._always |= {name} if window.required(chosen) else set()
        self._schedule, self._note, self._info, self._measuring = schedule, note, info, measuring
        self.examples = StepExamples()
        self.open: Window | None = None
        self.forward = 0.0  # seconds that one forward pass over the probe set takes
        self._failures: dict[str, int] = {}
        self._recorded: set[str] = set()  # those whose last measurement had a record

    def choose(self, names: Iterable[str]) -> tuple[list[str], str | None]:
        """Of the measurements that are due and paid for, those to make now, and one to open a window for."""
        now, opening = [], None
        for name in names:
            if name not in self._lengths:
                now.append(name)
            elif self.open is None and opening is None:
                choice = self._choice(name)
                opening = name if choice == "window" else None
                now += [name] if choice == "now" else []
        return now, opening

    def _choice(self, name: str) -> str:
        account, always = self._schedule.accounts[name], name in self._always
        if not always and account.times == 0:
            return "now"
        if self._schedule.left < 2 * account.estimate + self._lengths[name] * self.forward:
            return "wait"
        self.examples.look(True)
        same = self.examples.same(2)
        if same is None and not always:
            return "wait"
        if same or always:
            return "window"
        self._give_up(name, MINI_BATCHES.format(name, self._declared[name].insist))
        return "now"

    def begin(self, name: str, step: int, snapshot: Snapshot) -> float:
        """Open a window at `step`; gives the time taken, in seconds."""
        began = time.perf_counter()
        try:
            with self._measuring(snapshot):
                recording = self._declared[name].begin(snapshot, step)
                self.open = Window(name, self._lengths[name], recording, 0.0)
            self._schedule.postpone(name, inf)
        except Exception as error:
            self._failed(name, step, error)
        return self._paid(name, time.perf_counter() - began)

    def add(self, step: int, snapshot: Snapshot) -> float:
        """The losses after another step; gives the time taken, in seconds."""
        window, began = self.open, time.perf_counter()
        assert window is not None
        try:
            with self._measuring(snapshot):
                window.recording.add(snapshot, step)
        except Exception as error:
            self.drop(step, error)
        seconds = time.perf_counter() - began
        if window.recording.num_steps > 1:  # at the first the sharpness is measured too
            self.forward = seconds
        return self._paid(window.name, seconds)

    @property
    def complete(self) -> bool:
        """Whether the open window has all its steps."""
        return self.open is not None and self.open.recording.num_steps >= self.open.length

    def end(self) -> None:
        """No step follows: what was recorded is judged where it is enough, else dropped."""
        if self.open is not None:
            self._schedule.postpone(self.open.name, self.open.recording.last_step)
            if not self.usable(self.open.name):
                self.open = None

    def usable(self, name: str) -> bool:
        """Whether the open window is of this instrument and long enough to be judged."""
        if self.open is None or self.open.name != name:
            return False
        return self.open.recording.num_steps >= self._declared[name].least

    def needs_record(self, name: str) -> bool:
        """Whether this instrument measures nothing without a record."""
        return name in self._always

    def shorten(self, name: str) -> str:
        """How a user asks for a shorter window of this instrument."""
        return self._declared[name].shorten

    def close(self, snapshot: Snapshot) -> tuple[dict[str, Any], float]:
        """The record of the open window as a quantity by name (none where it is unavailable) and the seconds that
        all of it took."""
        window, began = self.open, time.perf_counter()
        assert window is not None
        record, steps = None, window.recording.num_steps
        try:
            with self._measuring(snapshot):
                same = bool(self.examples.same(steps))
                factor = float(getattr(snapshot.loss_fn, "factor", 1.0))
                record = window.recording.finish(snapshot, same, self._loss_scale(window.recording, factor))
        except Exception as error:
            self.drop(window.recording.last_step, error)
        self._paid(window.name, time.perf_counter() - began)
        self._closed(window)
        self._recorded |= {window.name} if record is not None else set()
        return ({self._declared[window.name].quantity: record} if record is not None else {}), window.seconds

    def without_record(self, name: str) -> None:
        """This instrument is measured now, without a record."""
        self._recorded.discard(name)

    def is_enough(self, name: str) -> bool:
        """Whether, at the end, a record that was judged just before says more than a kick now would."""
        return name in self._recorded and not self.usable(name)

    def _loss_scale(self, recording: StepRecording, factor: float) -> float:
        """How many times the recorded mean loss training descends; NaN where that changes from step to step.

        factor: that of the loss which was recorded.
        """
        seen, means = self.examples.losses(recording.num_steps), recording.losses.double().mean(1)[:-1]
        # A probe set that holds the step's examples shows what they share; else the loss function's own value does.
        loss = means if self.examples.per_step == recording.losses.shape[1] else factor * seen[:, 0]
        scale = seen[:, 1] / loss
        median = float(scale.median())
        steady = bool(((scale - median).abs() <= STEADY * abs(median)).all())
        return (1.0 if abs(median - 1) <= STEADY else median) if steady else nan

    def drop(self, step: int, error: Exception | str) -> None:
        """Give the open window up."""
        window = self.open
        if window is not None:
            self._closed(window)
            self._failed(window.name, step, error)

    def _closed(self, window: Window) -> None:
        self.open = None
        self.examples.look(False)
        self._schedule.postpone(window.name, window.recording.last_step + 1)

    def _failed(self, name: str, step: int, error: Exception | str) -> None:
        self._failures[name] = self._failures.get(name, 0) + 1
        self._note(f"window of {name}", WINDOW_GIVEN_UP.format(name, step, str(error).rstrip(".")))
        if self._failures[name] >= WINDOW_FAILURES:
            self._give_up(name)

    def _give_up(self, name: str, why: str = "") -> None:
        del self._lengths[name]
        self._always.discard(name)
        self.examples.look(False)
        if why:
            self._info(f"windows of {name}", why)

    def _paid(self, name: str, seconds: float) -> float:
        self._schedule.pay(seconds)
        if self.open is not None and self.open.name == name:
            self.open.seconds += seconds
        return seconds
