"""Whole weights of one part of a sharded network at a time, as functions of the ranks' shards that can be
differentiated twice.

The derivative of gathering shards is adding up the ranks' gradients and keeping one's own rows, and the derivative
of that is gathering. What a graph saves of whole weights is not kept: it is a note of which they were, and they are
gathered again where the graph is used (`InUse.not_saved`), so that a rank holds the weights of a few parts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diag.distributed.lockstep import TOTAL, Lockstep

PARTS_KEPT = 1  # parts whose weights are kept after their use, as the next use is often near


class Piece(NamedTuple):
    """One tensor (or its flat entries, where it lies whole on all ranks) as rows of `width` entries, of which each
    rank has `each`, the last ones fewer; this one has `own`, from row `first` on."""

    name: str
    shape: tuple[int, ...]
    rows: int
    width: int
    each: int
    first: int
    own: int

    @property
    def padded(self) -> int:
        """Entries of a rank's part in a message."""
        return self.each * self.width


class Unit:
    """A part of the network whose weights are gathered in one message. number: which it is, from 0 on."""

    def __init__(self, number: int, pieces: Sequence[Piece], lock: Lockstep) -> None:
        self.number, self.pieces, self.lock = number, tuple(pieces), lock
        self.size = sum(piece.padded for piece in pieces)

    def whole(self, parts: Sequence[Tensor | None]) -> list[Tensor]:
        """The tensors, whole, from the ranks' parts of them (None: zeros); at least one part is along."""
        like = next(part for part in parts if part is not None)
        message, start = like.new_zeros(self.size), 0
        for piece, part in zip(self.pieces, parts, strict=True):
            if part is not None:
                message[start : start + part.numel()] = part.reshape(-1)
            start += piece.padded
        table = self.lock.gathered(message, TOTAL + 1 + 2 * self.number)
        found, start = [], 0
        for piece in self.pieces:
            columns = table[:, start : start + piece.padded]
            entries = columns.reshape(-1).clone() if columns.is_contiguous() else columns.reshape(-1)
            found.append(entries[: piece.rows * piece.width].view(piece.shape))
            start += piece.padded
        return found

    def own_sum(self, wholes: Sequence[Tensor | None], shapes: Sequence[torch.Size], like: Tensor) -> list[Tensor]:
        """This rank's parts, of these shapes, of the sum over ranks of whole tensors (None: zeros)."""
        table, start = like.new_zeros(self.lock.world, self.size), 0
        for piece, whole in zip(self.pieces, wholes, strict=True):
            if whole is not None:
                rows = whole.new_zeros(self.lock.world * piece.padded)
                rows[: whole.numel()] = (whole.to_dense() if whole.is_sparse else whole).reshape(-1)
                table[:, start : start + piece.padded] = rows.view(self.lock.world, -1)
            start += piece.padded
        found, start = self.lock.summed_parts(table, TOTAL + 2 + 2 * self.number), 0
        parts = []
        for piece, shape in zip(self.pieces, shapes, strict=True):
            parts.append(found[start : start + piece.own * piece.width].view(shape))
            start += piece.padded
        return parts


class Gather(torch.autograd.Function):
    """The whole tensors of a unit from this rank's parts."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, *parts: Tensor) -> Any:
        """Gathers."""
        ctx.unit, ctx.shapes = unit, [part.shape for part in parts]
        ctx.set_materialize_grads(False)
        return tuple(unit.whole(parts))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The sum of the ranks' gradients, of which each keeps its part."""
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(grads))
        return None, *ScatterSum.apply(ctx.unit, ctx.shapes, *grads)


class ScatterSum(torch.autograd.Function):
    """This rank's parts of the sum over ranks of whole tensors; None stands for zeros."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, shapes: Sequence[torch.Size], *wholes: Tensor | None) -> Any:
        """Adds up and scatters."""
        ctx.unit = unit
        ctx.set_materialize_grads(False)
        like = next(whole for whole in wholes if whole is not None)
        return tuple(unit.own_sum(wholes, shapes, like))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The whole of what is differentiated along."""
        if all(grad is None for grad in grads):
            return (None,) * (2 + len(grads))
        along = next(grad for grad in grads if grad is not None)
        filled = [
            along.new_zeros(piece.own, piece.width) if grad is None else grad
            for grad, piece in zip(grads, ctx.unit.pieces, strict=True)
        ]
        wholes = Gather.apply(ctx.unit, *filled)
        return None, None, *(w if n else None for w, n in zip(wholes, ctx.needs_input_grad[2:], strict=True))


class _Saved(NamedTuple):
    """What a graph keeps of a view of whole weights: whose they are, made of which parts, and how it lies in
    them."""

    unit: Unit
    parts: tuple[Tensor, ...]
    place: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


class _Held(NamedTuple):
    unit: Unit
    parts: tuple[Tensor, ...]
    wholes: Sequence[Tensor]


class InUse:
    """The whole weights that this rank holds now."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[int, ...], _Held] = OrderedDict()
        self._pinned: list[tuple[int, ...]] = []
        self._owner: dict[int, tuple[tuple[int, ...], int]] = {}  # a storage's address -> whose it is

    @contextmanager
    def wholes(self, unit: Unit, parts: tuple[Tensor, ...]) -> Iterator[Sequence[Tensor]]:
        """The unit's whole tensors, as functions of the parts, for the time of the context."""
        key = (unit.number, *map(id, parts))
        wholes = Gather.apply(unit, *parts)
        self._hold(key, _Held(unit, parts, wholes))
        self._pinned.append(key)
        try:
            yield wholes
        finally:
            self._pinned.remove(key)
            self._free_idle()

    @contextmanager
    def not_saved(self) -> Iterator[None]:
        """Inside the context graphs save no whole weights."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._free_idle(0)

    def _pack(self, tensor: Tensor) -> Any:
        strided = tensor.layout is torch.strided and tensor.numel()
        owner = self._owner.get(tensor.untyped_storage().data_ptr()) if strided else None
        if owner is None:
            return tensor.detach()  # with its graph it would keep itself alive
        key, place = owner
        held = self._held[key]
        return _Saved(held.unit, held.parts, place, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return saved
        key = (saved.unit.number, *map(id, saved.parts))
        if key not in self._held:
            with torch.no_grad():
                self._hold(key, _Held(saved.unit, saved.parts, saved.unit.whole([p.detach() for p in saved.parts])))
            self._free_idle()
        self._held.move_to_end(key)
        whole = self._held[key].wholes[saved.place].detach()
        return whole.as_strided(saved.size, saved.stride, saved.offset)

    def _hold(self, key: tuple[int, ...], held: _Held) -> None:
        self._drop(key)
        self._held[key] = held
        for place, whole in enumerate(held.wholes):
            if whole.numel():
                self._owner[whole.untyped_storage().data_ptr()] = key, place

    def _free_idle(self, kept: int = PARTS_KEPT) -> None:
        idle = [key for key in self._held if key not in self._pinned]
        for key in idle[: len(idle) - kept]:
            self._drop(key)

    def _drop(self, key: tuple[int, ...]) -> None:
        if self._held.pop(key, None) is not None:
            self._owner = {address: owner for address, owner in self._owner.items() if owner[0] != key}
