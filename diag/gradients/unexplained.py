"""Paths in the graph from the loss to a parameter that no recorded call explains."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from diag.gradients.capture import Capture


def unexplained(capture: Capture, roots: list[GradientEdge], parameters: dict[str, nn.Parameter]) -> set[str]:
    """Names of the parameters that the graph reaches by a path that no recorded call explains.

    Custom autograd functions and scripted modules call kernels without asking the mode: their parameters
    need another method. Walks the graph from `roots` once.
    """
    accumulators = {get_gradient_edge(p).node: name for name, p in parameters.items()}
    explained: set[tuple[Node, int]] = set()
    calls = [([use.edge.node], use.inputs) for use in capture.uses] + capture.several
    for outputs, inputs in calls:
        explained |= {edge for edge, _ in _edges(outputs, accumulators, {n for n in inputs if n is not None})}
    found = _edges([root.node for root in roots], accumulators, set())
    return {name for edge, name in found if edge not in explained}


def _edges(
    start: list[Node], accumulators: dict[Node, str], stop: set[Node]
) -> Iterator[tuple[tuple[Node, int], str]]:
    stack, seen = list(start), set(start)
    while stack:
        node = stack.pop()
        for i, (following, _) in enumerate(node.next_functions):
            if following is None:
                continue
            if following in accumulators:
                yield (node, i), accumulators[following]
            elif following not in seen and following not in stop:
                seen.add(following)
                stack.append(following)
