"""From the labels of a trace to permutation groups: what may move, and on what a movement may depend.

A symbol that no operation froze is a group: its units may be permuted, the same way on every axis that
carries them. Where a symbol `d` occurs only together with `h` (the units of an attention head with the head,
the channels of a group with the group), each `h` may have a permutation of `d` of its own: `h` is a parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from math import prod

import numpy as np

from diag.connectivity.symmetries.axes import AxisAlgebra, Labels, Symbol

Part = tuple[np.ndarray, tuple[Symbol, ...]]  # positions on an axis, one array axis per atom


class Solution:
    """Closure of a trace: instances resolved, co-occurrences counted."""

    def __init__(self, algebra: AxisAlgebra, occurrences: Iterable[Labels], parameters: Iterable[Labels]):
        self.algebra = algebra
        self.parameters = list(parameters)
        self.layouts = self._distinct([*occurrences, *self.parameters])
        while self._close():
            pass
        self.families = self._complete_families()
        self.together = self._together(self.families)

    def _distinct(self, occurrences: Iterable[Labels]) -> list[tuple[Symbol, ...]]:
        """The symbols of each layout, every distinct set once (input axes never matter)."""
        seen: dict[frozenset[Symbol], tuple[Symbol, ...]] = {}
        for labels in occurrences:
            factors = tuple(self.algebra.find(s) for axis in labels for s in axis)
            seen.setdefault(frozenset(factors), factors)
        return list(seen.values())

    # ---- instances

    def _close(self) -> bool:
        """One round of unifying instances; True where something changed."""
        algebra, find = self.algebra, self.algebra.find
        changed, together = False, self._together({})
        same_axis = self._within_axis()
        old, algebra.instances = algebra.instances, {}
        sizes: dict[tuple[Symbol, Symbol], list[Symbol]] = {}
        for (symbol, along, j), instance in old.items():
            e, t, i = find(symbol), find(along), find(instance)
            if e is i:
                continue
            if e.kind != "atom":  # an instance of a block is the block of the instances
                parts = [algebra.instance(p, t, j) for p in e.parts]
                whole = algebra.new(e.size)
                algebra.refine(whole, e.kind, parts)
                algebra.unify((whole,), (i,))
                changed = True
            elif t.kind != "atom" or e.frozen or t not in together.get(e, ()) or not same_axis(t, e):
                algebra.unify((e,), (i,))
                changed = True
            elif (e, t, j) in algebra.instances and find(algebra.instances[e, t, j]) is not i:
                algebra.unify((algebra.instances[e, t, j],), (i,))
                changed = True
            else:
                algebra.instances[e, t, j] = i
                sizes.setdefault((e, t), []).append(i)
        for (e, t), instances in sizes.items():
            if len(instances) == t.size and len({find(i) for i in instances}) == 1 and t.size > 1:
                algebra.unify((e,), (instances[0],))
                changed = True
        return changed

    def _within_axis(self) -> Callable[[Symbol, Symbol], bool]:
        """Whether, in every parameter that holds both, `t` stands before `e` in one and the same axis."""
        wrong: set[tuple[Symbol, Symbol]] = set()
        for labels in self.parameters:
            axes = [self.algebra.leaves(axis) for axis in labels]
            flat = [(symbol, k, i) for k, axis in enumerate(axes) for i, symbol in enumerate(axis)]
            along = {self.algebra.find(t) for _, t, _ in self.algebra.instances}
            for t, k, i in flat:
                if t in along:
                    wrong |= {(t, e) for e, m, n in flat if m != k or n < i}
        return lambda t, e: (t, e) not in wrong

    def _complete_families(self) -> dict[tuple[Symbol, Symbol], list[Symbol]]:
        """(e, t) -> the units of e at each position of t; positions never selected get symbols of their own."""
        families: dict[tuple[Symbol, Symbol], list[Symbol]] = {}
        for e, t, _ in list(self.algebra.instances):
            if (e, t) not in families:
                families[e, t] = [
                    self.algebra.find(self.algebra.instances.get((e, t, j)) or self.algebra.new(e.size, "unused"))
                    for j in range(t.size)
                ]
        return families

    def _alternatives(self, factors: list[Symbol]) -> list[list[Symbol]] | None:
        """`factors` at each position of one of them, where others have instances along it; else None."""
        for t in factors:
            members = [e for e in factors if (e, t) in self.families]
            if members:
                return [
                    [self.families[e, t][j] if e in members else e for e in factors if e is not t]
                    for j in range(t.size)
                ]
        return None

    # ---- co-occurrence

    def _together(self, families: dict[tuple[Symbol, Symbol], list[Symbol]]) -> dict[Symbol, set[Symbol]]:
        """For each atom, the atoms without which it never occurs."""
        self.families = families
        result: dict[Symbol, set[Symbol]] = {}
        for layout in self.layouts:
            self._visit(self.algebra.expand(layout), set(), result)
        return result

    def _visit(self, factors: list[Symbol], context: set[Symbol], result: dict[Symbol, set[Symbol]]) -> None:
        alternatives = self._alternatives(factors) if self.families else None
        if alternatives is not None:
            for choice in alternatives:
                self._visit(self.algebra.expand(choice), context, result)
            return
        atoms = context | {f for f in factors if f.kind == "atom"}
        for factor in factors:
            if factor.kind == "atom":
                others = atoms - {factor}
                result[factor] = result[factor] & others if factor in result else others
            else:
                for part in factor.parts:
                    self._visit(self.algebra.expand((part,)), atoms, result)

    # ---- blocks

    def blocks(self, labels: Labels) -> Iterator[tuple[Part, ...]]:
        """The blocks of a parameter: one part of every axis each."""
        yield from product(*(self.parts(self.algebra.expand(axis)) for axis in labels))

    def parts(self, factors: list[Symbol]) -> list[Part]:
        """The parts of an axis; each gives, for every combination of its atoms, the position on the axis."""
        if not factors:
            return [(np.zeros((), dtype=np.int64), ())]
        alternatives = self._alternatives(factors)
        if alternatives is not None and any((e, factors[0]) in self.families for e in factors):
            stride = prod(f.size for f in factors[1:])
            chosen = [self.parts(self.algebra.expand(choice)) for choice in alternatives]
            return [(p + j * stride, a) for j, choice in enumerate(chosen) for p, a in choice]
        head, tail = factors[0], factors[1:]
        stride = prod(f.size for f in tail)
        heads: list[Part] = [(np.arange(head.size), (head,))]
        if head.kind == "sum":
            heads, offset = [], 0
            for part in head.parts:
                heads += [(p + offset, a) for p, a in self.parts(self.algebra.expand((part,)))]
                offset += part.size
        return [
            (np.add.outer(p * stride, q), a + b)
            for p, a in heads
            for q, b in self.parts(tail)
        ]  # fmt: skip


def used_symbols(algebra: AxisAlgebra, used: Iterable[Labels]) -> set[Symbol]:
    """The symbols that occur in these layouts."""
    return {leaf for labels in used for axis in labels for leaf in algebra.leaves(axis)}
