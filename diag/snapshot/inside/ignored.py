"""Which of a model's inputs its outputs depend on, tried in the mode that training uses."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diag.errors import MissingQuantity
from diag.snapshot.batch import Batch, arguments_of, map_tensors, tensors_in
from diag.snapshot.explain import CALL_ERRORS
from diag.snapshot.inside.apart import every_output, in_mode
from diag.snapshot.snapshot import Snapshot

ROWS_EXCHANGED = 16
MOST_INPUTS = 8


@dataclass(frozen=True)
class InputsTried:
    """names: of the inputs that were tried, as the model is given them; ignored: those with which no output moved.
    rows: how many examples were exchanged."""

    names: tuple[str, ...]
    ignored: tuple[str, ...]
    rows: int


def inputs_tried(snapshot: Snapshot) -> InputsTried:
    """Give each example the next one's values of one input, one input after the other: two passes and one for each.

    Only tensors that the call names one by one are tried, with an entry for each example and not all alike: a
    batch that is handed over whole holds labels and other things that are not meant for the model, and so do
    keywords that its forward() does not name. The random numbers are the same each time. Raises MissingQuantity
    where there are fewer than two such inputs, or where the outputs are not the same when nothing was exchanged.
    """
    first = replace(snapshot.batches[0], coupled=False, why="")
    rows = first.slice(0, min(ROWS_EXCHANGED, first.size))
    found = dict(list(_varying(rows, arguments_of(snapshot.model)))[:MOST_INPUTS])
    if len(found) < 2:
        raise MissingQuantity("the model has no two inputs that differ between examples.")
    snapshot.deadline.check()
    try:
        with in_mode(snapshot.model, "train" if snapshot.model.training else "eval"):
            one = every_output(snapshot.model, rows)
            same = _equal(one, every_output(snapshot.model, rows))
            moved = {name: every_output(snapshot.model, _exchanged(rows, t)) for name, t in found.items() if same}
    except CALL_ERRORS as error:
        raise MissingQuantity(
            f"the model could not be called with inputs exchanged ({type(error).__name__})."
        ) from error
    if not same or not one:
        raise MissingQuantity("the model gives no tensors, or others each time.")
    ignored = tuple(name for name, outputs in moved.items() if _equal(one, outputs))
    return InputsTried(tuple(found), ignored, rows.size)


def _varying(batch: Batch, forward: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    named = [(f"input {i + 1}", a) for i, a in enumerate(batch.args)]
    named += [(name, value) for name, value in batch.kwargs.items() if name in forward]
    targets = tensors_in(batch.targets)
    for name, t in named:
        if not isinstance(t, Tensor) or not t.ndim or len(t) != batch.size or bool((t == t[:1]).all()):
            continue
        if not any(t.shape == y.shape and torch.equal(t.double(), y.double()) for y in targets):
            yield name, t


def _exchanged(batch: Batch, chosen: Tensor) -> Batch:
    def exchange(t: Tensor) -> Tensor:
        return t.roll(1, 0) if t is chosen else t

    args, kwargs = map_tensors(exchange, (batch.args, batch.kwargs))
    return replace(batch, args=args, kwargs=kwargs)


def _equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
        for a, b in zip(one, other, strict=True)
    )
