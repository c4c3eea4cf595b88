"""The loss of every example, as its share of the loss of all the data (see `counting`): their mean is that loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import MissingQuantity, Unsupported
from diag.snapshot.batch import COUPLED_EXAMPLES, Batch
from diag.snapshot.example_losses import example_losses
from diag.snapshot.forward import Looked, forward_pass
from diag.snapshot.objective.comparison import Comparison
from diag.snapshot.objective.counting import by_example, counted_batches, refuse_coupled
from diag.snapshot.objective.over_ranks import scale_of
from diag.snapshot.objective.own_loss import NO_LOSS, is_models_own
from diag.snapshot.objective.shares import Counted
from diag.snapshot.parameters import copy_with
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot
from diag.snapshot.state.python import renew

OWN_LOSS = (
    "the model gives its own loss, a mean over the batch, which shows no single example's; give loss_fn= for that: "
    "loss_fn(outputs, targets)."
)


def losses(snapshot: Snapshot) -> Tensor:
    """Each example's share of the loss, floating tensor (m,), whose mean is the loss of all the data.

    That is the example's loss alone where all count alike. Raises MissingQuantity without a loss, InvalidInput
    where loss_fn gives no number, Unsupported where the examples have no losses of their own.
    """
    if snapshot.together is None:
        return _own_losses(snapshot)
    scale = scale_of(snapshot, snapshot.together)
    return snapshot.all_rows(lambda: _own_losses(snapshot) * scale, "losses")


def _own_losses(snapshot: Snapshot) -> Tensor:
    with preserved(snapshot.model), torch.no_grad():
        rows = zip(forward_pass(snapshot).looked, counted_batches(snapshot), strict=True)
        return torch.cat([loss_shares(snapshot, seen, batch) for seen, batch in rows])


def previous_losses(snapshot: Snapshot) -> Tensor:
    """The losses (m,) of the snapshot's `previous` state on the same data."""
    state = snapshot.previous
    if state is None:
        raise MissingQuantity("the snapshot has no earlier state; give it previous= a state dict or a Snapshot.")
    earlier = copy_with(snapshot.model, state, "previous")
    return losses(snapshot.with_data(snapshot.batches, model=earlier))


def loss_shares(snapshot: Snapshot, seen: Looked, batch: Batch) -> Tensor:
    """Each example's share of the loss (m,), of what was seen of a batch; raises what `losses` does."""
    if seen.value is None:
        snapshot.batch_loss(seen.outputs, batch.targets)  # raises the reason
        raise MissingQuantity(NO_LOSS)
    if batch.coupled and not batch.why:
        raise Unsupported(COUPLED_EXAMPLES)
    values = shares_from_rows(seen, batch)
    if values is not None:
        return values.to(seen.value.dtype)
    if snapshot.loss_fn is None or is_models_own(snapshot.loss_fn):
        raise MissingQuantity(OWN_LOSS)
    values = example_losses(loss_as_seen(snapshot), seen.outputs, batch.targets, batch.size)
    share = float(batch.targets.shares.mean()) if isinstance(batch.targets, Counted) else 1.0
    refuse_coupled(share * float(seen.value.double().mean()), values)
    return values


def loss_as_seen(snapshot: Snapshot) -> Callable[[Any, Any], Tensor]:
    """The loss of a batch, each time as at the first call: what a loss keeps between calls is put back."""
    if not isinstance(snapshot.loss_fn, nn.Module):
        return snapshot.batch_loss

    def loss(outputs: Any, targets: Any) -> Tensor:
        renew(snapshot.model)
        return snapshot.batch_loss(outputs, targets)

    return loss


def shares_from_rows(seen: Looked, batch: Batch) -> Tensor | None:
    """Each example's share of the loss (m,) from the rows that a loss function's call compares, if it is that."""
    found = seen.comparison
    if not isinstance(found, Comparison) or not found.exact or found.weights is None:
        return None
    sums, counts = by_example(found.row_losses(found.logits), batch.size), by_example(found.weights, batch.size)
    if sums is None or counts is None:
        return None
    alone = torch.where(counts > 0, sums / counts.clamp_min(1e-300), 0).to(found.logits.device)
    return alone * batch.targets.shares.to(alone) if isinstance(batch.targets, Counted) else alone


def errors_of(seen: Looked, size: int) -> Tensor:
    """The share of wrong answers in each example (one answer, or one a position), (size,); NaN where unknown."""
    found = seen.comparison
    if not isinstance(found, Comparison):
        return torch.full((size,), torch.nan, dtype=torch.float64)
    wrong = by_example((found.logits.argmax(1) != found.labels) & found.counted, size)
    answers = by_example(found.counted, size)
    if wrong is None or answers is None:
        return torch.full((size,), torch.nan, dtype=torch.float64)
    return wrong / answers.clamp_min(1)
