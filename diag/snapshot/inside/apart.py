"""Whether the answer to an example depends on the other examples of its batch, or on its place among them, tried in
evaluation mode.

Of two axes of a network's inputs it cannot be seen from shapes alone which holds the examples: with time first,
time steps see each other and examples do not. So where only the first axis mixes, that is said of examples alone if
something else says that it holds them: one target a row, or padding along the other axis.
"""

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
from diag.snapshot.batch import Batch, map_tensors, tensors_in
from diag.snapshot.explain import CALL_ERRORS
from diag.snapshot.inside.padding import padding_of
from diag.snapshot.preserve import preserved, seed_generators
from diag.snapshot.snapshot import Snapshot

EXAMPLES_TOGETHER = (7, 6)  # numbers that axes of a network seldom have
COARSE_TYPES = (torch.float16, torch.bfloat16)
UNMOVED_WITHIN = 1e-6  # of the outputs' size: what float32 rounds


@dataclass(frozen=True)
class OtherExamples:
    """mixing: how far the answers to the first and the last example of a few move when all others are replaced by
    it, over the outputs' size. examples: how many were tried. order: how far the answers move when the examples
    come in another order; NaN where that could not be tried."""

    mixing: float
    examples: int
    order: float = math.nan


def other_examples(snapshot: Snapshot) -> OtherExamples:
    """Try it on the first examples of the probe set: seven passes of `EXAMPLES_TOGETHER` of them, two
    more where they move.

    Raises MissingQuantity where an input does not belong to single examples, where the network gives another answer
    each time, where it cannot be called on so few, or where the first axis may be time.
    """
    first = replace(snapshot.batches[0], coupled=False, why="")
    snapshot.deadline.check()
    rows = first
    try:
        for number in EXAMPLES_TOGETHER:
            rows = first.slice(0, min(number, first.size))
            found, order = mixing(snapshot.model, rows), moved_by_order(snapshot.model, rows)
            if not math.isnan(found):
                break
        known = math.isnan(found) or max(found, order) <= UNMOVED_WITHIN or holds_examples(snapshot.model, rows)
    except CALL_ERRORS as error:
        raise MissingQuantity(
            f"the model could not be called on {rows.size} examples ({type(error).__name__})."
        ) from error
    if math.isnan(found):
        raise MissingQuantity("inputs or outputs do not belong to single examples, or the answers are random.")
    if not known:
        raise MissingQuantity("the first axis of the inputs may be time.")
    return OtherExamples(found, rows.size, order)


@contextmanager
def in_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """The model in this mode and without gradients; afterwards it is as it was."""
    with preserved(model, mode=mode), torch.no_grad():
        yield


def mixing(model: nn.Module, batch: Batch) -> float:
    """How far the answers to the first and the last example move, in evaluation mode, when every other example of
    the batch is replaced by it; NaN where an input does not belong to single examples (an adjacency), or where the
    network gives another answer each time."""
    if not are_apart(batch):
        return math.nan
    batch = replace(batch, coupled=False, why="")  # that examples see each other is what is asked
    with in_mode(model, "eval"):
        one, again = answers(model, batch), answers(model, batch)
        if not one or largest_change(one, again) > 0:
            return math.nan
        changes = [
            largest_change(one, answers(model, batch.take([place] * batch.size)), place)
            for place in (0, batch.size - 1)
        ]
    return max(changes)


def moved_by_order(model: nn.Module, batch: Batch) -> float:
    """How far the answers move, in evaluation mode, when the examples of the batch come in another order; NaN where
    that cannot be tried: the network needs this order, draws random numbers or rounds coarsely."""
    if not are_apart(batch):
        return math.nan
    batch = replace(batch, coupled=False, why="")
    other = [*range(1, batch.size), 0]
    with in_mode(model, "eval"):
        outputs, again = _outputs(model, batch), answers(model, batch, seed=1)
        one = [t.double() for t in outputs]
        if not one or largest_change(one, again) > 0 or any(t.dtype in COARSE_TYPES for t in outputs):
            return math.nan
        try:
            moved = answers(model, batch.take(other))
        except CALL_ERRORS:  # sequences that must come with the longest first
            return math.nan
    return largest_change([t[other] for t in one], moved)


