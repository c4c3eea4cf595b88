"""Autograd's graph, read backwards: nodes before a node, the chain of first arguments, what a node stands for."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

# DistributedDataParallel hands all outputs of a model through one node, each as it is.
SINK = "_DDPSink"
COPYING = ("Clone", "ToCopy", "Alias", "Contiguous")  # operations that change neither the numbers nor the shape
# Operations that neither change the numbers nor their order.
PASSING_ON = ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", *COPYING)
# Operations that take entries of a tensor, or put them elsewhere.
TAKING = (
    "Select", "Slice", "Split", "SplitWithSizes", "Unbind", "Index", "IndexSelect", "Transpose", "Permute", "T",
    "Expand", *PASSING_ON,
)  # fmt: skip
UNSIGNED = 1 << 63  # saved integers are 64 bits without a sign


def kind_of(node: Any) -> str:
    """The operation that a node stands for, without autograd's ending: "Mul", "NllLoss"."""
    return _operation(node.name())


@functools.lru_cache(maxsize=1024)  # graphs are read again and again, and there are few operations
def _operation(name: str) -> str:
    return name.rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


def parents_of(node: Any) -> list[Any]:
    """The nodes that made the arguments of a node's operation, those without a gradient left out."""
    return [parent for parent, _ in node.next_functions if parent is not None]


def first_arguments(node: Any, at_most: int) -> Iterator[Any]:
    """A node, the one that made its first differentiable argument, and so on."""
    for _ in range(at_most):
        if node is None:
            return
        yield node
        node = next(iter(parents_of(node)), None)


def made_last(node: Any, at_most: int = 24, passing: Container[str] = PASSING_ON) -> Any:
    """The node that made the numbers, where `node` may only pass them on; None where there is none."""
    return next((n for n in first_arguments(node, at_most) if kind_of(n) not in passing), None)


def constant_of(node: Any) -> Any:
    """The tensor without a graph that a product, or a quotient, with one side that has a graph is taken with; None
    where that was not kept."""
    first = node.next_functions[0][0] is not None
    return getattr(node, "_saved_other" if first else "_saved_self", None)


def nodes_before(
    starts: Iterable[Any], at_most: float = math.inf, ends: Callable[[Any], bool] = lambda node: False
) -> Iterator[Any]:
    """The nodes of the graph from `starts` back, each once, the nearest first; nothing beyond one that `ends`."""
    front, seen = deque(node for node in starts if node is not None), set[Any]()
    while front and len(seen) < at_most:
        node = front.popleft()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not ends(node):
            front.extend(parents_of(node))


def leaves_before(start: Any, at_most: int) -> frozenset[int]:
    """The parameters that a node is computed with, by id; none where its graph has `at_most` nodes or more."""
    nodes = list(nodes_before([start], at_most))
    if len(nodes) == at_most:
        return frozenset()
    return frozenset(id(n.variable) for n in nodes if kind_of(n) == "AccumulateGrad")


def signed(value: int) -> int:
    """The integer that a node stored as unsigned, with its sign."""
    return value - 2 * UNSIGNED if value >= UNSIGNED else value
