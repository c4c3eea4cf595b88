"""The parts that a loss is a sum of, entry by entry, each with its weight: what lies behind sums, means,
differences, multiples and stacks of the graph.

A weight is the derivative of the whole with respect to one entry of the part. Where a tensor of constants (a mask,
an advantage) multiplies the entries each has a weight of its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, constant_of, kind_of, parents_of, signed
from diag.watching.observe.terms import reaches

MEAN_REDUCTION = 1  # as the nodes of torch's loss functions save it
NODES_OF_PARTS = 1024  # that are visited
LONGEST_CHAIN = 16
MOST_WEIGHTS = 1 << 20  # of one part, that are computed


@dataclass(frozen=True)
class Summand:
    """A node of the graph, which of its outputs, the product of the numbers on its way to the whole, and the
    tensors of constants there, one for each entry as broadcasting has it."""

    node: Any
    index: int
    number: float
    factors: tuple[Tensor, ...] = ()

    @property
    def weight(self) -> float:
        """The derivative of the whole with respect to an entry, their mean; NaN where these are too many."""
        if not self.factors:
            return self.number
        return float(self.weights.mean()) if math.prod(self.shape) <= MOST_WEIGHTS else math.nan

    @property
    def weights(self) -> Tensor:
        """The derivative of the whole with respect to each entry."""
        every = torch.full(self.shape, self.number, dtype=torch.float64)
        for factor in self.factors:
            every = every * factor
        return every

    @property
    def kind(self) -> str:
        """The operation."""
        return kind_of(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what the operation gave."""
        return given_shape(self.node, self.index) or ()

    @property
    def is_square(self) -> bool:
        """Whether it is the square of something, as a power or a product with itself."""
        sides = self.node.next_functions
        if self.kind == "Pow":
            return float(self.node._saved_exponent) == 2
        return self.kind == "Mul" and len(sides) == 2 and sides[0] == sides[1]

    @property
    def entry_weight(self) -> float:
        """The weight of one entry of what the operation compares: a loss function may take their mean inside."""
        if getattr(self.node, "_saved_reduction", None) != MEAN_REDUCTION:
            return self.weight
        saved, counted = (getattr(self.node, name, None) for name in ("_saved_self", "_saved_total_weight"))
        if isinstance(counted, Tensor):  # of class numbers: those that are not ignored, by the weights of classes
            return self.weight / (float(counted) or math.nan) if counted.is_cpu else math.nan
        return self.weight / max(saved.numel(), 1) if isinstance(saved, Tensor) else math.nan


def parts_of(root: Tensor, ends: Container[int] = ()) -> list[Summand]:
    """The parts of a number, the nearest first; none where there are too many. ends: numbers of nodes that are
    parts, whatever they are made of."""
    return parts_behind(Summand(root.grad_fn, root.output_nr, 1.0), ends)


def parts_behind(whole: Summand, ends: Container[int] = ()) -> list[Summand]:
    """The same of any part of it."""
    found: list[Summand] = []
    waiting = deque([whole])
    for _ in range(NODES_OF_PARTS):
        if not waiting:
            return found
        part = waiting.popleft()
        inside = None if part.node._sequence_nr() in ends else within(part)
        if inside is None:
            found.append(part)
        else:
            waiting += inside
    return []


def within(part: Summand) -> list[Summand] | None:
    """The parts that one is a linear combination of; None where it is none."""
    node, kind = part.node, part.kind
    sides = list(node.next_functions)
    if kind in ("Add", "Sub"):
        signs = (1.0, float(node._saved_alpha) * (-1 if kind == "Sub" else 1))
        if part.factors and any(given_shape(*side) != part.shape for side in sides if side[0] is not None):
            return None
        return [_of(part, side, sign) for side, sign in zip(sides, signs, strict=False) if side[0] is not None]
    if kind == "Neg" or (kind == "Rsub" and len(sides) == 1):
        return [_of(part, sides[0], -1.0)]
    if kind in ("Mul", "Div") and len(parents_of(node)) == 1:
        return _scaled(part, kind, sides)
    if kind in ("Sum", "Mean") and len(parents_of(node)) == 1:
        return _summed(part, kind, sides[0])
    if kind in ("Stack", "Cat"):
        return _stacked(part, kind, sides)
    if kind in PASSING_ON and len(parents_of(node)) == 1:
        return _reshaped(part, sides[0])
    return None


