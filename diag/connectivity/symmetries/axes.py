"""The algebra of tensor axes: which axes of a network carry the same units, in the same order.

Every axis of a parameter or activation is a product of *symbols*. A symbol is one set of units, and may turn
out to have parts: a product (768 = 12 heads x 64 units) or a sum (qkv = q + k + v, a concatenation). Two
axes that an operation pairs position by position are unified (union-find). An operation that tells units
apart (an index, a slice in steps, the model's own inputs and outputs) freezes the symbol. What is still free
at the end may be permuted.

A selection `x[..., j, ...]` on an axis `t` leaves, of each other symbol `e` in the tensor, the *instance*
e at t = j: the units of q and of v in one fused (3, heads, units) tensor need not move together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod


class Mismatch(Exception):
    """Two layouts of one axis have no common refinement."""


@dataclass(eq=False, slots=True)
class Symbol:
    """A set of `size` units. `kind` is "atom", "product" or "sum"; `frozen` says why it cannot move."""

    size: int
    order: int
    frozen: str | None = None
    kind: str = "atom"
    parts: tuple[Symbol, ...] = ()
    parent: Symbol | None = None


AxisFactors = tuple[Symbol, ...]  # one axis: row-major product of its symbols; () for an axis of size 1
Labels = tuple[AxisFactors, ...]  # one tensor


class AxisAlgebra:
    """Symbols, their unification and refinement, for one trace."""

    def __init__(self) -> None:
        self._count = 0
        self.instances: dict[tuple[Symbol, Symbol, int], Symbol] = {}

    # ---- making and reading symbols

    def new(self, size: int, frozen: str | None = None) -> Symbol:
        """A fresh symbol; `frozen` says why its units cannot move."""
        self._count += 1
        return Symbol(size, self._count, frozen)

    def axis(self, size: int, frozen: str | None = None) -> AxisFactors:
        """A fresh axis; an axis of size 1 has nothing to permute."""
        return () if size == 1 else (self.new(size, frozen),)

    def find(self, symbol: Symbol) -> Symbol:
        """The symbol that stands for all that it was unified with."""
        root = symbol
        while root.parent is not None:
            root = root.parent
        while symbol is not root:  # path compression
            symbol.parent, symbol = root, symbol.parent or root
        return root

    def expand(self, factors: Iterable[Symbol]) -> list[Symbol]:
        """The same product written in atoms and sums."""
        out: list[Symbol] = []
        for factor in factors:
            root = self.find(factor)
            if root.kind == "product":
                out += self.expand(root.parts)
            elif root.size != 1:
                out.append(root)
        return out

    def leaves(self, factors: Iterable[Symbol]) -> list[Symbol]:
        """All atoms below `factors`."""
        out: list[Symbol] = []
        for root in self.expand(factors):
            out += [root] if root.kind == "atom" else self.leaves(root.parts)
        return out

    # ---- refining

    def freeze(self, factors: Iterable[Symbol], reason: str) -> None:
        """The units along these factors cannot move, for this reason."""
        for factor in factors:
            root = self.find(factor)
            if root.frozen is None:
                root.frozen = reason
                self.freeze(root.parts, reason)

    def refine(self, root: Symbol, kind: str, parts: Sequence[Symbol]) -> None:
        """`root` is made of `parts` (a "sum" or a "product"), which are frozen where it is."""
        root.kind, root.parts = kind, tuple(parts)
        if root.frozen:
            self.freeze(parts, root.frozen)

    def concatenate(self, axes: Sequence[AxisFactors]) -> AxisFactors:
        """The axis of a concatenation."""
        parts = [self._as_symbol(a) for a in axes]
        if len(parts) == 1:
            return (parts[0],)
        whole = self.new(sum(p.size for p in parts))
        whole.kind, whole.parts = "sum", tuple(parts)
        return (whole,)

    def _as_symbol(self, factors: Iterable[Symbol]) -> Symbol:
        expanded = self.expand(factors)
        if len(expanded) == 1:
            return expanded[0]
        whole = self.new(prod(s.size for s in expanded))
        whole.kind, whole.parts = "product", tuple(expanded)
        return whole

    def slice(self, factors: AxisFactors, start: int, stop: int) -> AxisFactors:
        """Units `start` to `stop` of an axis. Raises Mismatch where they cut through a block."""
        expanded = self.expand(factors)
        if stop - start == prod(s.size for s in expanded):
            return factors
        if stop <= start:
            return (self.new(0, "an empty slice"),)
        head, *tail = expanded
        inner = prod(s.size for s in tail)
        if start % inner or stop % inner:
            raise Mismatch
        return (self._cut(head, start // inner, stop // inner), *tail)

    def _cut(self, symbol: Symbol, start: int, stop: int) -> Symbol:
        if (start, stop) == (0, symbol.size):
            return symbol
        self._cut_at(symbol, start)
        self._cut_at(symbol, stop)
        chosen, offset = [], 0
        for part in symbol.parts:
            if start <= offset < stop:
                chosen.append(part)
            offset += part.size
        return self.concatenate([(p,) for p in chosen])[0]

    def _cut_at(self, symbol: Symbol, position: int) -> None:
        """Make `position` a boundary between parts of `symbol`, an atom or a sum."""
        if position in (0, symbol.size):
            return
        if symbol.kind == "atom":
            parts = [self.new(position), self.new(symbol.size - position)]
            self.refine(symbol, "sum", parts)
            return
        parts, offset = [], 0
        for part in symbol.parts:
            inside = position - offset
            if 0 < inside < part.size:
                root = self.find(part)
                if root.kind == "product":
                    parts += [self._as_symbol(self.slice((root,), 0, inside)),
                              self._as_symbol(self.slice((root,), inside, root.size))]  # fmt: skip
                else:
                    self._cut_at(root, inside)
                    parts += root.parts
            else:
                parts.append(part)
            offset += part.size
        symbol.parts = tuple(parts)

    def split_off(self, symbol: Symbol, outer: int) -> tuple[Symbol, Symbol]:
        """Write `symbol` as a product (outer, rest). Raises Mismatch where its parts do not allow it."""
        if symbol.size % outer:
            raise Mismatch
        first, rest = self.new(outer), self.new(symbol.size // outer)
        if symbol.kind == "atom":
            self.refine(symbol, "product", (first, rest))
            return first, rest
        if len(symbol.parts) != outer or any(p.size != rest.size for p in symbol.parts):
            raise Mismatch
        first.frozen = "the parts of a concatenation"
        for j, part in enumerate(symbol.parts):
            self.instances[rest, first, j] = part
        return first, rest

    def regroup(self, factors: Iterable[Symbol], sizes: Sequence[int]) -> list[AxisFactors]:
        """The axes of a reshape to `sizes`. Raises Mismatch where a block would be cut."""
        rest = self.expand(factors)
        axes: list[AxisFactors] = []
        for size in sizes:
            axis: list[Symbol] = []
            while size > 1:
                if not rest:
                    raise Mismatch
                symbol = rest.pop(0)
                if size % symbol.size:
                    symbol, remainder = self.split_off(symbol, size)
                    rest.insert(0, remainder)
                axis.append(symbol)
                size //= symbol.size
            axes.append(tuple(axis))
        return axes

    # ---- unifying

    def unify(self, a: Iterable[Symbol], b: Iterable[Symbol], why: str = "two layouts that do not fit") -> None:
        """Declare that two axes carry the same units in the same order."""
        left, right = self.expand(a), self.expand(b)
        try:
            while left and right:
                x, y = left.pop(0), right.pop(0)
                if x.size > y.size:
                    x, rest = self.split_off(x, y.size)
                    left = self.expand([rest, *left])
                elif y.size > x.size:
                    y, rest = self.split_off(y, x.size)
                    right = self.expand([rest, *right])
                self._merge(x, y)
                left, right = self.expand(left), self.expand(right)
        except Mismatch:
            self.freeze([*a, *b], why)

    def _merge(self, x: Symbol, y: Symbol) -> None:
        x, y = self.find(x), self.find(y)
        if x is y:
            return
        if "product" in (x.kind, y.kind) and "atom" not in (x.kind, y.kind):
            self.unify((x,), (y,))
            return
        if x.kind == "atom":
            x, y = y, x
        if y.kind != "atom":
            self._merge_sums(x, y)
        y.parent = x
        if y.frozen:
            self.freeze((x,), y.frozen)
        elif x.frozen:
            self.freeze(y.parts, x.frozen)

    def _merge_sums(self, x: Symbol, y: Symbol) -> None:
        for one, other in ((x, y), (y, x)):
            offset = 0
            for part in other.parts[:-1]:
                offset += part.size
                self._cut_at(one, offset)
        for a, b in zip(x.parts, y.parts, strict=True):
            self.unify((a,), (b,))

    # ---- selections

    def instance(self, symbol: Symbol, along: Symbol, index: int) -> Symbol:
        """The units of `symbol` where the axis `along` is at `index`."""
        symbol, along = self.find(symbol), self.find(along)
        if symbol.frozen:
            return symbol
        key = (symbol, along, index)
        if key not in self.instances:
            self.instances[key] = self.new(symbol.size)
        return self.instances[key]

    def stack(self, pieces: Sequence[AxisFactors], along: AxisFactors) -> AxisFactors:
        """The axis whose instances along a new axis are `pieces`."""
        symbols = [self._as_symbol(p) for p in pieces if p]
        if len(set(map(self.find, symbols))) <= 1:
            return pieces[0]
        whole = self.new(symbols[0].size)
        for j, symbol in enumerate(symbols):
            self.instances[whole, along[0], j] = symbol
        return (whole,)
