"""Pick examples out of batches, and put them together in as few batches as their shapes allow.

Examples are numbered from 0 through all the batches, in their order.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from diag.errors import InvalidInput
from diag.snapshot.batch import Batch, map_tensors, tensors_in


def subsampled(batches: Sequence[Batch], num_examples: int, seed: int) -> list[Batch]:
    """`num_examples` of the examples, drawn without replacement, in their order.

    Batches that must stay whole are drawn as a whole, until there are as many examples. Raises InvalidInput unless
    1 <= num_examples <= the number of examples.
    """
    total = sum(batch.size for batch in batches)
    if not 1 <= num_examples <= total:
        raise InvalidInput(f"{num_examples} examples were asked for; expected 1 to {total}, which the data holds.")
    generator = torch.Generator().manual_seed(seed)
    if any(batch.coupled for batch in batches):
        order = torch.randperm(len(batches), generator=generator).tolist()
        sizes = torch.tensor([batches[i].size for i in order]).cumsum(0)
        return [batches[i] for i in sorted(order[: int((sizes < num_examples).sum()) + 1])]
    return picked(batches, torch.randperm(total, generator=generator)[:num_examples].sort().values.tolist())


def partitioned(batches: Sequence[Batch], size: int, seed: int) -> Iterator[list[Batch]]:
    """All the examples in disjoint random groups of `size`, each as batches; the last group may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(sum(batch.size for batch in batches), generator=generator)
    return (picked(batches, numbers.sort().values.tolist()) for numbers in shuffled.split(size))


def random_blocks_of(batches: Sequence[Batch], count: int, seed: int) -> list[list[Batch]]:
    """`count` disjoint random blocks of nearly as many examples each; a few examples may be left over.

    Batches that must stay whole are assigned whole. Raises InvalidInput where there are fewer of them, or fewer
    examples, than blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = any(batch.coupled for batch in batches)
    units = len(batches) if whole else sum(batch.size for batch in batches)
    if units < count:
        raise InvalidInput(f"{count} blocks of {units} were asked for; expected at most one for each.")
    dealt = (
        torch.randperm(units, generator=generator)[: units - units % count].view(count, -1).sort(1).values.tolist()
    )
    return [[batches[i] for i in block] if whole else picked(batches, block) for block in dealt]


def picked(batches: Sequence[Batch], numbers: Sequence[int]) -> list[Batch]:
    """The examples with these numbers, in the order given.

    Neighbours are put together up to the size of the largest of `batches`.
    """
    starts = list(itertools.accumulate((batch.size for batch in batches), initial=0))
    places = []
    for number in numbers:
        which = bisect.bisect_right(starts, number) - 1
        places.append((which, number - starts[which]))
    runs = itertools.groupby(places, key=lambda place: place[0])
    drawn = [batches[which].take([row for _, row in run]) for which, run in runs]
    return joined(drawn, max(batch.size for batch in batches))


def joined(batches: Sequence[Batch], at_most: int) -> list[Batch]:
    """Neighbouring batches whose parts fit each other put together, up to `at_most` examples each."""
    groups: list[list[Batch]] = []
    for batch in batches:
        room = groups and sum(b.size for b in groups[-1]) + batch.size <= at_most
        if room and _fit(groups[-1][0], batch):
            groups[-1].append(batch)
        else:
            groups.append([batch])
    return [group[0] if len(group) == 1 else _joined(group) for group in groups]


def _parts(batch: Batch) -> tuple[list[Any], Any]:
    return pytree.tree_flatten((batch.args, batch.kwargs, batch.targets), is_leaf=_is_packed)


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _fit(first: Batch, second: Batch) -> bool:
    """Whether the two differ in nothing but their examples."""
    (a, spec), (b, other) = _parts(first), _parts(second)
    return spec == other and all(_alike(x, first, y, second) for x, y in zip(a, b, strict=True))


def _alike(x: Any, first: Batch, y: Any, second: Batch) -> bool:
    if first.is_by_row(x) and second.is_by_row(y):
        return x.shape[1:] == y.shape[1:] and x.dtype == y.dtype
    if isinstance(x, Tensor | PackedSequence) or isinstance(y, Tensor | PackedSequence):
        return x is y  # a tensor that all examples share, such as a mask
    return type(x) is type(y) and bool(x is y or x == y)


def _joined(group: Sequence[Batch]) -> Batch:
    spec = _parts(group[0])[1]
    columns = zip(*(_parts(batch)[0] for batch in group), strict=True)
    parts = [torch.cat(column) if group[0].is_by_row(column[0]) else column[0] for column in columns]
    args, kwargs, targets = pytree.tree_unflatten(parts, spec)
    return replace(group[0], args=args, kwargs=kwargs, targets=targets, size=sum(batch.size for batch in group))


def permuted_targets(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """The batches with the targets permuted over all examples."""
    total = sum(batch.size for batch in batches)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    columns: list[list[Tensor]] = [tensors_in(batch.targets) for batch in batches]
    mixed = [torch.cat(parts)[order.to(parts[0].device)] for parts in zip(*columns, strict=True)]
    result, start = [], 0
    for batch in batches:
        pieces = iter([column[start : start + batch.size] for column in mixed])
        targets = map_tensors(partial(_next, pieces), batch.targets)
        result.append(replace(batch, targets=targets))
        start += batch.size
    return result


def _next(pieces: Iterator[Tensor], _: Tensor) -> Tensor:
    return next(pieces)
