"""The outputs of a model at an earlier state, on the same data."""

from __future__ import annotations

from torch import Tensor

from diag.errors import MissingQuantity
from diag.snapshot.parameters import copy_with
from diag.snapshot.pass_quantities import logits
from diag.snapshot.snapshot import Snapshot


def earlier(snapshot: Snapshot) -> Snapshot:
    """A snapshot of the `previous` state. Raises MissingQuantity where there is none."""
    state = snapshot.previous
    if state is None:
        raise MissingQuantity("the snapshot has no earlier state; give it previous= a state dict or a Snapshot.")

    def made() -> Snapshot:
        model = copy_with(snapshot.model, state, "previous")
        return snapshot.with_data(snapshot.batches, model=model)

    return snapshot.once("earlier snapshot", made)


def previous_logits(snapshot: Snapshot) -> Tensor:
    """The logits (n, K) of the snapshot's `previous` state on the same data."""
    return logits(earlier(snapshot))
