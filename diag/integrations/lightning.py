"""A callback for Lightning: `Trainer(callbacks=[LightningCallback("runs/mine")])`.

It watches the module from the start of the fit to its end, takes the first validation batches of the sanity check
as held-out data, records what is logged, and continues the run when the fit is resumed from a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diag.integrations.callback import Watching

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:  # the same classes under their older name
    from pytorch_lightning.callbacks import Callback

HELD_OUT_EXAMPLES = 256


class LightningCallback(Callback):
    """Watches the fit into the folder `run`; `options` are those of `diag.watch`.

    watcher: the watch while it runs; afterwards `diag.load(run)` has the record.
    """

    def __init__(self, run: str | Path | None = None, **options: Any) -> None:
        super().__init__()
        self._watching = Watching(run, options)
        self._held_out: list[Any] = []
        self._resumed_at = 0

    @property
    def watcher(self) -> Any:
        """The watch, once training has begun."""
        return self._watching.watcher

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before training begins, the sanity check shows validation data: kept, so that no loader is read twice."""
        enough = sum(len(inputs) for inputs, _ in self._held_out) >= HELD_OUT_EXAMPLES
        if trainer.sanity_checking and dataloader_idx == 0 and not enough and _is_pair(batch):
            self._held_out.append((batch[0].detach().clone(), batch[1].detach().clone()))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The watch begins."""
        held_out = {"held_out": self._held_out} if self._held_out else {}
        self._watching.begin(pl_module, self._resumed_at, **held_out)
        self._held_out = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The metrics of the trainer are recorded."""
        self._watching.log(trainer.callback_metrics)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The metrics of the trainer are recorded."""
        if not trainer.sanity_checking:
            self._watching.log(trainer.callback_metrics)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The watch is closed."""
        self._watching.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The watch is closed."""
        self._watching.end()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the trainer keeps of the watch."""
        return {"step": self._watching.last_step or self._resumed_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._resumed_at = int(state_dict.get("step", 0))


def _is_pair(batch: Any) -> bool:
    """Whether a batch is (inputs, labels), both tensors of as many examples."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return False
    sizes = [getattr(part, "shape", ())[:1] for part in batch]
    return bool(sizes[0]) and sizes[0] == sizes[1]
