"""Planes of rotary positions: pairs of units of query and key that every position turns by an angle.

What commutes with all these turns is, in each plane, a turn and a scale (a complex number z): the keys may take z,
the queries the inverse transposed, 1 / conj z, and each product of a query and a key stays what it is. The trace
shows a plane's two units as two parts of an axis that carry the same units (halves), as an unmovable axis of two
within one part (real and imaginary parts), or not at all: then an unmovable axis is tried in halves and in
neighbours.

Source: Su et al. 2021, RoFormer (arXiv:2104.09864, section 3.2.1), for the turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from diag.connectivity.symmetries.groups import Symmetries, UnitBlock, UnitGroup
from diag.connectivity.symmetries.linear_groups import LinearGroup, Slot

MOST_UNITS = 512  # of a head


@dataclass(frozen=True)
class PlanePlace:
    """A part of an entry that carries planes; `planes` and `pair`: its block's symbols for which, and which
    unit."""

    entry: str
    block: UnitBlock
    planes: int
    pair: int

    @property
    def around(self) -> list[str]:
        """The other symbols of the axis, by name: heads, and query heads that share a key."""
        axis = self.block.axis_of[self.pair]
        inside = (self.planes, self.pair)
        return [
            n for i, n in enumerate(self.block.names) if self.block.axis_of[i] == axis and i not in inside and n
        ]

    def slot(self, kind: str, parents: Sequence[str] = (), action: int = 1) -> Slot:
        """Where a map acts: "plane" on the two units of each plane, "scale" on both alike."""
        above = tuple(self.block.names.index(p) for p in parents)
        if kind == "scale":
            return Slot(self.entry, self.block, self.planes, above, action)
        return Slot(self.entry, self.block, self.pair, (*above, self.planes), action)


def plane_places(found: Symmetries) -> dict[str, list[PlanePlace]]:
    """Every part that may carry planes, by the units that number them, or by how and how many: what is sure
    first."""
    seen: dict[str, list[PlanePlace]] = {}
    tried: dict[str, list[PlanePlace]] = {}
    still = {n for blocks in found.layout.values() for b in blocks for n in b.names if n}
    still -= {*found.groups, *found.contracted}
    for entry, blocks in found.layout.items():
        if entry not in found.tied:
            for place in [*_twins(entry, blocks, {*still, *found.contracted}), *_pairs(entry, blocks, still)]:
                seen.setdefault(place.block.names[place.planes], []).append(place)
            for how, place in _split(entry, blocks, still):
                tried.setdefault(f"{how} of {place.block.sizes[place.planes]} planes", []).append(place)
    return {n: held for n, held in {**seen, **tried}.items() if len(held) > 1}


def shared(acting: Sequence[PlanePlace]) -> tuple[list[str], tuple[int, ...]]:
    """The symbols around the planes that all of these have, and their sizes, the planes' own last."""
    first = acting[0]
    names = [n for n in first.around if all(n in place.around for place in acting)]
    sizes = [first.block.sizes[first.block.names.index(n)] for n in names]
    return names, (*sizes, first.block.sizes[first.planes])


def groups_of_planes(
    held: Sequence[PlanePlace], vector: Sequence[int], taken: Mapping[str, UnitGroup]
) -> Iterator[tuple[LinearGroup, UnitGroup]]:
    """The groups that may act with these actions, the larger first, and their units under a name of their own."""
    acting = [(p, e) for p, e in zip(held, vector, strict=True) if e]
    names, sizes = shared([p for p, _ in acting])
    first, units = acting[0][0], f"planes of {acting[0][0].entry}"
    while units in taken:
        units += "'"
    places = ((first.entry, first.block.axis_of[first.pair]),)
    for kind in ("plane", "scale"):
        parents, size = (sizes, 2) if kind == "plane" else (sizes[:-1], sizes[-1])
        slots = tuple(p.slot(kind, names, e) for p, e in acting)
        above = (*names, first.block.names[first.planes]) if kind == "plane" else tuple(names)
        name = f"{kind} of {units}"
        yield LinearGroup(name, kind, units, size, parents, slots), UnitGroup(units, size, above, parents, places)


def _twins(entry: str, blocks: Sequence[UnitBlock], units: set[str]) -> Iterator[PlanePlace]:
    """Two parts of one axis with the same units; several such pairs (query and key in one entry) in their order."""
    waiting: dict[tuple[object, ...], UnitBlock] = {}
    for block in sorted(blocks, key=lambda b: [int(p[0]) for p in b.positions if len(p)]):
        like = (block.names, block.sizes, block.axis_of)
        if like not in waiting:
            waiting[like] = block
            continue
        other = waiting.pop(like)
        for k, name in enumerate(block.names):
            if name in units and _apart(other, block) == block.axis_of[k] and block.sizes[k] > 1:
                joined, at = _joined(other, block, block.axis_of[k])
                yield PlanePlace(entry, joined, k + (k >= at), at)


def _pairs(entry: str, blocks: Sequence[UnitBlock], units: set[str]) -> Iterator[PlanePlace]:
    """Two unmovable symbols of one axis, one of them of size two."""
    for block in blocks:
        still = [k for k, n in enumerate(block.names) if n in units and block.sizes[k] > 1]
        for pair in still:
            for planes in still:
                if pair != planes and block.sizes[pair] == 2 and block.axis_of[pair] == block.axis_of[planes]:
                    yield PlanePlace(entry, block, planes, pair)


def _split(entry: str, blocks: Sequence[UnitBlock], units: set[str]) -> Iterator[tuple[str, PlanePlace]]:
    """An unmovable symbol taken as pairs of neighbours, and as two halves."""
    for block in blocks:
        for k, name in enumerate(block.names):
            if name in units and block.sizes[k] % 2 == 0 and 4 <= block.sizes[k] <= MOST_UNITS:
                half = block.sizes[k] // 2
                yield "neighbours", PlanePlace(entry, _factored(block, k, (name, ""), (half, 2)), k, k + 1)
                yield "halves", PlanePlace(entry, _factored(block, k, ("", name), (2, half)), k + 1, k)


def _factored(block: UnitBlock, k: int, names: tuple[str, str], sizes: tuple[int, int]) -> UnitBlock:
    """The block with its symbol k as two."""
    return replace(
        block,
        names=(*block.names[:k], *names, *block.names[k + 1 :]),
        sizes=(*block.sizes[:k], *sizes, *block.sizes[k + 1 :]),
        axis_of=(*block.axis_of[:k], block.axis_of[k], *block.axis_of[k:]),
    )


def _apart(a: UnitBlock, b: UnitBlock) -> int | None:
    """The one axis on which two blocks stand at different places."""
    differ = [i for i, (p, q) in enumerate(zip(a.positions, b.positions, strict=True)) if not torch.equal(p, q)]
    return differ[0] if len(differ) == 1 else None


def _joined(a: UnitBlock, b: UnitBlock, axis: int) -> tuple[UnitBlock, int]:
    """Both blocks as one, with a symbol of size two before those of the axis; and where it stands."""
    at = a.axis_of.index(axis)
    positions = list(a.positions)
    positions[axis] = torch.cat([a.positions[axis], b.positions[axis]])
    return replace(
        a,
        positions=tuple(positions),
        names=(*a.names[:at], "", *a.names[at:]),
        sizes=(*a.sizes[:at], 2, *a.sizes[at:]),
        axis_of=(*a.axis_of[:at], axis, *a.axis_of[at:]),
    ), at
