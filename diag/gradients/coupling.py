"""Refuse a model in which examples influence each other: it has no per-example gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diag.errors import Unsupported, first_line
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.cutting import what_ties
from diag.snapshot.example_losses import LossFunction, example_losses

TIED = "The loss of example {} is {}, so examples influence each other and have no gradients of their own: {}."


def check_independent(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    losses: Tensor,
) -> None:
    """Refuse a model in which other examples in the batch change an example's loss.

    Compares the losses in this batch with those of the first examples in smaller batches. That sees batch
    statistics, sorting, attention across examples and the like, whatever their class is called.
    """
    for size in sorted({1, min(3, batch.size - 1)} - {0}):
        part = batch.slice(0, size)
        try:
            found = losses_of(model, loss_fn, part)
        except ValueError as error:  # BatchNorm on batch statistics does not take a single value per channel
            if size == 1 and batch.size > 2:
                continue
            raise Unsupported(
                f"The model cannot be run on fewer examples ({first_line(error)}), so they are not independent and "
                "have no gradients of their own: use running statistics (eval mode) or another norm."
            ) from error
        row = _differing(losses[:size], found, lambda part=part: losses_of(model, loss_fn, part))  # type: ignore[misc]
        if row is not None:
            seen = (
                f"{float(losses[row]):.6g} in a batch of {batch.size} and {float(found[row]):.6g} in one of {size}"
            )
            raise Unsupported(TIED.format(row, seen, _what_ties(model, batch, part)))


def _differing(together: Tensor, alone: Tensor, again: Callable[[], Tensor]) -> int | None:
    """The example whose loss differs most, if any does by more than rounding.

    Raises Unsupported where a second pass gives other losses, too.
    """
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(together.dtype, 5e-2)
    scale = together.abs().max().clamp_min(1e-6)
    if bool(((together - alone).abs() <= tolerance * scale).all()):
        return None
    if bool(((alone - again()).abs() > tolerance * scale).any()):
        raise Unsupported(
            "The same example gave two different losses in two forward passes, so the model draws random numbers "
            "even in evaluation mode; switch dropout and sampling off while measuring."
        )
    return int((together - alone).abs().argmax())


def _what_ties(model: nn.Module, batch: Batch, part: Batch) -> str:
    """What ties the examples, and what to do, in a clause."""
    with torch.no_grad():
        whole, few = (tensors_in(b.forward_on_copies(model)) for b in (batch, part))
    of_all = [(a, b) for a, b in zip(whole, few, strict=False) if not a.ndim or len(a) != batch.size]
    if any(a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, equal_nan=True) for a, b in of_all):
        return (
            "the model's outputs hold a number of the whole batch (a loss or a mean that it computes itself); give "
            "loss_fn=, the mean over examples of what each one's own outputs give"
        )
    return what_ties(model)


def losses_of(model: nn.Module, loss_fn: LossFunction, batch: Batch) -> Tensor:
    """(n,): each example's loss, without a graph."""
    with torch.no_grad():
        return example_losses(loss_fn, batch.forward_on_copies(model), batch.targets, batch.size)
