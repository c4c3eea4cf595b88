"""Checks that need nothing but the record of the steps and the facts of the loop, judged during training.

They cost microseconds to milliseconds and no pass of the model, so they have no place in the schedule of the
measurements: they are judged at the floor (steps 1, 2, 3, 5, 7, 10, 14, 20, 30, 100, ... and the last), and between
as far as `SHARE_FOR_CHECKS` of the time pays for them. When something happened that none of them has judged
(`news`), those that have read the facts that it is in are judged at once. A check of the facts of the loop alone is
not asked again where nothing that it read has changed. A finding is announced the first time that it is seen; what
is computed from the record alone is not kept, as opening the run computes it again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.registry import Instrument, attempt
from diag.result import Failed, Outcome, Result, Verdict
from diag.run.rows import history_of
from diag.snapshot.history import History
from diag.watching.measure.floor import next_floor
from diag.watching.measure.reads import Reads
from diag.watching.observe.loop.moment import ANY_FACT

SHARE_FOR_CHECKS = 0.005  # of the time since training began
FIRST_JUDGED_STEPS = (1, 2, 3, 5, 7, 10, 14, 20)  # where most of what goes wrong first shows
RECENT_ROWS = 512  # rows kept in memory: so many last ones, and at most as many of those before, every 2^k-th
MEMORY = 16 << 20  # bytes that these rows may take
CHECK_FAILURES = 3


def is_floor(step: int) -> bool:
    """Whether the checks are judged at `step` whatever it costs: 1, 2, 3, 5, 7, 10, 14, 20, 30, 100, 300, ..."""
    return step in FIRST_JUDGED_STEPS or next_floor(step - 1) == step


class Trace:
    """The rows of the record in bounded memory: the last ones whole, and the earlier ones thinned evenly."""

    def __init__(self, dtype: numpy.dtype[Any]) -> None:
        rows = max(min(RECENT_ROWS, MEMORY // (2 * dtype.itemsize)), 16)
        assert dtype.fields is not None
        self._dtype, self._finite_at = dtype, dtype.fields["loss_finite"][1]  # the latter in a row's bytes
        self._recent: deque[bytes] = deque(maxlen=rows)
        self._earlier: list[bytes] = []
        self._room, self._stride, self._passed = rows, 1, 0
        self._first_lost: bytes | None = None  # the first row whose loss is no finite number, which is kept

    def add(self, table: NDArray[Any]) -> None:
        """Keep a finished row (a table of one row, which is copied)."""
        if len(self._recent) == self._recent.maxlen:
            self._keep(self._recent[0])
        self._recent.append(table.tobytes())

    def _keep(self, row: bytes) -> None:
        if self._first_lost is None and not row[self._finite_at]:  # a boolean is one byte
            self._first_lost = row
        if self._passed % self._stride == 0 or row is self._first_lost:
            self._earlier.append(row)
        self._passed += 1
        if len(self._earlier) > self._room:
            thinned = [r for i, r in enumerate(self._earlier) if i % 2 == 0 or r is self._first_lost]
            self._earlier, self._stride = thinned, 2 * self._stride

    @property
    def is_whole(self) -> bool:
        """Whether no row has been left out."""
        return self._stride == 1

    def rows(self) -> NDArray[Any] | None:
        """The rows kept, by step; None where there is none."""
        kept = [*self._earlier, *self._recent]
        # Their bytes: numpy.concatenate would compare the columns of each row with those of the others.
        return numpy.frombuffer(bytearray(b"".join(kept)), self._dtype) if kept else None


class LiveChecks:
    """Judges the checks that need the record alone, and reports each finding once.

    settings: the chosen instruments' settings by name. layers: names and sizes of the parameter tensors. facts():
    the quantities besides the history, by name (the facts of the loop). record(step, outcome, seconds): keep a
    result. announce(instrument, verdict, step): how it is judged.
    """

    def __init__(
        self,
        chosen: Mapping[str, Instrument],
        settings: Mapping[str, Mapping[str, Any]],
        layers: Mapping[str, int],
        dtype: numpy.dtype[Any],
        facts: Callable[[], Mapping[str, Any]],
        record: Callable[[int, Outcome, float], None],
        announce: Callable[[Instrument, Verdict, int], None],
    ) -> None:
        self._chosen = dict(chosen)
        self._needs = {name: {need.name for need in one.needs} for name, one in chosen.items()}
        self._settings, self._layers, self._facts = settings, layers, facts
        self._record, self._announce = record, announce
        self._trace = Trace(dtype)
        self._optimizer: Mapping[str, Any] = {}
        self._judged = self._next_floor = 0
        self._cost = self._spent = 0.0
        self._recorded: dict[str, tuple[str, str]] = {}
        self._failures: dict[str, int] = {}
        self._reads = Reads()

    def row(self, table: NDArray[Any], optimizer: Mapping[str, Any]) -> None:
        """A row of the record is complete."""
        self._trace.add(table)
        self._optimizer = optimizer or self._optimizer

    def step_ended(self, step: int, elapsed: float, news: Collection[str]) -> None:
        """Judge where it is due; `elapsed`: seconds since training began; news: the facts of the loop with which
        not to wait for a due step."""
        if not self._chosen:
            return
        if (step <= FIRST_JUDGED_STEPS[-1] or step >= self._next_floor) and is_floor(step):
            self._next_floor = next_floor(step)
            self.judge(step)
        elif self._spent + self._cost <= SHARE_FOR_CHECKS * elapsed:
            self.judge(step)
        elif news:
            self.judge(step, news=news)

    def judge(self, step: int, last: bool = False, news: Collection[str] = ()) -> None:
        """Judge all of them now, or those alone that read these facts, to which come those in which there is news
        once they are collected; `last`: the results are recorded whether or not anything is new in them."""
        if step == self._judged and not last:
            return
        began = time.perf_counter()
        self._judged = step
        loop_facts = dict(self._facts())
        if (loop := loop_facts.get("loop")) is not None:
            self._reads.begin(loop)
        for name, instrument in self._chosen.items():
            if self._failures.get(name, 0) < CHECK_FAILURES and (last or self._may_differ(name, news)):
                self._judge(instrument, step, loop_facts, last)
        seconds = time.perf_counter() - began
        self._spent += seconds
        if not news:
            self._cost = seconds

    def _may_differ(self, check: str, news: Collection[str]) -> bool:
        """Whether the check may say something else than it did; of news, only what that changes."""
        needs = self._needs[check]
        if not news:
            return needs != {"loop"} or self._reads.has_news(check)
        return "loop" in needs and self._reads.has_news(check, () if ANY_FACT in news else news)

    def _judge(self, instrument: Instrument, step: int, loop_facts: dict[str, Any], last: bool) -> None:
        began = time.perf_counter()
        name = instrument.name
        outcome = attempt(
            None, instrument, **self._settings.get(name, {}), **self._quantities(instrument, loop_facts)
        )
        seconds = time.perf_counter() - began
        if isinstance(outcome, Failed):
            self._failures[name] = self._failures.get(name, 0) + 1
            self._record(step, outcome, seconds)
        elif isinstance(outcome, Result):
            self._tell(instrument, outcome, step, seconds, last)

    def _quantities(self, instrument: Instrument, loop_facts: dict[str, Any]) -> dict[str, Any]:
        """What the check needs of these; the history is made for the first one that asks."""
        names = self._needs[instrument.name]
        if "history" in names and "history" not in loop_facts:
            loop_facts["history"] = self._history()
        found = {name: loop_facts[name] for name in names if loop_facts.get(name) is not None}
        if "loop" in found:
            found["loop"] = self._reads.facts_for(instrument.name)
        return found

    def _tell(self, instrument: Instrument, result: Result, step: int, seconds: float, last: bool) -> None:
        verdict, name = result.verdict(), instrument.name
        state = (str(verdict.level), verdict.cause)
        if not instrument.from_history and (last or state != self._recorded.get(name)):
            self._recorded[name] = state
            self._record(step, result, seconds)
        self._announce(instrument, verdict, step)

    @property
    def whole_history(self) -> History | None:
        """All rows so far, where none has been left out and there is any."""
        return self._history() if self._trace.is_whole else None

    def _history(self) -> History | None:
        rows = self._trace.rows()
        if rows is None:
            return None
        optimizer = [{"type": "optimizer", "data": dict(self._optimizer)}] if self._optimizer else []
        return history_of({"layers": self._layers}, rows, optimizer)