def _summed(part: Summand, kind: str, side: tuple[Any, int]) -> list[Summand] | None:
    shape, axes = given_shape(*side) or (), getattr(part.node, "_saved_dim", None)
    count = math.prod(shape) / max(math.prod(part.shape), 1)
    number = part.number / (count if kind == "Mean" else 1)
    if not part.factors:
        return [_at(side, number)]
    if not isinstance(axes, (tuple, list)) or part.shape == () or any(f.shape != part.shape for f in part.factors):
        return None
    factors = part.factors
    for axis in sorted(signed(a) % len(shape) for a in axes) if len(part.shape) < len(shape) else ():
        factors = tuple(f.unsqueeze(axis) for f in factors)
    return [_at(side, number, tuple(f.expand(shape) for f in factors))]


def _stacked(part: Summand, kind: str, sides: list[tuple[Any, int]]) -> list[Summand] | None:
    sides = [side for side in sides if side[0] is not None]
    if not part.factors:
        return [_at(side, part.number) for side in sides]
    axis = signed(getattr(part.node, "_saved_dim", 0))
    whole = all(f.shape == part.shape for f in part.factors)
    if kind != "Stack" or not whole or len(sides) != part.shape[axis]:
        return None
    return [_at(s, part.number, tuple(f.select(axis, i) for f in part.factors)) for i, s in enumerate(sides)]


def _reshaped(part: Summand, side: tuple[Any, int]) -> list[Summand] | None:
    shape = given_shape(*side)
    if not part.factors or shape == part.shape:
        return [_at(side, part.number, part.factors)]
    if shape is None or any(f.shape != part.shape for f in part.factors):
        return None
    return [_at(side, part.number, tuple(f.reshape(shape) for f in part.factors))]


def _at(side: tuple[Any, int], weight: float, factors: tuple[Tensor, ...] = ()) -> Summand:
    return Summand(side[0], side[1], weight, factors)


def _of(part: Summand, side: tuple[Any, int], sign: float) -> Summand:
    """One side of a sum; where it was expanded each of its entries counts several times."""
    shape = given_shape(*side)
    times = math.prod(part.shape) / max(math.prod(shape), 1) if shape is not None else 1.0
    return _at(side, part.number * sign * times, part.factors)


def _scaled(part: Summand, kind: str, sides: list[tuple[Any, int]]) -> list[Summand] | None:
    first = sides[0][0] is not None
    if kind == "Div" and not first:
        return None
    other = constant_of(part.node)
    if not isinstance(other, Tensor) or not other.is_cpu:
        return None
    side, numbers = sides[0] if first else sides[1], other.detach()
    if other.numel() == 1:
        number = float(numbers)
        number = number if kind == "Mul" else 1 / (number or math.nan)
        return [_of(part, side, number)] if given_shape(*side) == part.shape or not part.factors else None
    if given_shape(*side) != part.shape:
        return None
    every = numbers.expand(part.shape)
    return [_at(side, part.number, (*part.factors, every if kind == "Mul" else 1 / every))]


def base_of(node: Any, index: int) -> tuple[Any, int, float]:
    """The node whose output, times a number and plus constants, this one's is: with that number."""
    factor = 1.0
    for _ in range(LONGEST_CHAIN):
        inside = within(Summand(node, index, 1.0)) if node is not None else None
        if (
            inside is None
            or len(inside) != 1
            or inside[0].factors
            or kind_of(node) in ("Sum", "Mean", "Stack", "Cat")
        ):
            break
        node, index, factor = inside[0].node, inside[0].index, factor * inside[0].number
    return node, index, factor


def depends(parts: list[Summand], number: int) -> bool | None:
    """Whether any of the parts comes from the node of this number; None where that is not known."""
    return reaches([part.node for part in parts], {number}, ())


def given_shape(node: Any, index: int) -> tuple[int, ...] | None:
    """The shape of the output number `index` of a node."""
    if node is None:
        return None
    about = node._input_metadata
    return tuple(map(int, about[index].shape)) if index < len(about) else None
