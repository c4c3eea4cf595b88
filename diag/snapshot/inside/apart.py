"""Whether the answer to an example depends on the other examples of its batch, tried in evaluation mode."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor, nn

from diag.errors import MissingQuantity
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.explain import CALL_ERRORS
from diag.snapshot.preserve import preserved, seed_generators
from diag.snapshot.snapshot import Snapshot

EXAMPLES_TOGETHER = 7  # a number that axes of a network seldom have


@dataclass(frozen=True)
class OtherExamples:
    """mixing: how far the answers to the first and the last example of a few move when all others are replaced by
    it, over the outputs' size. examples: how many were tried."""

    mixing: float
    examples: int


def other_examples(snapshot: Snapshot) -> OtherExamples:
    """Try it on the first examples of the probe set: four passes of `EXAMPLES_TOGETHER` of them.

    Raises MissingQuantity where an input does not belong to single examples, where the network gives another answer
    each time, or where it cannot be called on so few.
    """
    first = replace(snapshot.batches[0], coupled=False, why="")
    rows = first.slice(0, min(EXAMPLES_TOGETHER, first.size))
    snapshot.deadline.check()
    try:
        found = mixing(snapshot.model, rows)
    except CALL_ERRORS as error:
        raise MissingQuantity(
            f"the model could not be called on {rows.size} examples ({type(error).__name__})."
        ) from error
    if math.isnan(found):
        raise MissingQuantity("inputs or outputs do not belong to single examples, or the answers are random.")
    return OtherExamples(found, rows.size)


@contextmanager
def in_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """The model in this mode and without gradients; afterwards it is as it was."""
    with preserved(model, mode=mode), torch.no_grad():
        yield


def mixing(model: nn.Module, batch: Batch) -> float:
    """How far the answers to the first and the last example move, in evaluation mode, when every other example of
    the batch is replaced by it; NaN where an input does not belong to single examples (an adjacency, a mask of
    positions), or where the network gives another answer each time."""
    inputs = [*tensors_in(batch.args), *tensors_in(batch.kwargs)]
    apart = all(t.ndim and t.shape[0] == batch.size and t.shape[1:2] != (batch.size,) for t in inputs)
    if batch.size < 2 or not inputs or not apart:
        return math.nan
    batch = replace(batch, coupled=False, why="")  # that examples see each other is what is asked
    with in_mode(model, "eval"):
        one, again = answers(model, batch), answers(model, batch)
        if largest_change(one, again) > 0:
            return math.nan
        changes = [
            largest_change(one, answers(model, batch.take([place] * batch.size)), place)
            for place in (0, batch.size - 1)
        ]
    return max(changes)


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


def largest_change(one: Sequence[Tensor], other: Sequence[Tensor], place: int | None = None) -> float:
    """The largest change of an entry over the root mean square of its tensor, over all tensors; of one example
    where its place is given."""
    where = slice(None) if place is None else slice(place, place + 1)
    changes = [
        float((a[where] - b[where]).abs().max() / size)
        for a, b in zip(one, other, strict=True)
        if a.numel() and (size := float(a.square().mean().sqrt())) > 0
    ]
    return max(changes) if changes else math.nan
