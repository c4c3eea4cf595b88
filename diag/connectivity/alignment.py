"""Alignment: permute the units of network B so that they stand where the matching units of network A are.

Weight matching needs no data: coordinate ascent of <theta_A, P(theta_B)> over the permutation groups, each
step one linear assignment. Activation matching pairs units by the correlation of their pre-activations on a
probe set, one assignment a group. Both leave B's function as it is; only the order of its units changes.

Sources: Ainsworth, Hayase & Srinivasa 2023 (arXiv:2209.04836, section 3.2, Algorithm 1) for weight matching;
Li et al. 2016 and Jordan et al. 2023 (arXiv:2211.08403) for activation matching by correlation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from diag.connectivity.fit import check_states_fit
from diag.connectivity.matching import Similarities, WeightEvidence
from diag.connectivity.symmetries.groups import Element, Symmetries, UnitGroup, permute_axis
from diag.errors import InvalidInput
from diag.linalg.assignment import best_assignment

SMALLEST_GAIN = 1e-12  # of the objective's largest possible value: a smaller gain is rounding
MAX_PASSES = 100
NESTED_LIMIT = 4096  # inner assignments per outer one; beyond it, inner units keep their present order
CHEAP, EXPENSIVE = 1e9, 1e11  # multiplications a pass: up to which ten orders are tried, and beyond which only one


@dataclass(frozen=True)
class Alignment:
    """What moves B onto A, and how well it does.

    element: the group element to apply to B. state: B's state dict after it. objective: <A, P(B)> over what
    was matched; before: the same with P = identity; limit: its largest possible value. passes: over all
    groups, in the best order. moved: units that changed place, over all groups. units: all units.
    """

    element: Element
    state: dict[str, Tensor]
    objective: float
    before: float
    limit: float
    passes: int
    orders: int
    moved: int
    units: int
    method: str


def align_weights(
    symmetries: Symmetries,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    *,
    names: Iterable[str] | None = None,
    orders: int | None = None,
    max_passes: int = MAX_PASSES,
    seed: int = 0,
) -> Alignment:
    """Weight matching of B to A.

    state_a, state_b: state dicts of the traced model. names: the entries that count in the objective (default:
    the parameters; running statistics move along but do not count). orders: how many orders of visiting the
    groups are tried, the best is kept: the data flow's first, then random ones, from the third on from random
    starts (default 10, 5 or 1 by the cost of a pass). Scores and the objective are in float64. Raises
    InvalidInput where the states do not fit.
    """
    check_states_fit(state_a, state_b, symmetries.shapes)
    counted = set(symmetries.parameters if names is None else names)

    def evidence() -> list[Similarities]:
        return [
            WeightEvidence(
                block, block.take(state_a[n].detach()), block.take(state_b[n].detach()), symmetries.groups
            )
            for n, blocks in symmetries.blocks.items()
            if n in counted and n not in symmetries.tied
            for block in blocks
            if any(name in symmetries.groups for name in block.names)
        ]

    if orders is None:
        cost = _pass_cost(symmetries, counted)
        orders = 10 if cost < CHEAP else 5 if cost < EXPENSIVE else 1
    ascents = _ascents(symmetries, evidence, orders_of(symmetries.order, orders, seed), max_passes, seed)
    best = best_of(ascents)
    return result_of(best, symmetries.apply(best.element, state_b), orders, "weights")


def _pass_cost(symmetries: Symmetries, counted: set[str]) -> float:
    cost = 0.0
    for name in counted & symmetries.blocks.keys():
        numel = float(torch.Size(symmetries.shapes[name]).numel())
        for block in symmetries.blocks[name]:
            cost += sum(numel * symmetries.groups[n].size for n in block.names if n in symmetries.groups)
    return cost


def orders_of(names: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """`count` orders of visiting: the one given, then random ones. Raises InvalidInput for fewer than one."""
    if count < 1:
        raise InvalidInput(f"The number of orders is {count}; expected at least 1.")
    names = list(names)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [[names[i] for i in torch.randperm(len(names), generator=generator)] for _ in range(count - 1)]
    return [names, *shuffled]


def _ascents(
    symmetries: Symmetries,
    evidence: Callable[[], list[Similarities]],
    orders: Sequence[Sequence[str]],
    max_passes: int,
    seed: int,
) -> Iterator[Ascent]:
    for number, order in enumerate(orders):
        ascent = Ascent(symmetries, evidence())
        if number > 1:  # the same start in another order often ends at the same local optimum
            ascent.begin_at(symmetries.random(seed + number))
        yield ascent.run(order, max_passes)


def best_of(ascents: Iterable[AnyAscent]) -> AnyAscent:
    """The ascent that came highest; the first of those that rounding alone sets apart."""
    best: AnyAscent | None = None
    for ascent in ascents:
        if best is None or ascent.objective > best.objective + SMALLEST_GAIN * ascent.limit:
            best = ascent
    assert best is not None
    return best


def result_of(best: CoordinateAscent, state: dict[str, Tensor], orders: int, method: str) -> Alignment:
    """What an ascent came to; `state` is B's, moved by it."""
    places = [(e, torch.arange(e.shape[-1])) for e in best.element.values()]
    return Alignment(
        element=best.element,
        state=state,
        objective=best.objective,
        before=best.before,
        limit=best.limit,
        passes=best.passes,
        orders=orders,
        moved=sum(int((e != i).sum()) for e, i in places),
        units=sum(e.numel() for e, _ in places),
        method=method,
    )


