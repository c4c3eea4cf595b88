"""What the callbacks of all trainers share: begin a watch, resume it after a restart, pass on numbers, end it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diag.errors import RunError
from diag.run.reading import read_run
from diag.watching.watcher import Watcher, watch


class Watching:
    """A watch that a trainer's callback begins and ends. `options` are those of `diag.watch`."""

    def __init__(self, run: str | Path | None, options: Mapping[str, Any]) -> None:
        self.run, self.options = run, dict(options)
        self.watcher: Watcher | None = None
        self._ended_at = 0

    @property
    def last_step(self) -> int:
        """The last step of the watch, or of the one that has ended."""
        return self._ended_at if self.watcher is None else self.watcher.last_step

    def begin(self, model: Any, step: int, **more: Any) -> None:
        """Watch `model`; after `step` steps of an earlier process the run in the folder goes on there."""
        if self.watcher is None:
            arguments = {"resume": self._resume(step)} | more | self.options
            self.watcher = watch(model, run=self.run, **arguments)

    def _resume(self, step: int) -> bool | int:
        if not step or self.run is None:
            return False
        try:
            last = read_run(Path(self.run)).last_step
        except RunError:
            return False
        return min(step, last)

    def log(self, values: Mapping[str, Any]) -> None:
        """The finite numbers among `values` go into the run, at the step of the watch."""
        if self.watcher is not None:
            numbers = {name: number for name, value in values.items() if (number := one_number(value)) is not None}
            if numbers:
                self.watcher.log(**numbers)

    def end(self) -> None:
        """Close the watch; may be called twice."""
        watcher, self.watcher = self.watcher, None
        if watcher is not None:
            self._ended_at = watcher.last_step
            watcher.close()


def one_number(value: Any) -> float | None:
    """A number, or a tensor of one, as a finite float; None for anything else."""
    if isinstance(value, bool) or getattr(value, "ndim", 0) not in (0, None):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
