"""What the outputs of a network depend on: its input, the other examples of the batch, the mode it is in."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from diag.snapshot.batch import Batch
from diag.snapshot.example_losses import LossFunction
from diag.snapshot.inside.apart import answers, in_mode, largest_change

SETTLING = 30  # calls in training mode without a step, so that running statistics can follow


def exchanged(batch: Batch) -> Batch:
    """The batch with every example in the place of the one after it."""
    return batch.take([*range(1, batch.size), 0])


def input_change(model: nn.Module, batch: Batch) -> float:
    """How far the outputs move when the inputs of the examples are exchanged: largest change over the root mean
    square; NaN where the network gives no number for an example."""
    with in_mode(model, "eval"):
        return largest_change(answers(model, batch), answers(model, exchanged(batch)))


def exchanged_loss(model: nn.Module, batch: Batch, batch_loss: LossFunction) -> float:
    """The mean loss where each example is given the answer to another; NaN where the loss is made in the model."""
    with in_mode(model, "eval"):
        outputs = exchanged(batch).forward(model)
        if isinstance(outputs, Mapping) or hasattr(outputs, "loss") or batch.targets is None:
            return math.nan
        return float(batch_loss(outputs, batch.targets))


def both_modes(model: nn.Module, batch: Batch, batch_loss: LossFunction) -> tuple[float, float]:
    """The loss of the batch in training and in evaluation mode, after the running statistics have seen it."""
    model.train()
    with torch.no_grad():
        train = [float(batch_loss(batch.forward(model), batch.targets)) for _ in range(SETTLING)]
        model.eval()
        return sum(train) / len(train), float(batch_loss(batch.forward(model), batch.targets))
