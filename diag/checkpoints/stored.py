"""Tensors of a checkpoint whose values are still in its files, so that a process reads the parts that it needs.

Where a model is sharded over processes each of them takes its own block of every tensor: what lies in other blocks
is read by none but those who have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

StoredBlock = tuple[slice, ...]


class Chunk(NamedTuple):
    """A block of a tensor, and what reads its values."""

    block: StoredBlock
    read: Callable[[], Tensor]


class StoredTensor(Tensor):
    """A tensor on the CPU of which `part` reads a block; any operation on it reads all of it.

    chunks: fill it and do not overlap.
    """

    chunks: Sequence[Chunk]

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[Chunk]) -> StoredTensor:
        """Without values."""
        made: StoredTensor = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        made.chunks = chunks
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = pytree.tree_map_only(StoredTensor, lambda stored: stored.whole(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StoredTensor({tuple(self.shape)}, {self.dtype})"

    def whole(self) -> Tensor:
        """All of it."""
        return self.part(tuple(slice(0, n) for n in self.shape))

    def part(self, block: StoredBlock) -> Tensor:
        """A block of it. Raises what reading a chunk raises, and ValueError where that is of another shape."""
        found = torch.empty([s.stop - s.start for s in block], dtype=self.dtype)
        for chunk in self.chunks:
            common = [
                slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(block, chunk.block, strict=True)
            ]
            if all(s.start < s.stop for s in common):
                values = chunk.read()
                if tuple(values.shape) != tuple(s.stop - s.start for s in chunk.block):
                    raise ValueError(f"a shard has the shape {tuple(values.shape)}, which is not that of its place")
                found[_within(common, block)] = values[_within(common, chunk.block)]
        return found


def _within(part: Sequence[slice], block: StoredBlock) -> StoredBlock:
    """Where the part of a tensor is in a block of it."""
    return tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(part, block, strict=True))


def block_at(
    shape: Sequence[int], sizes: Sequence[int], place: Sequence[int], placements: Sequence[Any]
) -> StoredBlock | None:
    """The block of a distributed tensor that the process at a place of its mesh, of these sizes, holds.

    None where it is no block: placements are other ones than Shard and Replicate.
    """
    starts, lengths = [0] * len(shape), list(shape)
    for size, own, placement in zip(sizes, place, placements, strict=True):
        if type(placement).__name__ == "Shard":
            axis = placement.dim
            each = -(-lengths[axis] // size)
            first = min(own * each, lengths[axis])
            starts[axis] += first
            lengths[axis] = min(each, lengths[axis] - first)
        elif type(placement).__name__ != "Replicate":
            return None
    return tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
