"""Permutation groups of a network, and what an element of them does to a state dict.

A group element is a dict of index tensors, one per `UnitGroup`: after it is applied, unit i of a group is the
unit that was at `element[name][..., i]`. A group with parents (units within attention heads) has one
permutation for each position of its parents, counted after the parents have moved.

Source: the permutation symmetries of Ainsworth, Hayase & Srinivasa 2023 (arXiv:2209.04836, section 3), with
the specification found by tracing instead of written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from diag.errors import InvalidInput

Element = dict[str, Tensor]


@dataclass(frozen=True)
class UnitGroup:
    """`size` units that may be permuted; `axes` lists every (state entry, axis) that carries them."""

    name: str
    size: int
    parents: tuple[str, ...] = ()
    parent_sizes: tuple[int, ...] = ()
    axes: tuple[tuple[str, int], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """How many permutations the group has, by the units of its parents, and the units of each."""
        return (*self.parent_sizes, self.size)


@dataclass(frozen=True)
class UnitBlock:
    """A part of a tensor whose axes are products of symbols.

    `positions[k]` are the places on the tensor's axis k; `names` and `sizes` are its symbols, row-major over
    all axes; `axis_of[i]` is the axis that symbol i lies on.
    """

    positions: tuple[Tensor, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    axis_of: tuple[int, ...]

    def take(self, tensor: Tensor) -> Tensor:
        """The block of `tensor`, one tensor axis per symbol."""
        for axis, positions in enumerate(self.positions):
            if not _whole(positions, tensor.shape[axis]):
                tensor = tensor.index_select(axis, positions.to(tensor.device))
        return tensor.reshape(self.sizes)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write `values` (as `take` gives them) into `tensor`."""
        shape = tuple(p.numel() for p in self.positions)
        if all(_whole(p, n) for p, n in zip(self.positions, tensor.shape, strict=True)):
            tensor.copy_(values.reshape(shape))
            return
        places = [p.to(tensor.device).view(-1, *[1] * (len(shape) - 1 - k)) for k, p in enumerate(self.positions)]
        tensor[tuple(places)] = values.reshape(shape)

    def permute(self, values: Tensor, groups: Mapping[str, UnitGroup], element: Element) -> Tensor:
        """Move the units of every group in `element`, parents before what depends on them."""
        for k in sorted(range(len(self.names)), key=lambda i: len(self._parents(groups, i))):
            if self.names[k] in element:
                values = permute_axis(values, k, self.parent_axes(groups, k), element[self.names[k]])
        return values

    def _parents(self, groups: Mapping[str, UnitGroup], k: int) -> tuple[str, ...]:
        return groups[self.names[k]].parents if self.names[k] in groups else ()

    def parent_axes(self, groups: Mapping[str, UnitGroup], k: int) -> list[int]:
        """Where the parents of symbol k stand in this block: on its own axis if there, else anywhere."""
        found = []
        for parent in self._parents(groups, k):
            places = [i for i, name in enumerate(self.names) if name == parent]
            found.append(min(places, key=lambda i: (self.axis_of[i] != self.axis_of[k], abs(i - k))))
        return found


def _whole(positions: Tensor, size: int) -> bool:
    return positions.numel() == size and bool((positions[1:] > positions[:-1]).all())


def permute_axis(values: Tensor, k: int, parents: list[int], permutation: Tensor) -> Tensor:
    """Permute axis k of `values`, by a permutation (*sizes of the parent axes, n)."""
    permutation = permutation.to(values.device)
    if not parents:
        return values.index_select(k, permutation)
    shape = [1] * values.ndim
    for size, axis in zip(permutation.shape, [*parents, k], strict=True):
        shape[axis] = size
    order = sorted(range(len(parents) + 1), key=[*parents, k].__getitem__)
    index = permutation.permute(order).reshape(shape)
    return values.gather(k, index.expand(values.shape))


@dataclass(frozen=True)
class UnitActivation:
    """An activation that carries units: output number `output` of the `operation`-th operation."""

    operation: int
    name: str
    output: int
    block: UnitBlock


@dataclass(frozen=True)
class Symmetries:
    """The permutation groups of one model.

    groups: by name. blocks: for each state entry that a group moves, its blocks. frozen: names of what is no
    group -> why its units cannot move. unknown: ATen operations without a rule -> the module that used them.
    shapes: of all state entries at tracing. parameters: names of those that are parameters. tied: later names
    of a shared tensor -> its first. captures: activations that carry units. layout: the blocks of every entry.
    contracted: units that are summed over between two activations (query and key): no permutation group, and a
    candidate for a larger one. deviation: the largest relative change of the outputs that moving the units made
    (the check; NaN where it was not made). tolerance: what it may be, by the coarsest floating type in the
    forward pass.
    """

    groups: dict[str, UnitGroup]
    blocks: dict[str, tuple[UnitBlock, ...]]
    frozen: dict[str, str]
    unknown: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    captures: tuple[UnitActivation, ...] = ()
    tied: dict[str, str] = field(default_factory=dict)
    layout: dict[str, tuple[UnitBlock, ...]] = field(default_factory=dict)
    contracted: dict[str, UnitGroup] = field(default_factory=dict)
    deviation: float = float("nan")
    tolerance: float = 1e-4

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Group names, parents before what depends on them, else in the order of the data flow."""
        return tuple(sorted(self.groups, key=lambda n: len(self.groups[n].parents)))

    def identity(self) -> Element:
        """The element that moves nothing."""
        return {n: torch.arange(g.size).expand(g.shape).clone() for n, g in self.groups.items()}

    def random(self, seed: int = 0) -> Element:
        """A uniformly random element; global random state is not touched."""
        generator = torch.Generator().manual_seed(seed)
        return {
            n: torch.rand(g.shape, generator=generator, dtype=torch.float64).argsort(-1)
            for n, g in self.groups.items()
        }

    def apply(self, element: Element, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` with its units moved. Entries without a group are passed on as they are.

        Raises InvalidInput where an entry is missing or has another shape than at tracing.
        """
        out = dict(state)
        for name, blocks in self.blocks.items():
            if name in self.tied and self.tied[name] in out:
                out[name] = out[self.tied[name]]
                continue
            if name not in state or tuple(state[name].shape) != self.shapes[name]:
                found = tuple(state[name].shape) if name in state else "missing"
                raise InvalidInput(
                    f"The state's entry '{name}' is {found}; expected shape {self.shapes[name]} as in the model "
                    "that was traced."
                )
            moved = state[name].detach().clone()
            for block in blocks:
                block.put(moved, block.permute(block.take(state[name].detach()), self.groups, element))
            out[name] = moved
        return out
