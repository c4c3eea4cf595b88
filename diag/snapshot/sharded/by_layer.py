"""A sharded model that is called without any rank holding all of its weights: those of a layer are gathered for the
time of its call.

A layer is what `fully_shard` was called on; what is left belongs to the whole model. Like the copy in `whole.py`
this is one without torch's own hooks, so that it can be differentiated twice; it holds no weights at all between
calls, and its values are those of the sharded model, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diag.distributed.lockstep import Lockstep
from diag.distributed.placement import is_flat, is_spread, own_part
from diag.distributed.together import Together
from diag.errors import Unsupported
from diag.snapshot.sharded.gathering import InUse, Piece, Unit
from diag.snapshot.sharded.whole import bare_copy

LIES_OTHERWISE = (
    "{} has placement {} on {}; a layer at a time is gathered where fully_shard has split parameters by their "
    "first axis over all ranks: leave out ranks='by_layer' and let each rank take a whole copy."
)

# For each piece of a unit, each dict of a module that has the tensor, and under which name.
UnitPlaces = Sequence[Sequence[tuple[MutableMapping[str, Any], str]]]


def can_gather_by_layer(model: nn.Module, world: int) -> bool:
    """Whether fully_shard has split what is sharded by the first axis over all ranks."""
    return not is_flat(model) and all(_can_gather(t, world) for t in (*model.parameters(), *model.buffers()))


def _can_gather(tensor: Any, world: int) -> bool:
    if not is_spread(tensor):
        return True
    split = len(tensor.placements) == 1 and tensor.placements[0].is_shard(0) and tensor.device_mesh.size() == world
    return bool(split) and isinstance(tensor, nn.Parameter)


class ByLayer:
    """`model`: the copy that gathers. `trainable`: the names of the trainable parameters, as the sharded model
    names them. `lock`: how the ranks wait for each other. `in_use`: the whole weights that this rank holds now."""

    def __init__(self, sharded: nn.Module, together: Together) -> None:
        self.lock, self.in_use = Lockstep(together), InUse()
        named = dict(sharded.named_parameters())
        for name, tensor in (*named.items(), *sharded.named_buffers()):
            if not _can_gather(tensor, self.lock.world):
                placements, mesh = tensor.placements, tensor.device_mesh  # type: ignore[attr-defined]
                raise Unsupported(LIES_OTHERWISE.format(name, placements, mesh))
        whole = {n: p for n, p in named.items() if not is_spread(p)}
        if whole:
            together.refuse_different(whole)
        self._pieces = {name: _piece(name, p, self.lock) for name, p in named.items()}
        self.trainable = [name for name, p in named.items() if p.requires_grad]
        self._own = {name: _own_rows(p, self._pieces[name]) for name, p in named.items()}
        self._now: dict[str, Tensor] = self._own
        self.model, self._places = self._copy(sharded, named)

    def _copy(self, sharded: nn.Module, named: dict[str, nn.Parameter]) -> tuple[nn.Module, dict[int, UnitPlaces]]:
        """The copy, whose parameters are empty, and for each unit where the tensors of its pieces belong."""
        empty = {id(p): nn.Parameter(own_part(p).new_empty(0), p.requires_grad) for p in named.values()}
        buffers = {id(b): b.detach().clone() for b in sharded.buffers()}
        model, modules = bare_copy(sharded, {**empty, **buffers})
        places = _places(model)
        owners = {name: _unit_of(sharded, name) for name in named}
        found: dict[int, UnitPlaces] = {}
        for number, owner in enumerate(dict.fromkeys([sharded, *owners.values()])):
            own = [name for name in named if owners[name] is owner]
            found[number] = [places[id(empty[id(named[name])])] for name in own]
            _gathers(modules[id(owner)], self, Unit(number, [self._pieces[name] for name in own], self.lock))
        return model, found

    # -- its values --------------------------------------------------------------------------------------

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shapes of the trainable parameters, by name."""
        return {name: self._pieces[name].shape for name in self.trainable}

    @property
    def own_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of this rank's parts of them."""
        return {name: tuple(self._own[name].shape) for name in self.trainable}

    def own_slices(self) -> Iterator[tuple[slice, int]]:
        """For each of them, which entries of the flat vector of all this rank has, and how many each rank has."""
        start = 0
        for name in self.trainable:
            piece = self._pieces[name]
            first = start + piece.first * piece.width
            yield slice(first, first + piece.own * piece.width), piece.padded
            start += math.prod(piece.shape)

    def own_row(self, name: str, row: int) -> int | None:
        """Where a row of a parameter lies in this rank's part of it; None where another has it."""
        piece = self._pieces[name]
        if piece.width != math.prod(piece.shape[1:]) or len(piece.shape) < 2:
            raise Unsupported(f"Row {row} of {name} is held fixed, which lies whole on each rank; shard it too.")
        return row - piece.first if piece.first <= row < piece.first + piece.own else None

    def values(self, dtype: torch.dtype) -> list[Tensor]:
        """This rank's parts of the trainable parameters, detached; copies where the dtype differs."""
        return [self._own[name].to(dtype) for name in self.trainable]

    @contextmanager
    def at(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Iterator[None]:
        """Inside the context the copy is called at these parts, and at the frozen parameters in this dtype."""
        before = self._now
        frozen = {n: p.to(dtype) if p.is_floating_point() else p for n, p in self._own.items()}
        self._now = frozen | dict(zip(self.trainable, parameters, strict=True))
        try:
            yield
        finally:
            self._now = before

    @contextmanager
    def placed(self, unit: Unit) -> Iterator[None]:
        """Inside the context the unit's modules have their whole weights."""
        with ExitStack() as stack:
            if unit.number == 0:  # the whole model
                stack.enter_context(self.lock.one_pass())
            if unit.pieces:
                parts = tuple(self._now[piece.name] for piece in unit.pieces)
                wholes = stack.enter_context(self.in_use.wholes(unit, parts))
                stack.enter_context(_put(self._places[unit.number], wholes))
            yield


class _Gathering:
    """What a unit's module is, too."""

    _diag_unit: Unit
    _diag_layers: ByLayer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = type(self)
        with kind._diag_layers.placed(kind._diag_unit):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a model whose layers are gathered from other processes is not copied")


def _gathers(module: nn.Module, layers: ByLayer, unit: Unit) -> None:
    kind = type(module)
    of_it = {"_diag_unit": unit, "_diag_layers": layers, "__module__": kind.__module__}
    module.__class__ = type(kind.__name__, (_Gathering, kind), of_it)


def _places(model: nn.Module) -> dict[int, list[tuple[MutableMapping[str, Any], str]]]:
    """By the id of a parameter, where it is."""
    found: dict[int, list[tuple[MutableMapping[str, Any], str]]] = {}
    for module in model.modules():
        for key, tensor in module._parameters.items():
            if tensor is not None:
                found.setdefault(id(tensor), []).append((module._parameters, key))
    return found


@contextmanager
def _put(places: UnitPlaces, tensors: Sequence[Tensor]) -> Iterator[None]:
    before = [[held[key] for held, key in each] for each in places]
    for each, tensor in zip(places, tensors, strict=True):
        for held, key in each:
            held[key] = tensor
    try:
        yield
    finally:
        for each, own in zip(places, before, strict=True):
            for (held, key), tensor in zip(each, own, strict=True):
                held[key] = tensor


def _unit_of(model: nn.Module, name: str) -> nn.Module:
    """The innermost module around the parameter that `fully_shard` was called on; else the model."""
    owners, module = [model], model
    for part in name.split(".")[:-1]:
        module = module._modules[part]  # type: ignore[assignment]
        owners.append(module)
    return next((m for m in reversed(owners) if hasattr(m, "_get_fsdp_state")), model)


def _piece(name: str, tensor: Any, lock: Lockstep) -> Piece:
    shape = tuple(tensor.shape)
    rows = shape[0] if is_spread(tensor) else tensor.numel()
    width = math.prod(shape[1:]) if is_spread(tensor) else 1
    each = -(-rows // lock.world)
    first = min(lock.rank * each, rows)
    return Piece(name, shape, rows, width, each, first, min(first + each, rows) - first)


def _own_rows(tensor: Any, piece: Piece) -> Tensor:
    own = own_part(tensor)
    if is_spread(tensor):
        return own
    return own.reshape(-1)[piece.first : piece.first + piece.own].clone()
