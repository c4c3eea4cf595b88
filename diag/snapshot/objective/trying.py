"""How much each example counts in a loss, from its values on random outputs: alone, in pairs, and all together.

Of examples i and j together the loss is (c_i l_i + c_j l_j) / (c_i + c_j), which gives c_i / c_j. What comes out is
only taken where it gives the loss of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diag.errors import DiagError, InvalidInput
from diag.snapshot.batch import Batch, map_tensors
from diag.snapshot.example_losses import LossFunction, example_losses
from diag.snapshot.explain import CALL_ERRORS

COUNTS_FIT_WITHIN = 1e-4  # relative: of the loss of all examples and what the counts make of the examples' own
TriedBatch = tuple[Any, Batch]  # a model's outputs on a batch


def tried_counts(loss: LossFunction, rows: Sequence[TriedBatch]) -> list[Tensor] | None:
    """c_i of the examples of each batch, float64 (n_b,); None where the loss is not a weighted mean of theirs."""
    found = [_counts(loss, outputs, batch) for outputs, batch in rows]
    known = [counts for counts in found if counts is not None]
    return known if len(known) == len(found) else None


def joined_rows(rows: Sequence[TriedBatch]) -> TriedBatch:
    """The outputs and targets of several batches as those of one. Raises InvalidInput where they do not fit."""
    size = sum(batch.size for _, batch in rows)
    trees = [pytree.tree_flatten((outputs, batch.targets)) for outputs, batch in rows]
    if any(spec != trees[0][1] for _, spec in trees):
        raise InvalidInput("The batches have outputs and targets of different kinds; expected one kind.")
    leaves = [
        _joined(parts, [b.size for _, b in rows]) for parts in zip(*(leaves for leaves, _ in trees), strict=True)
    ]
    outputs, targets = pytree.tree_unflatten(leaves, trees[0][1])
    return outputs, Batch((), {}, targets, size)


def _joined(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    if not isinstance(parts[0], Tensor) or not parts[0].ndim:
        return parts[0]
    by_row = all(len(t) == size for t, size in zip(parts, sizes, strict=True))
    if not by_row or any(t.shape[1:] != parts[0].shape[1:] for t in parts):
        raise InvalidInput("The batches differ in the shapes of their outputs or targets; expected one shape.")
    return torch.cat(list(parts))


def _counts(loss: LossFunction, outputs: Any, batch: Batch) -> Tensor | None:
    for drawn in _random(outputs):
        with torch.no_grad():
            try:
                found = _of_outputs(loss, drawn, batch)
            except (DiagError, *CALL_ERRORS):
                continue
        if found is not None:
            return found
    return None


def _random(outputs: Any) -> Iterator[Any]:
    """Random outputs, random ones between 0 and 1, and those that the model gave."""
    for draw in (torch.randn, torch.rand):
        generator = torch.Generator().manual_seed(0)

        def noise(t: Tensor, draw: Any = draw, generator: Any = generator) -> Tensor:
            if not t.is_floating_point():
                return t
            kept = t.dtype if t.dtype.itemsize >= 4 else torch.float32  # half precision is too coarse for a ratio
            return draw(t.shape, generator=generator, dtype=torch.float64).to(t.device, kept)

        yield map_tensors(noise, outputs)
    yield outputs


def _of_outputs(loss: LossFunction, outputs: Any, batch: Batch) -> Tensor | None:
    whole = float(loss(outputs, batch.targets).double().mean())
    alone = _alone(loss, outputs, batch)
    ones = torch.ones(batch.size, dtype=torch.float64)
    if _makes_up(ones, alone, whole):
        return ones

    def of(rows: list[int]) -> float:
        cut = lambda t: t[rows] if t.ndim and t.shape[0] == batch.size else t  # noqa: E731
        return float(loss(map_tensors(cut, outputs), map_tensors(cut, batch.targets)).double().mean())

    counts = _solved(of, alone)
    return counts if counts is not None and _makes_up(counts, alone, whole) else None


def _alone(loss: LossFunction, outputs: Any, batch: Batch) -> Tensor:
    return example_losses(loss, outputs, batch.targets, batch.size).double().cpu()


def _makes_up(counts: Tensor, alone: Tensor, whole: float) -> bool:
    mean = float((torch.where(counts > 0, alone, 0) * counts).sum() / counts.sum())
    size = float(torch.where(torch.isfinite(alone), alone, 0).abs().max())
    return abs(mean - whole) <= COUNTS_FIT_WITHIN * max(abs(whole), size)


def _solved(loss: Callable[[list[int]], float], alone: Tensor) -> Tensor | None:
    """c_i with one of them 1, from the losses alone (n,) and of pairs; 0 where an example alone has none."""
    finite = torch.isfinite(alone).nonzero().flatten().tolist()
    if len(finite) < 2:
        return None
    counts = torch.zeros(len(alone), dtype=torch.float64)
    first = finite[0]
    # The example whose loss alone is farthest from the first one's tells the first one's ratio best.
    other = max(finite, key=lambda i: abs(float(alone[i] - alone[first])))
    counts[first] = 1.0
    for i in [other, *(i for i in finite if i not in (first, other))]:
        against = first if abs(float(alone[i] - alone[first])) > abs(float(alone[i] - alone[other])) else other
        counts[i] = counts[against] * _ratio(float(alone[i]), float(alone[against]), loss(sorted((i, against))))
    return counts if bool(torch.isfinite(counts).all() and (counts >= -COUNTS_FIT_WITHIN).all()) else None


def _ratio(own: float, other: float, both: float) -> float:
    """c_own / c_other from the losses of both alone and together."""
    return (other - both) / (both - own) if both != own else float("inf")
