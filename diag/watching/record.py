"""What a watcher writes, and what it does when writing fails: it says so once and lets the training go on."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diag.result import Outcome
from diag.run.rows import row_columns, row_dtype
from diag.run.run import RunWriter
from diag.watching.guard import Clock
from diag.watching.observe.rows import Row

COST_EVERY = 1.0  # seconds between two records of the time spent


class Recorder:
    """Writes to the run in the folder `path`; to nothing where `path` is None."""

    def __init__(self, path: Path | None, about: Mapping[str, Any], resume: bool | int) -> None:
        self._writer = None if path is None else RunWriter(path, about, resume)
        self.last_step = 0 if self._writer is None else self._writer.last_step
        self._dtype = row_dtype(row_columns(len(about["layers"]))) if self._writer is None else self._writer.dtype
        self._step = self.last_step
        self._noted: set[str] = set()
        self._wall = self._ours = self._always = self._checks = 0.0
        self._failed: Exception | None = None
        self._process = os.getpid()

    @property
    def dtype(self) -> Any:
        """The NumPy dtype of a row of steps."""
        return self._dtype

    def row(self, table: Any, row: Row) -> None:
        """Append a finished step."""
        self._step = int(table["steps"][0])
        self._try("append_table", table)
        if row.optimizer:
            self._try("append_optimizer", row.optimizer)

    def outcome(self, step: int, outcome: Outcome, seconds: float) -> None:
        """Append what an instrument gave."""
        self._try("append_outcome", step, outcome, seconds)

    def event(self, step: int, kind: str, text: str) -> None:
        """Append something that happened."""
        self._try("append_event", step, kind, text)

    def note(self, key: str, sentence: str) -> None:
        """Append, once for each key, what a reader must know before relying on the run."""
        self._once("note", key, sentence)

    def info(self, key: str, sentence: str) -> None:
        """Append, once for each key, how the run is observed and measured where that is as it should be."""
        self._once("info", key, sentence)

    def _once(self, kind: str, key: str, sentence: str) -> None:
        if key not in self._noted:
            self._noted.add(key)
            self.event(self._step, kind, sentence)

    def internal_error(self, step: int, part: str, error: Exception) -> None:
        """Append, once for each part, that diag itself failed in it."""
        if f"error in {part}" not in self._noted:
            self._noted.add(f"error in {part}")
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            what = f"{type(error).__name__}: {error}; {place}"
            self.event(step, "internal error", f"diag failed to observe {part} ({what}); training is not affected.")

    def cost(self, step: int, clock: Clock, at_least: float = COST_EVERY) -> None:
        """Append the time that has passed and the part that was ours, about once a second."""
        wall = clock.elapsed()
        if wall - self._wall >= at_least:
            ours, always, checks = clock.ours(), clock.overhead(), clock.checking
            self._try(
                "append_cost",
                step,
                wall_seconds=wall - self._wall,
                watch_seconds=ours - self._ours,
                always_on_seconds=always - self._always,
                check_seconds=checks - self._checks,
            )
            self._wall, self._ours, self._always, self._checks = wall, ours, always, checks

    def close(self, step: int, clock: Clock) -> None:
        """Append the last costs and close the run; warn where something could not be written."""
        if self._writer is None or os.getpid() != self._process:
            return
        self.cost(step, clock, at_least=0.0)
        self._writer.close()
        if self._failed is not None:
            warnings.warn(f"The record of the watched run is not complete: {self._failed}", stacklevel=2)

    def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self._writer is None or self._failed is not None:
            return
        try:
            getattr(self._writer, method)(*args, **kwargs)
        except Exception as error:
            self._failed = error
