"""Weight matching beyond permutations: rotations, signs, scales and invertible maps of network B onto network A.

Both networks are brought into their standard form (`gauge`), in which all that is left to match is orthogonal: a
permutation with signs of hidden units, of heads, a rotation inside each head (under rotary positions, one of each
plane), a rotation of the residual stream. As in weight matching, <A, g(B)> is raised one set of units at a time
with all others fixed, a linear assignment or an orthogonal Procrustes problem each; the standard form of A is
then undone on B. Every step is a symmetry, so B's function stays what it is.

Sources: Ainsworth, Hayase & Srinivasa 2023 (arXiv:2209.04836) for the ascent; Theus et al. 2025 (arXiv:2506.22712)
for its larger groups in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Self

import torch
from torch import Tensor

from diag.connectivity.alignment import (
    SMALLEST_GAIN,
    Alignment,
    CoordinateAscent,
    best_of,
    compose,
    orders_of,
    result_of,
)
from diag.connectivity.fit import check_states_fit
from diag.connectivity.symmetries.gauge import standard_form, undone, usable_gains
from diag.connectivity.symmetries.groups import Element, Symmetries
from diag.connectivity.symmetries.linear_groups import (
    SQUARE,
    LinearGroup,
    LinearSymmetries,
    Move,
    Slot,
    orthogonal_part,
    slots_of,
    turn_part,
)
from diag.linalg.assignment import best_assignment

ORDERS = 3
_State = dict[str, Tensor]


def align_linear(
    symmetries: Symmetries,
    linear: LinearSymmetries,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    *,
    orders: int = ORDERS,
    seed: int = 0,
) -> Alignment:
    """Weight matching of B to A over permutations and the linear groups.

    state_a, state_b: state dicts of the traced model. orders: how many orders of visiting the units are tried, the
    best is kept. `objective`, `before` and `limit` are those of the standard forms; `element` holds the
    permutations alone. Raises InvalidInput where the states do not fit, or for fewer than one order.
    """
    visits = orders_of(visited(symmetries, linear), orders, seed)
    check_states_fit(state_a, state_b, symmetries.shapes)
    forms = StandardForms.of(linear, state_a, state_b)
    best = best_of(LinearAscent(symmetries, linear, forms.a, forms.b, forms.gains).run(order) for order in visits)
    return result_of(best, forms.back(best.state, state_b), orders, "weights")


def visited(symmetries: Symmetries, linear: LinearSymmetries) -> list[str]:
    """The sets of units that an ascent visits, in the order of the data flow."""
    return [*symmetries.order, *symmetries.contracted, *(g.units for g in linear.of_kind("plane"))]


@dataclass(frozen=True)
class StandardForms:
    """Two networks in their standard forms, float64; gains: the groups of gains that are one in both."""

    linear: LinearSymmetries
    a: _State
    b: _State
    gains: set[str]
    of_a: list[Move]

    @classmethod
    def of(cls, linear: LinearSymmetries, state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor]) -> Self:
        """Those of two state dicts that fit the model."""
        a, b = _wide(state_a), _wide(state_b)
        gains = usable_gains(linear, a, b)
        moves = standard_form(linear, a, gains)
        return cls(linear, linear.apply(moves, a), linear.apply(standard_form(linear, b, gains), b), gains, moves)

    def back(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """B out of A's standard form, in the number formats of `like`."""
        moved = self.linear.apply(undone(self.linear, self.of_a), state)
        return {n: t.to(like[n].dtype) if n in like else t for n, t in moved.items()}


def _wide(state: Mapping[str, Tensor]) -> _State:
    return {n: t.detach().double() if t.is_floating_point() else t for n, t in state.items()}


