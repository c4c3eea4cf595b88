"""What two networks' weights or activations say about which unit of one corresponds to which of the other.

A `Similarities` is a sum of products over pairs of units: <A, B> for a pair of tensors. For one group it gives
the score of pairing unit i of A with unit j of B while all other groups stay as they are; `move` then carries
B's side along. `WeightEvidence` holds the tensors, `ActivationEvidence` only their units' correlations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diag.connectivity.symmetries.groups import Element, UnitBlock, UnitGroup

ENTRIES_AT_ONCE = 1 << 24  # entries converted to float64 at a time


@dataclass
class WeightEvidence:
    """One block of a weight in network A and in B, as `Block.take` gives them."""

    block: UnitBlock
    a: Tensor
    b: Tensor
    groups: Mapping[str, UnitGroup]
    _kept: Tensor | None = None  # scores that only their own group's moves can change: columns in another order

    def scores(self, k: int) -> Tensor:
        """(*parents, n, n): the inner product of A's and B's slices for each pair of units of symbol k."""
        parents = self.block.parent_axes(self.groups, k)
        if parents or sum(name in self.groups for name in self.block.names) > 1:
            return _products(self.a, self.b, parents, k)
        if self._kept is None:
            self._kept = _products(self.a, self.b, parents, k)
        return self._kept

    def pair_scores(self, outer: int, inner: int) -> Tensor:
        """(n, n, m, m): pairing unit i of `outer` with j and, inside them, unit k of `inner` with l."""
        n, m = self.a.shape[outer], self.a.shape[inner]
        a, b = (t.movedim((outer, inner), (0, 1)).reshape(n * m, -1).double() for t in (self.a, self.b))
        return (a @ b.T).reshape(n, m, n, m).permute(0, 2, 1, 3)

    def move(self, element: Element) -> None:
        """Carry B's side along with `element`."""
        self.b = self.block.permute(self.b, self.groups, element)
        if self._kept is not None:
            for name in set(self.block.names) & element.keys():
                self._kept = self._kept.index_select(1, element[name].to(self._kept.device))

    def state(self) -> tuple[Tensor, Tensor | None]:
        """What `move` changes, to put back with `restore`."""
        return self.b, self._kept

    def restore(self, state: tuple[Tensor, Tensor | None]) -> None:
        """Put B's side back to what `state` gave."""
        self.b, self._kept = state

    def total(self) -> float:
        """The inner product of A's side and B's as it is moved now."""
        return sum(float(x.double() @ y.double()) for x, y in zip(_chunks(self.a), _chunks(self.b), strict=True))

    def scale(self) -> float:
        """The largest value that `total` could have (Cauchy-Schwarz)."""
        squares = [sum(float(x.double() @ x.double()) for x in _chunks(t)) for t in (self.a, self.b)]
        return (squares[0] * squares[1]) ** 0.5


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).split(ENTRIES_AT_ONCE)


def _products(a: Tensor, b: Tensor, parents: list[int], k: int) -> Tensor:
    front = [*parents, k]
    shape = [a.shape[i] for i in front]
    rows = [t.movedim(front, list(range(len(front)))).reshape(*shape, -1) for t in (a, b)]
    step = max(1, ENTRIES_AT_ONCE // max(1, a.numel() // max(1, rows[0].shape[-1])))
    parts = zip(rows[0].split(step, -1), rows[1].split(step, -1), strict=True)
    out = torch.zeros(*shape, shape[-1], dtype=torch.float64, device=a.device)
    for x, y in parts:
        out += x.double() @ y.double().transpose(-1, -2)
    return out


@dataclass
class ActivationEvidence:
    """The correlations (units of A, units of B) of one activation whose units are products of symbols."""

    block: UnitBlock  # its symbols are those of the units only
    correlations: Tensor  # (*sizes, *sizes), float64
    groups: Mapping[str, UnitGroup]

    def scores(self, k: int) -> Tensor:
        """(*parents, n, n): summed over the symbols that are neither k nor its parents."""
        parents = self.block.parent_axes(self.groups, k)
        return self._sum_over([*parents, k], parents)

    def pair_scores(self, outer: int, inner: int) -> Tensor:
        """(n, n, m, m) as in `WeightEvidence`."""
        return self._sum_over([outer, inner], []).permute(0, 2, 1, 3)

    def _sum_over(self, kept: list[int], shared: list[int]) -> Tensor:
        rank = len(self.block.sizes)
        left, right = list(range(rank)), [i if i not in kept or i in shared else i + rank for i in range(rank)]
        out = kept + [i + rank for i in kept if i not in shared]
        return torch.einsum(self.correlations, left + right, out)

    def state(self) -> Tensor:
        """What `move` changes, to put back with `restore`."""
        return self.correlations

    def restore(self, state: Tensor) -> None:
        """Put B's side back to what `state` gave."""
        self.correlations = state

    def move(self, element: Element) -> None:
        """Carry B's side along with `element`."""
        rank = len(self.block.sizes)
        flat = self.correlations.reshape(-1, *self.block.sizes)
        moved = [self.block.permute(row, self.groups, element) for row in flat] if rank > 1 else None
        if moved is None:
            self.correlations = self.correlations.index_select(1, element[self.block.names[0]])
        else:
            self.correlations = torch.stack(moved).reshape(self.correlations.shape)

    def total(self) -> float:
        """The sum of the correlations of units that stand at the same place."""
        n = int(self.correlations.numel() ** 0.5)
        return float(self.correlations.reshape(n, n).trace())

    def scale(self) -> float:
        """The largest value that `total` could have."""
        return float(self.correlations.numel() ** 0.5)


Similarities = WeightEvidence | ActivationEvidence
