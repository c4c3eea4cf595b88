"""Find the linear symmetries of a model beyond its permutations, and check each of them by the outputs.

The axes that carry the same units are those of the traced permutation symmetries, with the units of query and key,
which are no permutation group, and the planes of rotary positions (`planes`). What the weights on them can take up
is read from gradients (`moments`), at perturbed weights, so that no constant of a fresh network decides; signs,
which no derivative shows, are tried. Every group found is then moved at random: the outputs must stay what they
were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from diag.connectivity.symmetries.find import change_of_outputs, on_device, outputs_at, perturbed
from diag.connectivity.symmetries.groups import Symmetries, UnitGroup
from diag.connectivity.symmetries.linear_groups import (
    LinearGroup,
    LinearSymmetries,
    Slot,
    covered,
    one_each,
    same_place,
    slots_of,
    with_idle,
    written,
)
from diag.connectivity.symmetries.moments import NULL, OutputGradients, antisymmetric, diagonal, full, null_vectors
from diag.connectivity.symmetries.planes import PlanePlace, groups_of_planes, plane_places, shared
from diag.connectivity.symmetries.tracing import Lifted
from diag.errors import Unsupported, first_line
from diag.snapshot.batch import Batch, map_tensors
from diag.snapshot.preserve import preserved
from diag.snapshot.reading.forms import as_batch

SAME_OUTPUTS = 1e-9  # relative change, float64
PROJECTIONS = 4
MOST_PROJECTIONS = 32
SIGN_PLACES = 8  # 2^8 - 1 forward passes


def find_linear_symmetries(
    model: nn.Module,
    example: Any,
    found: Symmetries,
    *,
    seed: int = 0,
    max_examples: int | None = 2,
    tick: Callable[[], None] = lambda: None,
) -> LinearSymmetries:
    """The linear groups of `model` beyond the permutations `found`.

    example: one batch, `(inputs, targets)` or a dict; its first `max_examples` are used. tick: called between the
    passes; it may raise. Measured on a copy of the model, in float64 throughout: casts of its own to less are
    lifted. Groups that change the outputs by more than a relative 1e-9 are left out, with the reason.
    Raises Unsupported where the model cannot be copied, runs in no float64 or gives outputs that are not finite.
    """
    example = as_batch(example)
    few = example.slice(0, min(example.size, max_examples or example.size))
    with preserved(model):
        try:
            wide = copy.deepcopy(model).double().requires_grad_(False)
            used = _wide_enough(wide, few, example)
        except Exception as error:
            raise Unsupported(
                f"The model does not run in float64 on a copy ({first_line(error)}), in which its linear "
                "symmetries are looked for; align by permutations alone."
            ) from error
    with preserved(wide):
        return _Search(wide, used, found, seed, tick).run()


def _wide_enough(model: nn.Module, *examples: Batch) -> Batch:
    """The first of the examples, in float64, on which the model runs: it may be written for one batch size."""
    for number, example in enumerate(examples, 1):
        placed = on_device(model, example)
        args, kwargs = map_tensors(_wide, (placed.args, placed.kwargs))
        used = replace(placed, args=args, kwargs=kwargs)
        try:
            with torch.no_grad(), Lifted():
                used.forward(model)
            break
        except Exception:
            if number == len(examples):
                raise
    return used


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class _Search:
    def __init__(
        self, model: nn.Module, example: Batch, found: Symmetries, seed: int, tick: Callable[[], None]
    ) -> None:
        self.model, self.example, self.found, self.seed, self.tick = model, example, found, seed, tick
        self.own = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
        held = {n for n, _ in model.named_parameters()} | set(found.blocks)
        constants = {n: t for n, t in self.own.items() if n not in held}  # tables of angles, masks: no weights
        self.state = {**perturbed(self.own, seed), **constants}
        self.before = [self._outputs(state) for state in (self.own, self.state)]
        self.units: dict[str, UnitGroup] = {**found.groups, **found.contracted}
        self.places = {n: [s for s in slots_of(found, n) if self._moves(s)] for n in self.units}
        parameters = {n for n, _ in model.named_parameters()}
        self.slots = {n: [s for s in places if s.entry in parameters] for n, places in self.places.items()}
        self.planes = {n: [p for p in held if p.entry in parameters] for n, held in plane_places(found).items()}
        counts = [(len(s), self._count(n)) for n, s in self.slots.items()]
        counts += [(len(held), shared(held)[1][-1]) for held in self.planes.values() if held]
        most = max((places // max(1, units) for places, units in counts), default=0)
        self.projections = min(MOST_PROJECTIONS, PROJECTIONS + 2 * most)
        self.groups: dict[str, LinearGroup] = {}
        self.refused: dict[str, str] = {}
        self.deviation = 0.0

    def _moves(self, slot: Slot) -> bool:
        return slot.entry in self.own and self.own[slot.entry].is_floating_point()

    def _count(self, name: str) -> int:
        return int(torch.Size(self.units[name].shape).numel())

    def run(self) -> LinearSymmetries:
        if not any(self.slots.values()) and not any(self.planes.values()):
            return self._so_far()
        gradients = OutputGradients(self.model, self.example, self.state, self.projections, self.seed + 2)
        for held in self.planes.values():
            self._turns(held, gradients)
        for name in sorted(self.slots, key=lambda n: -len(self.units[n].parents)):  # what is inside a head first
            self._scales_and_invertible(name, gradients)
        for name in self.found.groups:
            if not any(g.units == name and g.kind == "invertible" for g in self.groups.values()):
                self._orthogonal(name)
        for name in self.found.groups:
            if not any(g.units == name and g.kind in ("invertible", "orthogonal") for g in self.groups.values()):
                self._signs(name)
        return self._so_far()

    def _so_far(self) -> LinearSymmetries:
        return LinearSymmetries(self.groups, self.refused, self.deviation, self.found.tied)

    # ---- scale, invertible

    def _scales_and_invertible(self, name: str, gradients: OutputGradients) -> None:
        slots = self.slots[name]
        solved = null_vectors(diagonal(gradients, slots)) if slots else None
        if solved is None:
            self.refused[name] = (
                "the outputs on the example are too few, or do not depend on its weights, to tell what these can "
                "take up"
            )
            return
        vectors, idle = solved
        for number, vector in enumerate(vectors):
            acting = written(with_idle(slots, vector, idle))
            if self._contained(name, acting):
                continue
            invertible = self.units[name].size > 1 and _vanishes(gradients, acting)
            kind = "invertible" if invertible else "scale"
            group = self._group(name, kind, acting, number)
            if self._keep(group) and kind == "scale":
                self._mark_gain(group)

    # ---- planes

    def _turns(self, held: Sequence[PlanePlace], gradients: OutputGradients) -> None:
        """Turns and scales of the planes of query and key, layer by layer; scales alone where no turn is free."""
        known = covered(s for g in self.groups.values() for s in g.slots)
        held = [p for p in held if not covered([p.slot("scale")]) <= known]
        solved = null_vectors(diagonal(gradients, [p.slot("scale") for p in held])) if held else None
        for vector in solved[0] if solved else []:
            for group, units in groups_of_planes(held, vector, self.units):
                if not self._wrong(group):
                    self.groups[group.name], self.units[units.name] = group, units
                    break

    def _contained(self, name: str, slots: Sequence[Slot]) -> bool:
        """Whether maps of the units inside of these (the units of a head) do the same and more."""
        inside = [g for g in self.groups.values() if name in self.units[g.units].parents]
        return bool(inside) and covered(slots) <= covered(s for g in inside for s in g.slots)

    def _group(self, name: str, kind: str, slots: Sequence[Slot], number: int = 0, **more: Any) -> LinearGroup:
        units = self.units[name]
        label = f"{kind} of {name}" + (f" ({number + 1})" if number else "")
        return LinearGroup(label, kind, name, units.size, units.parent_sizes, tuple(slots), **more)

    def _mark_gain(self, group: LinearGroup) -> None:
        """Where the sign does not matter either, a weight of one number a unit is a norm's gain."""
        vectors = [s for s in group.slots if s.action == 1 and one_each(s)]
        named = [s for s in vectors if not s.entry.endswith("bias")]
        if len(named) == 1 and not self._wrong(replace(group, kind="sign")):
            self.groups[group.name] = replace(group, gain=named[0])

    # ---- orthogonal

    def _orthogonal(self, name: str) -> None:
        slots = self.slots[name]
        gains = [g for g in self.groups.values() if g.units == name and g.gain is not None]
        first = tuple(g.name for g in gains)
        at = self._so_far()
        state = at.apply(at.unit_gains(self.state, first), self.state)
        rest = [s for s in slots if all(not same_place(s, g.gain) for g in gains)]
        if self.units[name].size < 3 or len(rest) < 2:
            return
        for acting, centred in self._rotated(rest, state):
            if self._keep(self._group(name, "orthogonal", acting, first=first, centred=centred)):
                return
        held = [s for s in rest if one_each(s) and not s.entry.endswith("bias")]
        ones = {s.entry: torch.ones_like(state[s.entry]) for s in held}
        free = [s for s in rest if not any(s is h for h in held)]
        if held and any(self._rotated(free, {**state, **ones})):
            self.refused[f"orthogonal of {name}"] = (
                f"the gain {held[-1].entry} cannot be put into what reads it (weights that are tied, or read "
                "elsewhere too), and a rotation would have to commute with it"
            )

    def _rotated(self, slots: Sequence[Slot], state: dict[str, Tensor]) -> Iterator[tuple[list[Slot], bool]]:
        """The places that a rotation of all units leaves the outputs alone on, and whether it keeps their sum."""
        gradients = OutputGradients(self.model, self.example, state, PROJECTIONS, self.seed + 3)
        for centred in (False, True):
            solved = null_vectors(antisymmetric(gradients, slots, centred))
            for vector in solved[0] if solved else []:
                acting = [s for s, e in zip(slots, vector, strict=True) if e == 1]
                if -1 not in vector and len(acting) > 1:
                    yield acting, centred

    # ---- signs

    def _signs(self, name: str) -> None:
        slots, basis = self.places[name], list[set[int]]()
        subsets: Iterable[tuple[int, ...]] = _subsets(len(slots))
        if len(slots) > SIGN_PLACES:  # a stream: all that writes or reads it, its gains left as they are
            vectors = [one_each(s) and not s.entry.endswith("bias") for s in slots]
            subsets = [tuple(i for i, vector in enumerate(vectors) if not vector)]
        for subset in subsets:
            if not _independent(basis, set(subset)):
                continue
            group = self._group(name, "sign", [slots[i] for i in subset], len(basis))
            if not self._wrong(group):
                basis.append(set(subset))
                if not self._contained(name, group.slots):
                    self._keep(group)

    # ---- the check

    def _keep(self, group: LinearGroup) -> bool:
        wrong = self._wrong(group)
        if wrong:
            self.refused[group.name] = wrong
        else:
            self.groups[group.name] = group
        return not wrong

    def _outputs(self, state: dict[str, Tensor]) -> list[Tensor]:
        with Lifted():
            return outputs_at(self.model, self.example, state)

    def _wrong(self, group: LinearGroup) -> str:
        """Why the group is none, or nothing."""
        with_it = LinearSymmetries({**self.groups, group.name: group}, tied=self.found.tied)
        for state, before in ((self.state, self.before[1]), (self.own, self.before[0])):
            self.tick()
            moved = with_it.apply(with_it.random(group.name, state, self.seed), state)
            change = change_of_outputs(before, self._outputs(moved))
            if not change <= SAME_OUTPUTS:
                return f"such a map changed the outputs (relative change {change:.1e})"
            self.deviation = max(self.deviation, change)
        return ""


def _vanishes(gradients: OutputGradients, acting: Sequence[Slot]) -> bool:
    """Whether the moments of these places cancel for every linear map."""
    moments = [full(gradients, slot) for slot in acting]
    size = sum(float(m.norm()) for m in moments)
    total = torch.stack(moments).sum(0)
    return float(total.norm()) <= NULL * size


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    for size in range(2, count + 1):
        yield from combinations(range(count), size)


def _independent(basis: Sequence[set[int]], candidate: set[int]) -> bool:
    """Whether no sum of the basis (over two elements) is the candidate."""
    sums = [set[int]()]
    for vector in basis:
        sums += [s ^ vector for s in sums]
    return candidate not in sums
