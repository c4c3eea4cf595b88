"""A tracker for Accelerate: `Accelerator(log_with=AccelerateTracker("runs/mine", model))`.

What `accelerator.log` is given goes into the run of a watch; `accelerator.end_training()` closes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from diag.integrations.callback import Watching


class AccelerateTracker(GeneralTracker):
    """Watches `model` into the folder `run`; `options` are those of `diag.watch`."""

    name = "diag"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, run: str | Path, model: Any, **options: Any) -> None:
        super().__init__()
        self._watching = Watching(run, options)
        self._model = model

    @property
    def tracker(self) -> Any:
        """The watch, as Accelerate asks for it."""
        return self._watching.watcher

    def start(self) -> None:
        """Begin the watch; `init_trackers` calls it."""
        self._watching.begin(self._model, 0)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The settings that are numbers are recorded at step 0."""
        self.start()
        self._watching.log({f"config.{name}": value for name, value in values.items()})

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        """Record numbers at the step of the watch, which counts optimizer steps; `step` is not needed."""
        self.start()
        self._watching.log(values)

    def finish(self) -> None:
        """Accelerate ends training: the watch is closed."""
        self._watching.end()
