"""Curvature of a sharded model of which no rank holds all weights: vectors are lists of the ranks' shards.

The mean loss over all ranks' data is a function of each rank's own parts of the parameters, with what it does to
the others' in the gathering (`diag.snapshot.sharded.gathering`). So gradients and products come out as parts, and
only lengths and inner products are added up over ranks. Every rank calls the model equally often: one with fewer
batches repeats its first with the weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from diag.curvature.objective import LossFn, Objective, gradients
from diag.linalg.reductions import Spread
from diag.snapshot.batch import Batch
from diag.snapshot.call_at import call_at
from diag.snapshot.parameters import FlatLayout
from diag.snapshot.sharded.by_layer import ByLayer

DRAWN_AT_ONCE = 1 << 22  # a multiple of 16, in blocks of which torch draws normal numbers


@dataclass(frozen=True, kw_only=True)
class ShardedObjective(Objective):
    """The mean loss of all ranks' data, as a function of this rank's parts of the parameters.

    layers: the model, and the ranks. share: what this rank's data count in the mean. idle: those of `batches`, by
    identity, that are there for the number alone.
    """

    layers: ByLayer
    share: float
    idle: tuple[Batch, ...] = ()

    @classmethod
    def of(cls, layers: ByLayer, loss_fn: LossFn, batches: tuple[Batch, ...], precision: str, share: float) -> Self:
        """With as many batches as any rank has."""
        ranks = layers.lock.together
        missing = int(ranks.most(len(batches))) - len(batches)
        idle = tuple(replace(batches[0]) for _ in range(missing))
        layout = FlatLayout.of(layers.own_shapes)
        every = (*batches, *idle)
        return cls(layers.model, loss_fn, every, layout, precision, layers=layers, share=share, idle=idle)

    @cached_property
    def num_examples(self) -> int:
        """The number of examples of this rank."""
        return sum(batch.size for batch in self.batches if not self._is_idle(batch))

    def _is_idle(self, batch: Batch) -> bool:
        return any(batch is other for other in self.idle)

    def weight(self, batch: Batch) -> float:
        """What the batch counts in the mean over all ranks' data."""
        return 0.0 if self._is_idle(batch) else self.share * batch.size / self.num_examples

    @contextmanager
    def measured(self, shorter: bool = True) -> Iterator[None]:
        """As elsewhere; graphs keep no whole weights."""
        with super().measured(shorter), self.layers.in_use.not_saved():
            yield

    def parameters(self) -> list[Tensor]:
        """This rank's parts as leaves."""
        return [p.detach().requires_grad_() for p in self.layers.values(self.dtype)]

    def outputs(self, parameters: Sequence[Tensor], batch: Batch) -> Any:
        """The model's outputs at these parts."""
        batch = self._prepared(batch)
        with self.layers.at(parameters, self.dtype):
            return call_at(self.model, self.constants, batch.args, batch.kwargs)

    def value(self, parameters: Sequence[Tensor]) -> float:
        """The loss over all ranks' data."""
        own = torch.tensor([super().value(parameters)], dtype=torch.float64)
        return float(self.layers.lock.totals(own)[0])

    def gradient(self, parameters: Sequence[Tensor]) -> Tensor:
        """This rank's part of its gradient; what the ranks' data count stands before the sum over them."""
        total = torch.zeros(self.layout.size, dtype=self.dtype, device=self.device)
        for batch in self.batches:
            loss = self.loss(parameters, batch) * self.weight(batch)
            total += self.layout.flatten(gradients(loss, parameters, create_graph=False), total)
        return total

    # -- over the ranks ------------------------------------------------------------------------------------

    def totals(self, numbers: Tensor) -> Tensor:
        """Sums over the ranks."""
        return self.layers.lock.totals(numbers)

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds on all ranks."""
        return self.layers.lock.everywhere(holds)

    def own_row(self, parameter: int, row: int) -> int | None:
        """Where a row of a parameter lies in this rank's part of it."""
        return self.layers.own_row(self.layout.names[parameter], row)


class SpreadByLayer(Spread):
    """Parts of vectors are as the ranks' parts of the parameters, one after the other."""

    def __init__(self, layers: ByLayer) -> None:
        self._layers = layers
        self._slices, self._each = zip(*layers.own_slices(), strict=True)

    @property
    def alone(self) -> bool:
        """Whether parts are whole vectors."""
        return False

    def length(self, size: int) -> int:
        """Entries that this rank holds."""
        return sum(own.stop - own.start for own in self._slices)

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a vector (size,) or of rows of them (k, size)."""
        return torch.cat([whole[..., own] for own in self._slices], dim=-1)

    def drawn(self, size: int, draw: Callable[[int], Tensor]) -> Tensor:
        """This rank's part of a vector that is drawn in blocks, so that it is nowhere whole."""
        found: list[list[Tensor]] = [[] for _ in self._slices]
        start = 0
        while start < size:
            left = size - start
            block = draw(DRAWN_AT_ONCE if left >= DRAWN_AT_ONCE + 16 else left)
            for into, own in zip(found, self._slices, strict=True):
                a, b = max(own.start - start, 0), min(own.stop - start, len(block))
                into.extend([block[a:b].clone()] if a < b else [])
            start += len(block)
        return torch.cat([piece for pieces in found for piece in pieces] or [draw(0)])

    def whole(self, part: Tensor, size: int) -> Tensor:
        """The vector of `size` entries from the ranks' parts."""
        pieces = zip(part.split([own.stop - own.start for own in self._slices]), self._each, strict=True)
        padded = torch.cat([torch.cat([p, p.new_zeros(each - len(p))]) for p, each in pieces])
        tables = self._layers.lock.together.table(padded).split(self._each, dim=1)
        sizes = FlatLayout.of(self._layers.shapes).slices
        return torch.cat([t.reshape(-1)[: s.stop - s.start] for t, s in zip(tables, sizes, strict=True)])

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over ranks of a small float64 tensor."""
        return self._layers.lock.totals(numbers)
