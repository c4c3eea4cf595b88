"""What a watcher writes; where writing fails it says so at once, keeps what it can, and tries again.

Meanwhile the training continues, and the run says afterwards which part of it is incomplete.
"""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diag.errors import RunError, text_of
from diag.result import Outcome
from diag.run.rows import row_columns, row_dtype
from diag.run.writer import RunWriter
from diag.watching.guard import Clock
from diag.watching.observe.rows import Row
from diag.watching.waiting import Waiting, log_line

COST_EVERY = 1.0  # seconds between two records of the time spent
RECORD_BYTES = 500  # about what a short record takes in memory
REMOVED = (
    "The run's files were removed while it was being written and were made again from what was still open; arrays "
    "of results that had been written before are gone."
)
RUN_REPLACED = (
    "The folder of the watched run was taken over by another watch of this process, so this one records no more."
)


class Recorder:
    """Writes to the run in the folder `path`; to nothing where `path` is None."""

    def __init__(self, path: Path | None, about: Mapping[str, Any], resume: bool | int) -> None:
        self._writer = None if path is None else RunWriter(path, about, resume)
        self.last_step = 0 if self._writer is None else self._writer.last_step
        self.rates_before = () if self._writer is None else self._writer.rates_before
        self._dtype = row_dtype(row_columns(len(about["layers"]))) if self._writer is None else self._writer.dtype
        self._step = self.last_step
        self._noted: set[str] = set()
        self._wall = self._ours = self._always = self._checks = 0.0
        # Apart, so that an array that cannot be written keeps no row waiting.
        self._steps, self._results, self._others = (
            Waiting(part, self._incomplete) for part in ("steps", "results", "events")
        )
        self._replaced = self._removed = False
        self._process = os.getpid()

    @property
    def dtype(self) -> Any:
        """The NumPy dtype of a row of steps."""
        return self._dtype

    def row(self, table: Any, row: Row) -> None:
        """Append a finished step; the table may be filled again afterwards."""
        self._step = step = int(table["steps"][0])
        self._append(self._steps, step, RECORD_BYTES + table.nbytes, "append_table", table)
        if row.optimizer:
            self._append(self._others, step, RECORD_BYTES, "append_optimizer", row.optimizer)

    def outcome(self, step: int, outcome: Outcome, seconds: float) -> None:
        """Append what an instrument gave."""
        size = RECORD_BYTES + sum(getattr(value, "nbytes", 0) for value in vars(outcome).values())
        self._append(self._results, step, size, "append_outcome", step, outcome, seconds)

    def event(self, step: int, kind: str, text: str) -> None:
        """Append something that happened."""
        self._append(self._others, step, RECORD_BYTES + len(text), "append_event", step, kind, text)

    def metrics(self, values: Mapping[str, float]) -> None:
        """Append numbers of the user's own, at the last step."""
        self._append(self._others, self._step, RECORD_BYTES, "append_metrics", self._step, values)

    def note(self, key: str, sentence: str) -> None:
        """Append, once for each key, what a reader must know before relying on the run."""
        self._once("note", key, sentence)

    def info(self, key: str, sentence: str) -> None:
        """Append, once for each key, how the run is observed and measured where nothing is wrong with that."""
        self._once("info", key, sentence)

    def _once(self, kind: str, key: str, sentence: str) -> None:
        if key not in self._noted:
            self._noted.add(key)
            self.event(self._step, kind, sentence)

    def internal_error(self, step: int, part: str, error: Exception) -> None:
        """Append, once for each part, that diag itself failed in it."""
        if f"error in {part}" not in self._noted:
            self._noted.add(f"error in {part}")
            where = traceback.extract_tb(error.__traceback__)[-1:]
            place = "".join(f"; {Path(w.filename).name}:{w.lineno}" for w in where)
            what = f"{type(error).__name__}: {text_of(error)}{place}"
            self.event(step, "internal error", f"diag failed to observe {part} ({what}); training is not affected.")

    def cost(self, step: int, clock: Clock, at_least: float | None = None) -> None:
        """Append the time that has passed and the part that was ours, about once a second."""
        wall = clock.elapsed()
        if wall - self._wall >= (COST_EVERY if at_least is None else at_least):
            ours, always, checks = clock.ours(), clock.overhead(), clock.checking
            spent = (wall - self._wall, ours - self._ours, always - self._always, checks - self._checks)
            self._append(self._others, step, RECORD_BYTES, "append_cost", step, "", 0.0, *spent)
            self._look_after_files(step)
            self._wall, self._ours, self._always, self._checks = wall, ours, always, checks

    def close(self, step: int, clock: Clock) -> None:
        """Append the last costs and close the run; warn where something could not be written."""
        if self._writer is None or os.getpid() != self._process:
            return
        self.cost(step, clock, at_least=0.0)
        parts = (self._steps, self._results, self._others)
        unwritten = [part.sentence() for part in parts if not part.flush()]
        self._writer.close()
        if unwritten:
            log_line(f"The record of the watched run is not complete: {' '.join(unwritten)}")
            with contextlib.suppress(UserWarning):  # where warnings are errors
                warnings.warn(f"The record of the watched run is not complete: {' '.join(unwritten)}", stacklevel=2)

    def _append(self, part: Waiting, step: int, size: int, method: str, *arguments: Any) -> None:
        writer = self._writer
        if writer is None:
            return
        if writer.closed:
            self._say_replaced()
            return
        try:
            part.append(step, size, getattr(writer, method), *arguments)
        except Exception as error:  # it cannot be written at any time
            self.internal_error(self._step, "the record", error)

    def _say_replaced(self) -> None:
        if not self._replaced and os.getpid() == self._process:
            self._replaced = True
            log_line(RUN_REPLACED)

    def _incomplete(self, step: int, sentence: str) -> None:
        log_line(sentence)
        self.event(step, "incomplete", sentence)

    def _look_after_files(self, step: int) -> None:
        """Write files again that were removed while they are open."""
        if self._writer is None or self._writer.closed:
            return
        try:
            if self._writer.restore():
                self._incomplete(step, REMOVED)
        except RunError as error:
            if not self._removed:
                self._removed = True
                log_line(f"{error} What is recorded from now on is lost.")
