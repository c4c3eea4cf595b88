"""Reshapes that look like transposes: the lengths of axes change places, and the numbers stay where they are.

Read from the graph before a few losses. x.view(n, k, t) of an x of (n, t, k) gives a tensor of the wanted shape in
which neighbours of one axis lie along the other. Lengths that divide one another also come from splitting one axis
and merging it into another (attention heads of a time-first layer), and lengths that differ by one from shifting
rows (relative positions), so these are left out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import kind_of, nodes_before
from diag.watching.observe.loop.moment import Moment

RESHAPES = ("View", "UnsafeView", "ReshapeAlias")
GRAPHS_SEARCHED, NODES_OF_A_GRAPH = 3, 1024
PADDING = ("ConstantPadNd", "Cat")  # before rows are shifted on purpose


class Axes:
    """Looks at the graphs of the first backward passes."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._graphs = 0
        self._found: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}

    def backward_called(self, roots: Any) -> None:
        """A backward pass begins."""
        if not isinstance(roots, Tensor) or roots.grad_fn is None or self._graphs >= GRAPHS_SEARCHED:
            return
        self._graphs += 1
        found = {pair for node in nodes_before([roots.grad_fn], NODES_OF_A_GRAPH) if (pair := exchanged_axes(node))}
        for pair in found:
            self._found[pair] = self._found.get(pair, 0) + 1
        if found:
            self._moment.news("axes exchanged", "reshaped")

    def facts(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """The shapes before and after, the most frequent first."""
        return tuple(sorted(self._found, key=lambda pair: -self._found[pair]))


def exchanged_axes(node: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shapes before and after a reshape that gives axes each other's lengths; None for any other node."""
    if kind_of(node) not in RESHAPES:
        return None
    before = tuple(int(n) for n in getattr(node, "_saved_self_sym_sizes", ()))
    after = tuple(int(n) for n in node._input_metadata[0].shape) if hasattr(node, "_input_metadata") else ()
    a, b = ([n for n in sizes if n != 1] for sizes in (before, after))
    if a == b or sorted(a) != sorted(b):
        return None
    moved = sorted({n for m, n in zip(a, b, strict=True) if m != n})
    near = any(
        large % small == 0 or large - small == 1 for i, small in enumerate(moved) for large in moved[i + 1 :]
    )
    padded = any(kind_of(parent) in PADDING for parent, _ in node.next_functions if parent is not None)
    return None if near or padded else (before, after)
