"""What a number that backward() is called on is made of: a sum of terms, each with a constant factor.

Read from the autograd graph near the root. A term ends at a node whose value is known (a loss function's call, a
loss that the model returned) or at a node behind which something else is computed. Constants that are added have no
gradient and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, SINK, kind_of, nodes_before, signed

MOST_NODES = 256  # near the root
MOST_SEARCHED = 50_000  # of a network's graph

Factors = tuple[Any, ...]


@dataclass(frozen=True)
class Term:
    """A graph node and the constants that it is multiplied by on its way to the root.

    known: whether its value is one that was seen.
    """

    node: Any
    factors: Factors
    known: bool

    @property
    def number(self) -> int:
        """The number that autograd gave the node."""
        return self.node._sequence_nr()

    @property
    def name(self) -> str:
        """The operation, without autograd's ending."""
        return kind_of(self.node)


def terms_of(root: Tensor, known: Container[int], unscaled: Container[int] = ()) -> list[Term]:
    """The terms of `root`. known: the numbers of nodes where a term ends; unscaled: of products with the scale of a
    GradScaler, which is not a factor of the loss."""
    found: list[Term] = []
    front: list[tuple[Any, Factors]] = [(_before((root.grad_fn, root.output_nr), known), ())]
    looked_at = 0
    while front:
        node, factors = front.pop()
        if node is None:
            continue
        looked_at += 1
        number = node._sequence_nr()
        inside = None
        if number in known:
            found.append(Term(node, factors, True))
            continue
        if looked_at <= MOST_NODES:
            inside = _inside(node, known)
        if inside is None:
            found.append(Term(node, factors, False))
        else:
            scaled = number in unscaled
            front.extend((parent, factors if scaled else factors + more) for parent, more in inside)
    return found


def reaches(starts: Iterable[Any], numbers: Container[int], parameters: Container[int]) -> bool | None:
    """Whether the graph from the nodes `starts` back holds one of the nodes `numbers` or a parameter (by id); None
    where the graph is too large to tell."""
    for count, before in enumerate(nodes_before(starts, MOST_SEARCHED + 1), 1):
        if count > MOST_SEARCHED:
            return None
        if before._sequence_nr() in numbers or id(getattr(before, "variable", None)) in parameters:
            return True
    return False


def product(factors: Factors) -> Any:
    """The product of factors: a float, or a tensor of one number where one of them is on another device."""
    total: Any = 1.0
    for factor in factors:
        total = total * factor
    return total


def _before(edge: tuple[Any, int], known: Container[int]) -> Any:
    """The node at the other end of an edge (a node, and which of its outputs), past a sink that is not known."""
    node, output = edge
    while node is not None and kind_of(node) == SINK and node._sequence_nr() not in known:
        # Outputs that are no tensors have a number and no edge, so that the two would not go together.
        if len(node._input_metadata) != len(node.next_functions):
            break
        node, output = node.next_functions[output]
    return node


def _inside(node: Any, known: Container[int]) -> list[tuple[Any, Factors]] | None:
    """The parents whose linear combination the node's value is, with their factors; None for anything else."""
    kind, parents = kind_of(node), [_before(edge, known) for edge in node.next_functions]
    here = [parent for parent in parents if parent is not None]
    if kind in PASSING_ON and len(here) == 1:  # the root is one number: only its shape or type can change
        return [(here[0], ())]
    if kind in ("Mul", "Div") and len(here) == 1:
        return _multiple(node, kind, parents)
    if kind in ("Add", "Sub") and len(parents) <= 2:
        sign = -1 if kind == "Sub" else 1
        factors = ((), _constant(sign * node._saved_alpha))
        return [(p, f) for p, f in zip(parents, factors, strict=False) if p is not None]
    if kind == "Neg" or (kind == "Rsub" and len(here) == 1):
        return [(p, (-1.0,)) for p in here]
    return _reduced(node, kind, here, known)


def _multiple(node: Any, kind: str, parents: list[Any]) -> list[tuple[Any, Factors]] | None:
    first = parents[0] is not None
    if kind == "Div":  # something over the loss is not a multiple of it
        other = node._saved_other if first else None
        return [(parents[0], (1.0 / _number(other),))] if _is_constant(other) else None
    other = node._saved_other if first else node._saved_self
    return [(parents[0] if first else parents[1], (_number(other),))] if _is_constant(other) else None


def _reduced(node: Any, kind: str, here: list[Any], known: Container[int]) -> list[tuple[Any, Factors]] | None:
    """A sum or mean, of one number or of numbers put into one tensor."""
    if kind not in ("Sum", "Mean") or len(here) != 1:
        return None
    sizes = list(node._saved_self_sym_sizes)
    count = 1
    for size in sizes:
        count *= int(size)
    factors = _constant(1.0 / count) if kind == "Mean" else ()
    if count == 1:
        return [(here[0], ())]
    if kind_of(here[0]) not in ("Stack", "Cat"):
        return _over_rows(node, known)
    parents = [_before(edge, known) for edge in here[0].next_functions]
    # Constants in the stack have no node; each of the others is one number only where there are as many as entries.
    return [(p, factors) for p in parents if p is not None] if len(parents) == count else None


def _over_rows(node: Any, known: Container[int]) -> list[tuple[Any, Factors]] | None:
    """The node of a loss of rows that is summed up or averaged, and how many times the mean of all its numbers that
    is; None where something else is done to the rows, as by weights or a mask."""
    factors: Factors = ()
    for _ in range(MOST_NODES):
        if node._sequence_nr() in known:
            return [(node, factors)]
        here = [parent for parent, _ in node.next_functions if parent is not None]
        if len(here) != 1:
            return None
        more = _of_the_mean(node)
        if more is None:
            return None
        node, factors = here[0], factors + more
    return None


def _of_the_mean(node: Any) -> Factors | None:
    """How many times the mean of its argument the mean of a node's value is; None where that is not known."""
    kind = kind_of(node)
    if kind in ("Mul", "Div"):
        inside = _multiple(node, kind, [parent for parent, _ in node.next_functions])
        return None if inside is None else inside[0][1]
    if kind == "Sum":
        return _constant(_summed(node))
    if kind == "Neg":
        return (-1.0,)
    return () if kind in (*PASSING_ON, "Mean") else None


def _summed(node: Any) -> int:
    """How many numbers each of a sum's is the sum of."""
    sizes = [int(size) for size in node._saved_self_sym_sizes]
    along = getattr(node, "_saved_dim", None)
    return math.prod(sizes if not along else (sizes[signed(d)] for d in along))


def _constant(value: Any) -> Factors:
    return () if value == 1 else (float(value),)


def _is_constant(other: Any) -> bool:
    return isinstance(other, Tensor) and other.numel() == 1 and not other.requires_grad


def _number(other: Any) -> Any:
    if other.device.type == "cpu":
        return float(other)
    return other.detach().reshape(()).to(torch.float32).clone()  # reading it would wait for the device
