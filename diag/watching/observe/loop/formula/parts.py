"""The parts that a loss is a sum of, entry by entry, each with its weight: what lies behind sums, means,
differences, multiples and stacks of the graph.

A weight is the derivative of the whole with respect to one entry of the part; where a tensor of constants (a mask,
an advantage) multiplies the entries it is that of the mean constant, and `factor` has all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, kind_of, parents_of
from diag.watching.observe.terms import reaches

NODES_OF_PARTS = 1024  # that are visited
LONGEST_CHAIN = 16
OF_SQUARES = (
    "MseLoss",
    "L1Loss",
    "SmoothL1Loss",
    "HuberLoss",
    "BinaryCrossEntropy",
    "BinaryCrossEntropyWithLogits",
)
REDUCED_BY_MEAN = 1


@dataclass(frozen=True)
class Summand:
    """A node of the graph, which of its outputs, its weight, and the constants on the way of which there was one
    for each entry."""

    node: Any
    index: int
    weight: float
    factors: tuple[Tensor, ...] = ()

    @property
    def kind(self) -> str:
        """The operation."""
        return kind_of(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what the operation gave."""
        return given_shape(self.node, self.index) or ()

    @property
    def entry_weight(self) -> float:
        """The weight of one entry of what the operation compares: of a loss function the mean is taken inside."""
        given = getattr(self.node, "_saved_self", None)
        mean = self.kind in OF_SQUARES and getattr(self.node, "_saved_reduction", None) == REDUCED_BY_MEAN
        return self.weight / max(given.numel(), 1) if mean and isinstance(given, Tensor) else self.weight


def parts_of(root: Tensor) -> list[Summand]:
    """The parts of a number, the nearest first; none where there are too many."""
    found: list[Summand] = []
    waiting = [Summand(root.grad_fn, root.output_nr, 1.0)]
    for _ in range(NODES_OF_PARTS):
        if not waiting:
            return found
        part = waiting.pop(0)
        inside = _inside(part)
        if inside is None:
            found.append(part)
        else:
            waiting += inside
    return []


def _inside(part: Summand) -> list[Summand] | None:
    """The parts that one is a linear combination of; None where it is none."""
    node, kind = part.node, part.kind
    sides = list(node.next_functions)
    if kind in ("Add", "Sub"):
        signs = (1.0, float(node._saved_alpha) * (-1 if kind == "Sub" else 1))
        return [_of(part, side, sign) for side, sign in zip(sides, signs, strict=False) if side[0] is not None]
    if kind == "Neg" or (kind == "Rsub" and len(sides) == 1):
        return [_of(part, sides[0], -1.0)]
    if kind in ("Mul", "Div") and len(parents_of(node)) == 1:
        return _scaled(part, kind, sides)
    if kind in ("Sum", "Mean") and len(parents_of(node)) == 1:
        count = math.prod(given_shape(*sides[0]) or ()) / max(math.prod(part.shape), 1)
        return [_at(sides[0], part.weight / (count if kind == "Mean" else 1))] if not part.factors else None
    if kind in ("Stack", "Cat") and not part.factors:
        return [_at(side, part.weight) for side in sides if side[0] is not None]
    if kind in PASSING_ON and len(parents_of(node)) == 1:
        return [_at(sides[0], part.weight, part.factors)]
    return None


def _at(side: tuple[Any, int], weight: float, factors: tuple[Tensor, ...] = ()) -> Summand:
    return Summand(side[0], side[1], weight, factors)


def _of(part: Summand, side: tuple[Any, int], sign: float) -> Summand:
    """One side of a sum; where it was expanded each of its entries counts several times."""
    shape = given_shape(*side)
    times = math.prod(part.shape) / max(math.prod(shape), 1) if shape is not None else 1.0
    return _at(side, part.weight * sign * times, part.factors if times == 1 else ())


def _scaled(part: Summand, kind: str, sides: list[tuple[Any, int]]) -> list[Summand] | None:
    first = sides[0][0] is not None
    if kind == "Div" and not first:
        return None
    other = part.node._saved_other if first else part.node._saved_self
    if not isinstance(other, Tensor) or not other.is_cpu:
        return None
    side, numbers = sides[0] if first else sides[1], other.detach()
    if other.numel() == 1:
        number = float(numbers)
        return [_of(part, side, number if kind == "Mul" else 1 / number)] if number or kind == "Mul" else None
    numbers = numbers if kind == "Mul" else 1 / numbers
    one = _of(part, side, float(numbers.double().mean()))
    factors = (*one.factors, numbers)
    return [Summand(one.node, one.index, one.weight, factors)]


def base_of(node: Any, index: int) -> tuple[Any, int, float]:
    """The node whose output, times a number and plus constants, this one's is: with that number."""
    factor = 1.0
    for _ in range(LONGEST_CHAIN):
        inside = _inside(Summand(node, index, 1.0)) if node is not None else None
        if (
            inside is None
            or len(inside) != 1
            or inside[0].factors
            or kind_of(node) in ("Sum", "Mean", "Stack", "Cat")
        ):
            break
        node, index, factor = inside[0].node, inside[0].index, factor * inside[0].weight
    return node, index, factor


def depends(parts: list[Summand], number: int) -> bool | None:
    """Whether any of the parts comes from the node of this number; None where that is not known."""
    found = [reaches(part.node, {number}, ()) for part in parts]
    return True if True in found else (None if None in found else False)


def given_shape(node: Any, index: int) -> tuple[int, ...] | None:
    """The shape of the output number `index` of a node."""
    if node is None:
        return None
    about = node._input_metadata
    return tuple(map(int, about[index].shape)) if index < len(about) else None
