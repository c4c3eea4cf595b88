"""Which of a model's inputs its outputs depend on, tried in the mode that training uses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
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
MOST_PLACED = 2  # inputs whose positions are tried
FEWEST_PLACES, HALF_OF_EXAMPLES = 8, 0.5
POSITION_PARTS, MOST_PASSES = 4, 14


@dataclass(frozen=True)
class PositionsTried:
    """Of one input with an axis of positions (its second): how many of them differ between examples, and at which
    of those exchanged values moved some output; it may be fewer, where the search ended early."""

    name: str
    varying: int
    used: tuple[int, ...]


@dataclass(frozen=True)
class InputsTried:
    """names: of the inputs that were tried, as the model is given them; ignored: those with which no output moved.
    rows: how many examples were exchanged. positions: of inputs of which some positions moved nothing."""

    names: tuple[str, ...]
    ignored: tuple[str, ...]
    rows: int
    positions: tuple[PositionsTried, ...] = ()


def inputs_tried(snapshot: Snapshot) -> InputsTried:
    """Give each example the next one's values of one input, one input after the other: two passes and one for each;
    and of an input with positions those of a quarter of them, and so on where that moves nothing.

    Only tensors that the call names one by one are tried, with an entry for each example and not all alike: a
    batch that is handed over whole holds labels and other things that are not meant for the model, and so do
    keywords that its forward() does not name. The random numbers are the same each time. Raises MissingQuantity
    where there are fewer than two such inputs and the one has no positions, or where the outputs are not the same
    when nothing was exchanged.
    """
    first = replace(snapshot.batches[0], coupled=False, why="")
    rows = first.slice(0, min(ROWS_EXCHANGED, first.size))
    found = dict(list(_varying(rows, arguments_of(snapshot.model)))[:MOST_INPUTS])
    placed = {name: at for name, t in found.items() if (at := _places(t))}
    if len(found) < 2 and not placed:
        raise MissingQuantity("the model has no two inputs that differ between examples.")
    snapshot.deadline.check()
    try:
        with in_mode(snapshot.model, "train" if snapshot.model.training else "eval"):
            one = every_output(snapshot.model, rows)
            same = _equal(one, every_output(snapshot.model, rows))
            moved = {name: every_output(snapshot.model, _exchanged(rows, t)) for name, t in found.items() if same}
            ignored = tuple(name for name, outputs in moved.items() if _equal(one, outputs))

            def moves(name: str, places: Sequence[int]) -> bool:
                snapshot.deadline.check()
                return not _equal(one, every_output(snapshot.model, _exchanged(rows, found[name], places)))

            some = [name for name in placed if name in moved and name not in ignored][:MOST_PLACED]
            positions = [_tried(name, placed[name], moves) for name in some] if one else []
    except CALL_ERRORS as error:
        raise MissingQuantity(
            f"the model could not be called with inputs exchanged ({type(error).__name__})."
        ) from error
    if not same or not one:
        raise MissingQuantity("the model gives no tensors, or others each time.")
    if not all(bool(t.isfinite().any()) for t in one if t.is_floating_point() and t.numel()):
        raise MissingQuantity("the model gives an output none of whose values is a finite number.")
    partly = tuple(p for p in positions if len(p.used) < p.varying)
    return InputsTried(tuple(found), ignored, rows.size, partly)


def _varying(batch: Batch, forward: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    named = [(f"input {i + 1}", a) for i, a in enumerate(batch.args)]  # as in all sentences, from 1
    named += [(name, value) for name, value in batch.kwargs.items() if name in forward]
    targets = tensors_in(batch.targets)
    for name, t in named:
        if not isinstance(t, Tensor) or not t.ndim or len(t) != batch.size or bool((t == t[:1]).all()):
            continue
        if not any(t.shape == y.shape and torch.equal(t.double(), y.double()) for y in targets):
            yield name, t


def _places(t: Tensor) -> list[int]:
    """The positions of a sequence, or the columns of a table, at which most examples differ from the next one."""
    if t.ndim not in (2, 3) or t.shape[1] < FEWEST_PLACES:
        return []
    differ = (t != t.roll(1, 0)).reshape(*t.shape[:2], -1).any(2).double().mean(0)
    places: list[int] = torch.nonzero(differ >= HALF_OF_EXAMPLES).flatten().tolist()
    return places if len(places) >= FEWEST_PLACES else []


def _tried(name: str, places: list[int], moves: Callable[[str, Sequence[int]], bool]) -> PositionsTried:
    """Which of these positions move an output: none of those in a quarter that moves nothing, and of the others
    those in the smallest parts that were found to."""
    parts = [
        places[len(places) * i // POSITION_PARTS : len(places) * (i + 1) // POSITION_PARTS]
        for i in range(POSITION_PARTS)
    ]
    used = [part for part in parts if moves(name, part)]
    passes = POSITION_PARTS
    while 0 < len(used) < POSITION_PARTS and passes < MOST_PASSES and any(len(part) > 1 for part in used):
        longest = max(used, key=len)
        used.remove(longest)
        halves = longest[: len(longest) // 2], longest[len(longest) // 2 :]
        used += [half for half in halves if moves(name, half)]
        passes += 2
    return PositionsTried(name, len(places), tuple(sorted(i for part in used for i in part)))


def _exchanged(batch: Batch, chosen: Tensor, places: Sequence[int] | None = None) -> Batch:
    def exchange(t: Tensor) -> Tensor:
        if t is not chosen:
            return t
        if places is None:
            return t.roll(1, 0)
        other, at = t.clone(), torch.tensor(places, device=t.device)
        other[:, at] = t.roll(1, 0)[:, at]
        return other

    args, kwargs = map_tensors(exchange, (batch.args, batch.kwargs))
    return replace(batch, args=args, kwargs=kwargs)


def _equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
        for a, b in zip(one, other, strict=True)
    )
