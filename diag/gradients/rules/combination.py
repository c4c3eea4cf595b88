"""Blocks of embeddings, of parts of a parameter, and of parameters that several calls use.

`TableRows` is an embedding's G_i = sum_t e(index_it) b_it', `Placed` puts a block into a slice or another order of
a larger parameter, and `combined` adds the uses of one parameter, cross terms included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diag.gradients.rules.blocks import Block, Dense, Outer
from diag.gradients.rules.float64_sums import squared_rows


class TableRows(Block):
    """An embedding's gradients: row index_it of G_i receives b_it; `index` (n, T), `b` (n, T, d)."""

    def __init__(self, index: Tensor, b: Tensor, num_rows: int) -> None:
        self.index, self.b = index, b
        self.n, self.steps, width = b.shape
        self.shape = (num_rows, width)
        self.device, self.dtype = b.device, b.dtype

    def dense(self, examples: slice) -> Tensor:
        b, index = self.b[examples], self.index[examples]
        out = b.new_zeros(b.shape[0], *self.shape)
        return out.scatter_add_(1, index[..., None].expand_as(b), b)

    def dense_rows(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        inside = (self.index >= start) & (self.index < stop)
        out = self.b.new_zeros(self.n, stop - start, self.shape[1])
        index = torch.where(inside, self.index - start, 0)
        return out.scatter_add_(1, index[..., None].expand_as(self.b), self.b * inside[..., None])

    def squared_norms(self) -> Tensor:
        keys = self.index + torch.arange(self.n, device=self.index.device)[:, None] * self.shape[0]
        unique, inverse = torch.unique(keys, return_inverse=True)
        if len(unique) == keys.numel():  # no row twice, as with positions
            return squared_rows(self.b).sum(1)
        merged = self.b.new_zeros(len(unique), self.shape[1]).index_add_(0, inverse.flatten(), self.b.flatten(0, 1))
        norms = torch.zeros(self.n, dtype=torch.float64, device=self.b.device)
        return norms.index_add_(0, unique // self.shape[0], squared_rows(merged))

    def _sum(self, group: Tensor) -> Tensor:
        out = self.b.new_zeros(self.shape)
        return out.index_add_(0, self.index[group].flatten(), self.b[group].flatten(0, 1))

    def project(self, directions: Tensor) -> Tensor:
        return torch.stack([(v[self.index] * self.b).flatten(1).sum(1) for v in directions], 1)

    def gram(self, other: Block) -> Tensor:
        if not isinstance(other, TableRows):
            return super().gram(other)
        used = torch.unique(torch.cat([self.index.flatten(), other.index.flatten()]))
        mine, theirs = (
            TableRows(torch.searchsorted(used, block.index.contiguous()), block.b, len(used))
            for block in (self, other)
        )
        return Block.gram(mine, theirs)


class Placed(Block):
    """A block whose elements sit at flat `positions` of a parameter of shape `shape`."""

    def __init__(self, block: Block, positions: Tensor, shape: Sequence[int]) -> None:
        self.block, self.positions = block, positions.flatten()
        self.n, self.shape = block.n, tuple(shape)
        self._distinct = len(self.positions.unique()) == len(self.positions)
        self.device, self.dtype = block.device, block.dtype

    def dense(self, examples: slice) -> Tensor:
        values = self.block.dense(examples).flatten(1)
        out = values.new_zeros(values.shape[0], self.size)
        return out.index_add_(1, self.positions, values).view(-1, *self.shape)

    def squared_norms(self) -> Tensor:
        # A table looked up by index may hold one element in many places: then their gradients add up.
        return self.block.squared_norms() if self._distinct else super().squared_norms()

    def group_sums(self, groups: Sequence[Tensor]) -> Tensor:
        sums = self.block.group_sums(groups).flatten(1)
        out = sums.new_zeros(len(sums), self.size)
        return out.index_add_(1, self.positions, sums).view(-1, *self.shape)

    def project(self, directions: Tensor) -> Tensor:
        flat = directions.flatten(1)[:, self.positions]
        return self.block.project(flat.reshape(-1, *self.block.shape))

    def gram(self, other: Block) -> Tensor:
        same = isinstance(other, Placed) and torch.equal(self.positions, other.positions)
        if same and self._distinct:
            assert isinstance(other, Placed)
            return self.block.gram(other.block)
        return super().gram(other)


class Scaled(Block):
    """A block times a number."""

    def __init__(self, block: Block, factor: float) -> None:
        self.block, self.factor = block, factor
        self.n, self.shape = block.n, block.shape
        self.device, self.dtype = block.device, block.dtype

    def dense(self, examples: slice) -> Tensor:
        return self.factor * self.block.dense(examples)

    def dense_rows(self, rows: slice) -> Tensor:
        return self.factor * self.block.dense_rows(rows)

    def squared_norms(self) -> Tensor:
        return self.factor**2 * self.block.squared_norms()

    def group_sums(self, groups: Sequence[Tensor]) -> Tensor:
        return self.factor * self.block.group_sums(groups)

    def project(self, directions: Tensor) -> Tensor:
        return self.factor * self.block.project(directions)

    def gram(self, other: Block) -> Tensor:
        inner = other.block if isinstance(other, Scaled) else other
        factor = self.factor * (other.factor if isinstance(other, Scaled) else 1.0)
        return factor * self.block.gram(inner)


class Sum(Block):
    """The sum of several blocks of one parameter: tied weights, and modules called several times."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)
        self.n, self.shape = blocks[0].n, blocks[0].shape
        self.device, self.dtype = blocks[0].device, blocks[0].dtype

    def dense(self, examples: slice) -> Tensor:
        return torch.stack([b.dense(examples) for b in self.blocks]).sum(0)

    def dense_rows(self, rows: slice) -> Tensor:
        return torch.stack([b.dense_rows(rows) for b in self.blocks]).sum(0)

    def group_sums(self, groups: Sequence[Tensor]) -> Tensor:
        return torch.stack([b.group_sums(groups) for b in self.blocks]).sum(0)

    def project(self, directions: Tensor) -> Tensor:
        return torch.stack([b.project(directions) for b in self.blocks]).sum(0)

    def squared_norms(self) -> Tensor:
        total = torch.stack([b.squared_norms() for b in self.blocks]).sum(0)
        for i, first in enumerate(self.blocks):
            for second in self.blocks[i + 1 :]:
                cross = _cross(first, second)
                if cross is None:
                    return super().squared_norms()
                total = total + 2 * cross
        return total


def _cross(first: Block, second: Block) -> Tensor | None:
    """(n,): <G_i, G'_i> in closed form, or None where there is none."""
    if isinstance(first, Placed) and isinstance(second, Placed):
        # Slices of one parameter that do not meet (query, key and value): nothing in common.
        apart = not torch.isin(first.positions, second.positions).any()
        return torch.zeros(first.n, dtype=torch.float64, device=first.positions.device) if apart else None
    if isinstance(first, TableRows) and isinstance(second, Outer):
        first, second = second, first
    if isinstance(first, Outer) and isinstance(second, TableRows) and first.groups == 1:
        parts = []
        for s in first.slices(3 * first.steps * second.steps):
            a, b = (x[:, 0] for x in first.factors(s))
            index = second.index[s][:, None, :].expand(-1, first.steps, -1)
            terms = b.gather(2, index) * (a @ second.b[s].transpose(-1, -2))
            parts.append(terms.flatten(1).sum(1, dtype=torch.float64))
        return torch.cat(parts)
    return None


def combined(blocks: Sequence[Block]) -> Block:
    """One block for all uses of a parameter: outer products join along time, the rest becomes a `Sum`."""
    outer = [b for b in blocks if type(b) is Outer]
    rows = [b for b in blocks if type(b) is TableRows]
    rest = [b for b in blocks if type(b) not in (Outer, TableRows)]
    if len(outer) > 1:
        a, b = (torch.cat([getattr(o, x) for o in outer], 2) for x in "ab")
        outer = [Outer(a, b, outer[0].shape)]
    if len(rows) > 1:
        index, values = torch.cat([r.index for r in rows], 1), torch.cat([r.b for r in rows], 1)
        rows = [TableRows(index, values, rows[0].shape[0])]
    dense = [b for b in rest if type(b) is Dense]
    if len(dense) > 1:
        rest = [b for b in rest if type(b) is not Dense]
        rest.append(Dense(torch.stack([d.values for d in dense]).sum(0)))
    parts: list[Block] = [*outer, *rows, *rest]
    return parts[0] if len(parts) == 1 else Sum(parts)
