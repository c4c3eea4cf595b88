"""Draw examples out of batches and put them together in as few batches as their shapes allow.

Examples are numbered from 0 through all the batches, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diag.errors import InvalidInput
from diag.snapshot.batch import Batch, map_tensors


def subsampled(batches: Sequence[Batch], num_examples: int, seed: int) -> list[Batch]:
    """`num_examples` of the examples, drawn without replacement, in their order.

    Raises InvalidInput unless 1 <= num_examples <= the number of examples.
    """
    total = sum(batch.size for batch in batches)
    if not 1 <= num_examples <= total:
        raise InvalidInput(f"{num_examples} examples were asked for; expected 1 to {total}, which the data holds.")
    generator = torch.Generator().manual_seed(seed)
    return selected(batches, torch.randperm(total, generator=generator)[:num_examples])


def partitioned(batches: Sequence[Batch], size: int, seed: int) -> Iterator[list[Batch]]:
    """All the examples in disjoint random groups of `size`, each as batches; the last group may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(sum(batch.size for batch in batches), generator=generator)
    return (selected(batches, numbers) for numbers in shuffled.split(size))


def selected(batches: Sequence[Batch], numbers: Tensor) -> list[Batch]:
    """The examples with these numbers, in their order, in batches no larger than the largest of `batches`."""
    numbers = numbers.sort().values
    drawn, start = [], 0
    for batch in batches:
        rows = numbers[(numbers >= start) & (numbers < start + batch.size)] - start
        start += batch.size
        if len(rows):
            drawn.append(taken(batch, rows))
    return joined(drawn, max(batch.size for batch in batches))


def taken(batch: Batch, rows: Tensor) -> Batch:
    """The examples `rows` (integers) of a batch. Tensors whose first axis is not the batch stay whole."""

    def take(t: Tensor) -> Tensor:
        return t[rows.to(t.device)] if t.ndim and t.shape[0] == batch.size else t

    args, kwargs, targets = (map_tensors(take, x) for x in (batch.args, batch.kwargs, batch.targets))
    return Batch(args, kwargs, targets, len(rows))


def joined(batches: Sequence[Batch], at_most: int) -> list[Batch]:
    """Neighbouring batches of like shapes put together, up to `at_most` examples each."""
    result: list[Batch] = []
    for batch in batches:
        both = _joined(result[-1], batch) if result and result[-1].size + batch.size <= at_most else None
        if both is None:
            result.append(batch)
        else:
            result[-1] = both
    return result


def _joined(first: Batch, second: Batch) -> Batch | None:
    """One batch of two, or None where their parts do not fit each other."""
    (a, spec), (b, other) = (pytree.tree_flatten((x.args, x.kwargs, x.targets)) for x in (first, second))
    if spec != other:
        return None
    parts = []
    for x, y in zip(a, b, strict=True):
        per_example = isinstance(x, Tensor) and x.ndim and x.shape[0] == first.size and y.shape[0] == second.size
        if per_example and x.shape[1:] == y.shape[1:]:
            parts.append(torch.cat([x, y]))
        elif x is y:  # shared by all examples
            parts.append(x)
        else:
            return None
    args, kwargs, targets = pytree.tree_unflatten(parts, spec)
    return Batch(args, kwargs, targets, first.size + second.size)
