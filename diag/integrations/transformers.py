"""A callback for the Trainer of transformers: `Trainer(..., callbacks=[HuggingFaceCallback("runs/mine")])`.

It watches the model from the start of the training to its end, records what the trainer logs and evaluates, and
continues the run when the training is resumed from a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from diag.integrations.callback import Watching


class HuggingFaceCallback(TrainerCallback):
    """Watches the training into the folder `run`; `options` are those of `diag.watch`, `held_out=` among them."""

    def __init__(self, run: str | Path | None = None, **options: Any) -> None:
        self._watching = Watching(run, options)

    @property
    def watcher(self) -> Any:
        """The watch, once training has begun."""
        return self._watching.watcher

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """The watch begins."""
        self._watching.begin(model, int(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """What the trainer logs is recorded."""
        self._watching.log(logs or {})

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The watch is closed."""
        self._watching.end()
