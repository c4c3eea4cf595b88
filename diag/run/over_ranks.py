"""Who measures a checkpoint: one process all of it, or the ranks of torch.distributed their shares.

Under torchrun every rank builds the same model and data, and loads the same checkpoint. What goes through the data
again and again (curvature, gradients of examples, networks between two) they measure together, each on its share.
All else rank 0 measures alone on all the data; where the build function gave each rank other data, what can be put
together is, and the rest is refused with that reason. Of a model that is sharded each takes a whole copy where
there is room for it; else the weights of one layer at a time are gathered, and only what can be put together of
them is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from diag.checkpoints.unwrap import bare_model
from diag.distributed.together import Together
from diag.linalg.deadline import free_memory
from diag.registry import Instrument, attempt, is_put_together, requires
from diag.result import Outcome, Skipped
from diag.snapshot.reading.data import all_alike
from diag.snapshot.sharded.chosen_model import is_gathered_by_layer
from diag.snapshot.sharded.whole import is_sharded, whole_copy
from diag.snapshot.snapshot import Snapshot
from diag.snapshot.validation import BY_LAYER

SHARED_WORK = ("hessian", "gauss_newton", "per_example_gradients", "interpolation")  # many passes over the data
APART = (
    "Each rank was given different data, which this measurement cannot combine; let the build function give every "
    "rank all of the data, and the ranks divide it themselves."
)
IN_PARTS_ONLY = (
    "This measurement is not put together over ranks, and no rank holds the whole network to make it alone; where "
    "a whole copy fits on each rank, leave out ranks='by_layer'."
)


class OneProcess:
    """Measures everything by itself. arguments: of `Snapshot`, without the model."""

    leads = True  # whether this process reports what is found
    takes_previous = True  # whether it can take the state before

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        self._model, self._arguments = model, dict(arguments)
        self._snapshot: Snapshot | None = None

    def load(self, call: Callable[[], object]) -> None:
        """Call what loads a checkpoint into the model."""
        call()

    def begin(self, previous: Any) -> None:
        """A checkpoint has been loaded into the model; previous: the state before it."""
        self._snapshot = Snapshot(self._model, **{**self._arguments, "previous": previous})

    def measure(self, instrument: Instrument, settings: Mapping[str, Any]) -> Outcome | None:
        """What an instrument gives on that checkpoint; None where another rank reports it."""
        return attempt(self._snapshot, instrument, **settings)

    def loss(self) -> float:
        """The mean loss, on the held-out data where there is some; NaN where there is none."""
        return self._mean_loss(self._snapshot)

    def _mean_loss(self, snapshot: Snapshot | None) -> float:
        quantity = "held_out_losses" if self._arguments.get("held_out") is not None else "losses"
        try:
            assert snapshot is not None
            return float(snapshot.quantity(quantity).double().mean())
        except Exception:  # whatever the user's model or loss raises is reported by the instruments
            return math.nan


class AllRanks(OneProcess):
    """Every rank makes the same calls."""

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__(model, arguments)
        chosen, arguments = self._arguments.pop("ranks", None), self._arguments
        device = torch.device(arguments.get("device") or next(p.device for p in model.parameters()))
        self._together = Together(device)
        self.leads = self._together.rank == 0
        has_data = arguments.get("data") is not None
        self._apart = has_data and not all_alike(Snapshot(model, **arguments).batches, self._together)
        self._shared: Snapshot | None = None
        bare = bare_model(model)
        self._by_layer = is_sharded(bare) and is_gathered_by_layer(bare, chosen, self._together)
        self.takes_previous = not self._by_layer

    def load(self, call: Callable[[], object]) -> None:
        """On every rank; each may read parts of its own, and where one cannot all stop."""
        self._together.all_succeed(call)

    def begin(self, previous: Any) -> None:
        """A checkpoint has been loaded on every rank."""
        model, together = self._model, self._together
        if self._by_layer:
            self._shared = Snapshot(model, **self._arguments, ranks=BY_LAYER)
            return
        if is_sharded(model):
            model = whole_copy(model, together, free_memory(together.device)).model
            previous = previous and {n: _whole(value, together) for n, value in previous.items()}
        arguments = {**self._arguments, "previous": previous}
        self._snapshot = Snapshot(model, **arguments)
        self._shared = Snapshot(model, **arguments, ranks=together)

    def measure(self, instrument: Instrument, settings: Mapping[str, Any]) -> Outcome | None:
        """What an instrument gives; None on all ranks but the first."""
        if self._by_layer:
            together = is_put_together(instrument)
            outcome = (
                attempt(self._shared, instrument, **settings)
                if together
                else Skipped(instrument.name, IN_PARTS_ONLY)
            )
            return outcome if self.leads else None
        if is_put_together(instrument) and (self._apart or requires(instrument, *SHARED_WORK)):
            outcome = attempt(self._shared, instrument, **settings)
            return outcome if self.leads else None
        if self._apart:
            return Skipped(instrument.name, APART) if self.leads else None
        return super().measure(instrument, settings) if self.leads else None

    def loss(self) -> float:
        """Rank 0's, on every rank; where no rank has all weights, that of all ranks."""
        if self._by_layer:
            return self._mean_loss(self._shared)
        return self._together.total(super().loss() if self.leads else 0.0)


def _whole(value: Any, together: Together) -> Any:
    return together.filled(value, together.own_block(value)) if isinstance(value, torch.Tensor) else value
