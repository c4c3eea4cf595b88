"""The one moment that a snapshot is of: whether model, loss function and data are still as they were then."""

from __future__ import annotations

from typing import Any

from torch import nn

from diag.errors import InvalidInput
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.state.bits import TensorBits, bits_of
from diag.snapshot.state.tensors import is_checked

MODEL_MOVED = (
    "{} has changed since the snapshot was made, so its quantities would mix two moments; make a new Snapshot (of "
    "a copy of the model, to keep it while training goes on)."
)
DATA_MOVED = (
    "The data have changed since the snapshot read them, by other code or by a model that writes into its inputs, "
    "so its quantities would mix two moments; give it a copy of the data, and a model that leaves its inputs as "
    "they are."
)


class MomentOfSnapshot:
    """The bits of a model and a loss function now, and of the data once it was read (`read`)."""

    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        self._model, self._bits = model, TensorBits(model, loss_fn)
        self._moved = ""  # what had moved when a measurement began
        self._data: list[Any] | None = None

    def read(self, batches: tuple[Batch, ...]) -> None:
        """The data have been read."""
        self._data = bits_of_batches(batches)

    def data_from(self, other: MomentOfSnapshot) -> None:
        """The data are those that another snapshot has read."""
        self._data = other._data

    def measurement_begins(self) -> None:
        """Looks now, before the model is called: what is written to from here on is put back."""
        if not is_checked(self._model):
            self._moved = self._bits.changed()

    def refuse_later(self, batches: tuple[Batch, ...] | None) -> None:
        """Raise InvalidInput where the model, the loss or the data (None: not read yet) have changed since."""
        if name := self._moved if is_checked(self._model) else self._bits.changed():
            raise InvalidInput(MODEL_MOVED.format(name[0].upper() + name[1:]))
        if batches is not None and bits_of_batches(batches) != self._data:
            raise InvalidInput(DATA_MOVED)


def bits_of_batches(batches: tuple[Batch, ...]) -> list[Any]:
    """What tells the tensors of the batches from others (see `bits_of`)."""
    return [bits_of(t) for b in batches for t in tensors_in((b.args, b.kwargs, b.targets))]
