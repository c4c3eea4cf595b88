"""The same data in other batches: some examples only, or with their targets dealt out anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from diag.snapshot.batch import Batch, map_tensors, tensors_in


def chosen(batches: Sequence[Batch], rows: Sequence[int]) -> list[Batch]:
    """The examples of these rows, in their order."""
    examples = [batch.slice(i, i + 1) for batch in batches for i in range(batch.size)]
    return joined([examples[i] for i in rows])


def joined(examples: Sequence[Batch]) -> list[Batch]:
    """Neighbouring examples of one shape put together into batches."""
    groups: list[list[Batch]] = []
    for example in examples:
        shapes = [t.shape for t in tensors_in((example.args, example.kwargs, example.targets))]
        last = groups[-1][0] if groups else None
        same = last and [t.shape for t in tensors_in((last.args, last.kwargs, last.targets))] == shapes
        groups[-1].append(example) if same else groups.append([example])
    result = []
    for group in groups:
        columns = zip(*(tensors_in((b.args, b.kwargs, b.targets)) for b in group), strict=True)
        # A tensor without a first axis of one example (a shared mask, say) is the same for all.
        pieces = iter([torch.cat(c) if c[0].ndim and c[0].shape[0] == 1 else c[0] for c in columns])
        first = group[0]
        args, kwargs, targets = map_tensors(partial(_next, pieces), (first.args, first.kwargs, first.targets))
        result.append(Batch(args, kwargs, targets, len(group)))
    return result


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
        result.append(Batch(batch.args, batch.kwargs, targets, batch.size))
        start += batch.size
    return result


def _next(pieces: Iterator[Tensor], _: Tensor) -> Tensor:
    return next(pieces)
