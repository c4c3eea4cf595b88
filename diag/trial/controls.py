"""What the outputs of a network depend on: its input, the other examples of the batch, the mode it is in."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor, nn

from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.example_losses import LossFunction
from diag.snapshot.preserve import preserved, seed_generators

SETTLING = 30  # calls in training mode without a step, so that running statistics can follow


@contextmanager
def in_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """The model in this mode and without gradients; afterwards it is as it was."""
    with preserved(model, mode=mode), torch.no_grad():
        yield


def exchanged(batch: Batch) -> Batch:
    """The batch with every example in the place of the one after it."""
    return batch.take([*range(1, batch.size), 0])


def input_change(model: nn.Module, batch: Batch) -> float:
    """How far the outputs move when the inputs of the examples are exchanged: largest change over the root mean
    square; NaN where the network gives no number for an example."""
    with in_mode(model, "eval"):
        return _change(answers(model, batch), answers(model, exchanged(batch)))


def exchanged_loss(model: nn.Module, batch: Batch, batch_loss: LossFunction) -> float:
    """The mean loss where each example is given the answer to another; NaN where the loss is made in the model."""
    with in_mode(model, "eval"):
        outputs = exchanged(batch).forward(model)
        if isinstance(outputs, Mapping) or hasattr(outputs, "loss") or batch.targets is None:
            return math.nan
        return float(batch_loss(outputs, batch.targets))


def mixing(model: nn.Module, batch: Batch) -> float:
    """How far the answers to the first example move, in evaluation mode, when every other example of the batch is
    replaced by it; NaN where an input does not belong to single examples (an adjacency, a mask of positions), or
    where the network gives another answer each time."""
    inputs = [*tensors_in(batch.args), *tensors_in(batch.kwargs)]
    apart = all(t.ndim and t.shape[0] == batch.size and t.shape[1:2] != (batch.size,) for t in inputs)
    if batch.size < 2 or not inputs or not apart:
        return math.nan
    with in_mode(model, "eval"):
        one, again = answers(model, batch), answers(model, batch)
        if _change(one, again) > 0:
            return math.nan
        other = answers(model, batch.take([0] * batch.size))
        return _change([t[:1] for t in one], [t[:1] for t in other])


def both_modes(model: nn.Module, batch: Batch, batch_loss: LossFunction) -> tuple[float, float]:
    """The loss of the batch in training and in evaluation mode, after the running statistics have seen it."""
    model.train()
    with torch.no_grad():
        train = [float(batch_loss(batch.forward(model), batch.targets)) for _ in range(SETTLING)]
        model.eval()
        return sum(train) / len(train), float(batch_loss(batch.forward(model), batch.targets))


def answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The floating tensors among the network's outputs that have one entry or more for each example.

    Called with the same random numbers every time, as some networks add noise in evaluation, too; `in_mode` puts
    the user's back.
    """
    seed_generators(0)
    numpy.random.seed(0)
    random.seed(0)
    outputs = batch.forward(model)
    found = tensors_in(outputs) or tensors_in(list(getattr(outputs, "__dict__", {}).values()))
    return [t.double() for t in found if t.is_floating_point() and t.ndim and t.shape[0] == batch.size]


def _change(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest change of an entry over the root mean square of its tensor, over all tensors."""
    changes = [
        float((a - b).abs().max() / size)
        for a, b in zip(one, other, strict=True)
        if a.numel() and (size := float(a.square().mean().sqrt())) > 0
    ]
    return max(changes) if changes else math.nan