def are_apart(batch: Batch) -> bool:
    """Whether each input belongs to single examples, by its shape, or is a square over positions (a causal mask)
    that all of them share."""
    inputs = [*tensors_in(batch.args), *tensors_in(batch.kwargs)]
    by_row = [t for t in inputs if t.ndim and t.shape[0] == batch.size and t.shape[1:2] != (batch.size,)]
    positions = {t.shape[1] for t in by_row if t.ndim > 1}
    shared = (t for t in inputs if not any(t is row for row in by_row))
    return batch.size > 1 and bool(by_row) and all(_is_over(t, positions) for t in shared)


def _is_over(t: Tensor, positions: set[int]) -> bool:
    square = t.ndim > 1 and t.shape[-1] == t.shape[-2] and t.shape[-1] in positions
    return square and all(n == 1 for n in t.shape[:-2])


def holds_examples(model: nn.Module, batch: Batch) -> bool:
    """Whether the first axis of the inputs is that of the examples, and no axis of time with the examples after it.

    It is where each row has one target, where sequences are padded along the second axis alone, or where what is
    along the second axis mixes, too (examples never should)."""
    targets = batch.targets
    if isinstance(targets, Tensor) and len(targets) == batch.size == targets.numel():
        return True
    inputs = [t for t in tensors_in((batch.args, batch.kwargs)) if t.ndim > 1 and t.shape[0] == batch.size]
    tokens = [t for t in inputs if t.ndim == 2 and not t.is_floating_point()]
    if any(padding_of(t) and not padding_of(t.T) for t in tokens):
        return True
    if not any(t.shape[1] > 1 for t in inputs):
        return True
    with in_mode(model, "eval"):
        one = answers(model, batch)
        alone = answers(model, _of_one_column(batch))
    sizes = {t.shape[1] for t in inputs}
    pairs = [(a[:, :1], b[:, :1]) for a, b in zip(one, alone, strict=True) if a.ndim > 1 and a.shape[1] in sizes]
    return not pairs or largest_change([a for a, _ in pairs], [b for _, b in pairs]) > UNMOVED_WITHIN


def _of_one_column(batch: Batch) -> Batch:
    """Each input that has a second axis with its first entry at all places of it."""

    def repeat(t: Tensor) -> Tensor:
        by_row = t.ndim > 1 and t.shape[0] == batch.size
        return t[:, :1].expand_as(t).contiguous() if by_row else t

    args, kwargs = map_tensors(repeat, (batch.args, batch.kwargs))
    return replace(batch, args=args, kwargs=kwargs)


def answers(model: nn.Module, batch: Batch, seed: int = 0) -> list[Tensor]:
    """The floating tensors among the network's outputs that have one entry or more for each example; those of each
    example with each are left out.

    Called with the same random numbers every time, as some networks add noise in evaluation, too; `in_mode` puts
    the user's back.
    """
    return [t.double() for t in _outputs(model, batch, seed)]


def every_output(model: nn.Module, batch: Batch, seed: int = 0) -> list[Tensor]:
    """The tensors among the network's outputs, called with the random numbers of this seed."""
    seed_generators(seed)
    numpy.random.seed(seed)
    random.seed(seed)
    outputs = batch.forward(model)
    return tensors_in(outputs) or tensors_in(list(getattr(outputs, "__dict__", {}).values()))


def _outputs(model: nn.Module, batch: Batch, seed: int = 0) -> list[Tensor]:
    found, n = every_output(model, batch, seed), batch.size
    return [t for t in found if t.is_floating_point() and t.ndim and t.shape[0] == n and t.shape[1:] != (n,)]


def largest_change(one: Sequence[Tensor], other: Sequence[Tensor], place: int | None = None) -> float:
    """The largest change of an entry over the root mean square of its tensor, over all tensors; of one example
    where its place is given. Of sequences that became shorter or longer, what both have."""
    where = slice(None) if place is None else slice(place, place + 1)
    changes = []
    for a, b in zip(one, other, strict=True):
        size = float(a.square().mean().sqrt()) if a.numel() else 0.0
        both = tuple(slice(0, min(m, n)) for m, n in zip(a.shape, b.shape, strict=True))
        a, b = a[both][where], b[both][where]
        if size > 0 and a.numel():
            changes.append(float((a - b).abs().max() / size))
    return max(changes) if changes else math.nan