class LinearAscent(CoordinateAscent):
    """Coordinate ascent of <A, g(B)> over orthogonal maps g, from standard forms."""

    def __init__(
        self, symmetries: Symmetries, linear: LinearSymmetries, a: _State, b: _State, gains: set[str]
    ) -> None:
        self.symmetries, self.linear, self.a, self.state = symmetries, linear, a, dict(b)
        self.units = {**symmetries.contracted, **symmetries.groups}
        counted = set(symmetries.parameters)
        self.slots = {n: [s for s in slots_of(symmetries, n) if s.entry in counted] for n in self.units}
        usable = [g for g in linear.groups.values() if set(g.first) <= gains]
        self.rotations = {g.units: g for g in usable if g.kind in SQUARE}
        self.planes = {n: [g for g in usable if g.kind == "plane" and _above(g) == [n]] for n in self.units}
        for name, held in self.planes.items():  # matched with the turn of each plane, not as they stand
            self.slots[name] = [
                s for s in self.slots[name] if not any(_within(s, p) for g in held for p in g.slots)
            ]
        signs = [g for g in usable if g.kind == "sign" and any(s.entry in counted for s in g.slots)]
        self.signs = {n: [g for g in signs if g.units == n] for n in self.units}
        self.children = {n: [c for c, g in self.units.items() if g.parents == (n,)] for n in self.units}
        self.element = symmetries.identity()
        named = [n for n in counted if n not in symmetries.tied and a[n].is_floating_point()]
        self.limit = (_square(a, named) * _square(b, named)) ** 0.5
        self.before = self.objective = self._total(named)

    def improve(self, name: str) -> bool:
        if name in self.rotations:
            group, counted = self.rotations[name], self.symmetries.parameters
            held = [_scores(s, self.a, self.state) for s in group.slots if s.entry in counted]
            if not held:
                return False
            return self._take(linear=[(group, group.closest(torch.stack(held).sum(0)))])
        if name not in self.symmetries.groups or not (self.slots[name] or self.planes[name]):
            return False
        scores, inner = self._head_scores(name)
        flips = list(product((False, True), repeat=len(self.signs[name])))
        tried = torch.stack([scores + self._flat_scores(name, flip) for flip in flips])
        best = tried.max(0)
        order = best_assignment(best.values)
        linear = self._flips(name, flips, best.indices.gather(-1, order[..., None]).squeeze(-1))
        element = {name: order}
        for child, maps in inner.items():
            chosen = maps[torch.arange(len(order)), order]
            if child in self.rotations:
                linear.append((self.rotations[child], chosen))
            else:
                element[child] = chosen
        return self._take(element, linear)

    # ---- scores

    def _flat_scores(self, name: str, flip: Sequence[bool]) -> Tensor:
        """(*parents, n, n): of every place but those shared by a movable child, with these sign groups flipped."""
        group = self.units[name]
        total = torch.zeros(*group.shape, group.size, dtype=torch.float64)
        for slot in self.slots[name]:
            if self._child_of(name, slot) is None:
                flipped = sum(f and _holds(g, slot) for f, g in zip(flip, self.signs[name], strict=True)) % 2
                total += (-1) ** flipped * _scores(slot, self.a, self.state)
        return total

    def _head_scores(self, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        """(n, n): what matching the insides of unit i of A and j of B gives; and, by child, the map that does."""
        group = self.units[name]
        total = torch.zeros(*group.shape, group.size, dtype=torch.float64)
        pairs: dict[str, Tensor] = {}
        for slot in self.slots[name]:
            child = self._child_of(name, slot)
            if child is not None:
                pairs[child] = pairs.get(child, torch.zeros(())) + _pair_scores(slot, child, self.a, self.state)
        inner = {}
        for child, values in pairs.items():
            if child in self.rotations:
                inner[child] = orthogonal_part(values)
                total += (values * inner[child]).sum((-1, -2))
            else:
                inner[child] = best_assignment(values)
                total += values.gather(-1, inner[child][..., None]).sum((-1, -2))
        for plane in self.planes[name]:
            values = torch.stack([_plane_scores(s, self.a, self.state) for s in plane.slots]).sum(0)
            inner[plane.units] = turn_part(values)
            total += (values * inner[plane.units]).sum((-1, -2, -3))
        return total, inner

    def _child_of(self, name: str, slot: Slot) -> str | None:
        movable = (c for c in self.children[name] if c in self.rotations or c in self.symmetries.groups)
        inside = [c for c in movable if c in slot.block.names]
        return inside[0] if len(inside) == 1 and slot.block.names.count(inside[0]) == 1 else None

    def _flips(self, name: str, flips: list[tuple[bool, ...]], chosen: Tensor) -> list[tuple[LinearGroup, Tensor]]:
        rows = torch.tensor(flips, dtype=torch.bool).reshape(len(flips), -1)
        return [
            (group, torch.where(rows[chosen][..., k], -1.0, 1.0).double())
            for k, group in enumerate(self.signs[name])
        ]

    # ---- moves

    def _take(self, element: Element | None = None, linear: Sequence[tuple[LinearGroup, Tensor]] = ()) -> bool:
        """Move B where that raises the objective; True where it did."""
        element = dict(element or {})
        moved = _permuted(self.symmetries, element, self.state)
        moved = self.linear.apply([(g.name, m) for g, m in linear], moved)
        changed = [n for n in self.symmetries.parameters if moved[n] is not self.state[n]]
        changed = [n for n in changed if n not in self.symmetries.tied]
        old = self._total(changed)
        kept, self.state = self.state, moved
        gain = self._total(changed) - old
        if gain <= SMALLEST_GAIN * self.limit:
            self.state = kept
            return False
        self.objective += gain
        self.element = compose(self.symmetries.groups, self.element, element)
        return True

    def _total(self, names: Sequence[str]) -> float:
        return sum(float(self.a[n].flatten() @ self.state[n].flatten()) for n in names)


def _permuted(symmetries: Symmetries, element: Element, state: _State) -> _State:
    """`state` with the units of these groups moved; entries that hold none are passed on as they are."""
    if not element:
        return state
    held = {
        n: blocks for n, blocks in symmetries.blocks.items() if any(u in element for b in blocks for u in b.names)
    }
    return replace(symmetries, blocks=held).apply(element, state)


def _scores(slot: Slot, a: _State, b: _State) -> Tensor:
    return slot.rows(a) @ slot.rows(b).transpose(-1, -2)


def _pair_scores(slot: Slot, child: str, a: _State, b: _State) -> Tensor:
    """(n, n, m, m): unit i of A with j of B and, inside them, k with l."""
    front = (slot.place, slot.block.names.index(child))
    x, y = (slot.block.take(s[slot.entry]).double().movedim(front, (0, 1)) for s in (a, b))
    n, m = x.shape[:2]
    scores = x.reshape(n * m, -1) @ y.reshape(n * m, -1).T
    return scores.reshape(n, m, n, m).permute(0, 2, 1, 3)


def _plane_scores(slot: Slot, a: _State, b: _State) -> Tensor:
    """(n, n, planes, 2, 2): head i of A with j of B, plane by plane."""
    return torch.einsum("iper,jpfr->ijpef", slot.rows(a), slot.rows(b))


def _above(group: LinearGroup) -> list[str]:
    """The units around the planes of a group: the heads that its keys stand in."""
    slot = group.slots[0]
    return [slot.block.names[i] for i in slot.parents[:-1]]


def _within(slot: Slot, other: Slot) -> bool:
    """Whether the places of a slot, on the axis of its units, are among those of another."""
    mine, theirs = (s.block.positions[s.block.axis_of[s.place]] for s in (slot, other))
    same = slot.entry == other.entry and slot.block.axis_of[slot.place] == other.block.axis_of[other.place]
    return same and bool(torch.isin(mine, theirs).all())


def _holds(group: LinearGroup, slot: Slot) -> bool:
    return any(s.block is slot.block and s.place == slot.place for s in group.slots)


def _square(state: _State, names: Sequence[str]) -> float:
    return sum(float(state[n].square().sum()) for n in names)
