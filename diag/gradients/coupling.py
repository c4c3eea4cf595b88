"""Refuse a model in which examples influence each other: it has no per-example gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diag.errors import Unsupported, first_line
from diag.snapshot.batch import Batch, map_tensors
from diag.snapshot.example_losses import LossFunction, example_losses


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
        _compare(losses[:size], found, lambda part=part: losses_of(model, loss_fn, part), batch.size)  # type: ignore[misc]


def _compare(together: Tensor, alone: Tensor, again: Callable[[], Tensor], n: int) -> None:
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(together.dtype, 5e-2)
    scale = together.abs().max().clamp_min(1e-6)
    if bool(((together - alone).abs() <= tolerance * scale).all()):
        return
    if bool(((alone - again()).abs() > tolerance * scale).any()):
        raise Unsupported(
            "The same example gave two different losses in two forward passes, so the model draws random numbers "
            "even in evaluation mode; switch dropout and sampling off while measuring."
        )
    row = int((together - alone).abs().argmax())
    raise Unsupported(
        f"The loss of example {row} is {float(together[row]):.6g} in a batch of {n} and {float(alone[row]):.6g} in "
        f"a batch of {len(alone)}, so examples influence each other (BatchNorm on batch statistics, a comparison "
        "across the batch) and have no gradients of their own: use running statistics (eval mode) or another norm."
    )


def losses_of(model: nn.Module, loss_fn: LossFunction, batch: Batch) -> Tensor:
    """(n,): each example's loss, without a graph."""
    with torch.no_grad():
        args, kwargs = map_tensors(torch.clone, (batch.args, batch.kwargs))  # the model may write into them
        outputs = Batch(args, kwargs, batch.targets, batch.size).forward(model)
        return example_losses(loss_fn, outputs, batch.targets, batch.size)
