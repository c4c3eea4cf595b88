"""Which weights stand one behind the other: read from the graph of a few backward passes.

Depth is where what one weight made goes into what the next one makes. Two heads beside each other, or an actor and
a critic, come one after the other in `named_parameters()` and are not deep.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, kind_of, parents_of
from diag.snapshot.loop.network import DepthFacts
from diag.watching.observe.loop.formula.linear import linear_layers
from diag.watching.observe.loop.moment import due

PASSES_READ = 10  # passes up to this one, of those at which everything is looked at
NODES_OF_DEPTH = 8192
WEIGHTS_OF_DEPTH = 1024  # the relation of more is not kept
WEIGHTS_OF_ONE = 4  # weights that one operation may hold; a fused one of several layers does not tell their order
MOST_CHAINS = 16
# What may be done to a weight by itself before it meets what comes from other weights.
OF_A_WEIGHT = frozenset(
    (*PASSING_ON, "T", "Transpose", "Permute", "Mul", "Div", "Sub", "Add", "Pow", "Sum", "Sqrt", "Expand", "Select",
     "Slice", "Split", "Norm", "LinalgVectorNorm", "WeightNormInterface")
)  # fmt: skip


@dataclass
class _Reach:
    """Of the output of a node, as sets of weights (bits): those that it comes from; alone: no input met them."""

    weights: int
    alone: bool


@dataclass
class Depth:
    """Follows the first backward passes. names: of the model's parameters by id, kept up to date elsewhere."""

    names: Mapping[int, str]
    _passes: int = 0
    _numbers: dict[str, int] = field(default_factory=dict)
    _before: list[int] = field(default_factory=list)  # of each weight, those that it comes after, as bits
    _placed: set[int] = field(default_factory=set)
    _linear: list[tuple[int, ...]] = field(default_factory=list)  # of each pass that was read
    _facts: DepthFacts | None = field(default_factory=DepthFacts)

    def backward_called(self, roots: Any) -> None:
        """A backward pass begins."""
        self._passes += 1
        if not due(self._passes) or self._passes > PASSES_READ:
            return
        root = roots if isinstance(roots, Tensor) else next((r for r in roots or () if isinstance(r, Tensor)), None)
        nodes = None if root is None or root.grad_fn is None else _in_order(root.grad_fn)
        if nodes:
            self._read(nodes)
            self._linear.append(linear_layers(nodes, self.names))
            self._facts = None

    def _read(self, nodes: list[Any]) -> None:
        """nodes: each after those that made its arguments."""
        found: dict[Any, _Reach] = {}
        for node in nodes:
            weight = getattr(node, "variable", None)
            if weight is not None:
                found[node] = _Reach(self._bit(weight), alone=True)
                continue
            reaches = [found[p] for p in parents_of(node)]
            own, earlier = (_union(r.weights for r in reaches if r.alone == alone) for alone in (True, False))
            alone = bool(reaches) and all(r.alone for r in reaches) and kind_of(node) in OF_A_WEIGHT
            found[node] = _Reach(own | earlier, alone)
            if not alone:
                self._meet(own, earlier)

    def _meet(self, own: int, earlier: int) -> None:
        """An operation takes weights and what others have made."""
        held = _bits(own)
        if len(held) > WEIGHTS_OF_ONE:
            return
        for i in held:
            self._placed.add(i)
            self._before[i] |= earlier

    def _bit(self, weight: Any) -> int:
        name = self.names.get(id(weight))
        if name is None or "weight" not in name.rpartition(".")[2]:
            return 0
        if name not in self._numbers:
            if len(self._numbers) >= WEIGHTS_OF_DEPTH:
                return 0
            self._numbers[name] = len(self._numbers)
            self._before.append(0)
        return 1 << self._numbers[name]

    def facts(self) -> DepthFacts:
        """As plain data."""
        if self._facts is None:
            names = list(self._numbers)
            chains = longest_chains(self._before, self._placed)
            self._facts = DepthFacts(
                tuple(tuple(names[i] for i in chain) for chain in chains),
                tuple(names[i] for i in sorted(self._placed)),
                tuple(self.names.get(i, "") for i in self._linear[-1]) if all(self._linear) else (),
            )
        return self._facts


def longest_chains(before: list[int], placed: Collection[int]) -> list[list[int]]:
    """For each of `placed` that none of them comes after, the longest way that leads to it, the longest first.

    before: of each, the bits of those that it comes after; two that come after each other, as in a loop, are not
    ordered by that."""
    strictly = {
        i: [j for j in _bits(before[i]) if j in placed and j != i and not before[j] >> i & 1] for i in placed
    }
    length: dict[int, int] = {}
    last: dict[int, int | None] = {}
    for i in sorted(placed, key=lambda i: len(strictly[i])):  # what comes before has fewer before it
        last[i] = max((j for j in strictly[i] if j in length), key=lambda j: length[j], default=None)
        length[i] = 1 + (length[last[i]] if last[i] is not None else 0)  # type: ignore[index]
    followed = {j for all_of in strictly.values() for j in all_of}
    ends = sorted((i for i in placed if i not in followed), key=lambda i: -length[i])
    return [list(_way(i, last))[::-1] for i in ends[:MOST_CHAINS]]


def _way(end: int, last: Mapping[int, int | None]) -> Iterator[int]:
    at: int | None = end
    while at is not None:
        yield at
        at = last[at]


def _in_order(root: Any) -> list[Any]:
    """The nodes of the graph, each after those that it comes from; empty where there are too many."""
    order: list[Any] = []
    seen, waiting = set[Any](), [(root, False)]
    while waiting:
        node, done = waiting.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting += [(parent, False) for parent in parents_of(node) if parent not in seen]
        if len(seen) > NODES_OF_DEPTH:
            return []
    return order


def _union(sets: Iterable[int]) -> int:
    return functools.reduce(operator.or_, sets, 0)


def _bits(number: int) -> list[int]:
    """The places of the ones in a number's binary digits."""
    data = numpy.frombuffer(number.to_bytes(number.bit_length() // 8 + 1, "little"), numpy.uint8)
    found: list[int] = numpy.flatnonzero(numpy.unpackbits(data, bitorder="little")).tolist()
    return found