class CoordinateAscent:
    """Raises <A, g(B)> one set of units at a time; see `Alignment` for its numbers."""

    element: Element
    objective: float
    before: float
    limit: float
    passes: int = 0

    def improve(self, name: str) -> bool:
        """The best map of one set of units with all others fixed; True where the objective grew."""
        raise NotImplementedError

    def run(self, order: Sequence[str], max_passes: int = MAX_PASSES) -> Self:
        """Visit the sets of units in this order until none improves; returns itself."""
        while self.passes < max_passes:
            self.passes += 1
            grew = [self.improve(name) for name in order]
            if not any(grew):
                break
        return self


AnyAscent = TypeVar("AnyAscent", bound=CoordinateAscent)


class Ascent(CoordinateAscent):
    """Coordinate ascent over the groups, on whatever evidence there is."""

    def __init__(self, symmetries: Symmetries, evidence: list[Similarities]) -> None:
        self.groups, self.evidence = symmetries.groups, evidence
        self.element = symmetries.identity()
        self.holds = {n: [e for e in evidence if n in e.block.names] for n in self.groups}
        self.children = {n: [d for d, g in self.groups.items() if n in g.parents] for n in self.groups}
        self.limit = sum(e.scale() for e in evidence)
        self.before = self.objective = sum(e.total() for e in evidence)
        self.versions = {id(e): 0 for e in evidence}
        self.seen: dict[str, list[int]] = {}

    def begin_at(self, element: Element) -> None:
        """Move B's side to another start than the order it came in; `before` stays that of the given order."""
        for e in self.evidence:
            e.move({n: p for n, p in element.items() if n in e.block.names})
        self.element = element
        self.objective = sum(e.total() for e in self.evidence)

    def improve(self, name: str) -> bool:
        """Solve one group with all others fixed; True where the objective grew."""
        held = self.holds[name]
        if not held or self.seen.get(name) == self._state(held):
            return False
        scores, nested = self._scores(name, held)
        element = {name: best_assignment(scores)}
        for child, choices in nested.items():
            element[child] = choices[torch.arange(len(choices)), element[name]]
        gain = self._try(element, held)
        if gain <= SMALLEST_GAIN * self.limit:
            self.seen[name] = self._state(held)
            return False
        self.objective += gain
        self.element = compose(self.groups, self.element, element)
        if not any(e.block.names.count(name) > 1 for e in held):  # else its own move changes its scores
            self.seen[name] = self._state(held)
        return True

    def _state(self, held: list[Similarities]) -> list[int]:
        return [self.versions[id(e)] for e in held]

    def _scores(self, name: str, held: list[Similarities]) -> tuple[Tensor, dict[str, Tensor]]:
        nested = self._nested(name)
        group = self.groups[name]
        scores = torch.zeros(*group.shape, group.size, dtype=torch.float64)
        pairs: dict[str, Tensor] = {}
        for e in held:
            own = [i for i, n in enumerate(e.block.names) if n == name]
            inner = [(i, n) for i, n in enumerate(e.block.names) if n in nested]
            if len(own) == len(inner) == 1:
                i, child = inner[0]
                pairs[child] = pairs.get(child, 0) + e.pair_scores(own[0], i).cpu()
            else:
                for k in own:
                    scores += e.scores(k).cpu()
        choices = {}
        for child, values in pairs.items():
            choices[child] = best_assignment(values)
            scores += values.gather(-1, choices[child][..., None]).sum((-1, -2))
        return scores, choices

    def _nested(self, name: str) -> set[str]:
        """Groups that depend on this one alone and are solved again for every pair of its units."""
        group = self.groups[name]
        if group.parents or group.size**2 > NESTED_LIMIT:
            return set()
        return {d for d in self.children[name] if self.groups[d].parents == (name,)}

    def _try(self, element: Element, held: list[Similarities]) -> float:
        """Move B's side by `element`; where that does not help, move it back. Returns the gain."""
        if all(torch.equal(p, torch.arange(p.shape[-1]).expand(p.shape)) for p in element.values()):
            return 0.0
        before = [e.state() for e in held]
        old = sum(e.total() for e in held)
        for e in held:
            e.move(element)
        gain = sum(e.total() for e in held) - old
        if gain <= SMALLEST_GAIN * self.limit:
            for e, state in zip(held, before, strict=True):
                e.restore(state)  # type: ignore[arg-type]
            return 0.0
        for e in held:
            self.versions[id(e)] += 1
        return gain


def compose(groups: Mapping[str, UnitGroup], first: Element, then: Element) -> Element:
    """The element that does `first` and then `then` (which may name only some of the groups)."""
    out = dict(first)
    for name, p in then.items():
        out[name] = out[name].gather(-1, p)
    for name, group in groups.items():
        for axis, parent in enumerate(group.parents):
            if parent in then:
                above = [group.parents.index(q) for q in groups[parent].parents]
                moved = permute_axis(first[name], axis, above, then[parent])
                out[name] = moved.gather(-1, then[name]) if name in then else moved
    return out
