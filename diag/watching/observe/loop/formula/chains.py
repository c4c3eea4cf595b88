"""What stands behind a node of a loss: through multiples, masks and views, with the sign that they give it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from diag.snapshot.autograd_graph import TAKING, kind_of, made_last, nodes_before
from diag.snapshot.loop.arithmetic import Odd
from diag.watching.observe.loop.formula.parts import LONGEST_CHAIN, Summand, within

TOGETHER = ("Sum", "Mean", "Stack", "Cat")
OF_ONE_SIGN = (
    "Abs",
    "MseLoss",
    "L1Loss",
    "SmoothL1Loss",
    "HuberLoss",
    "NllLoss",
    "NllLoss2D",
    "BinaryCrossEntropy",
    "BinaryCrossEntropyWithLogits",
    "Softplus",
)  # that are never below zero


class OddFound(NamedTuple):
    """Something odd, its numbers, and the function that it is of."""

    kind: Odd
    numbers: dict[str, float]
    of: str = ""


def sign_of(number: float, factors: tuple[Tensor, ...] = ()) -> int:
    """The sign of a number times tensors, 0 where their entries have several."""
    sign = 0 if number == 0 or math.isnan(number) else int(math.copysign(1, number))
    for factor in factors:
        low, high = float(factor.min()), float(factor.max())
        sign *= 1 if low >= 0 < high else -1 if high <= 0 > low else 0
    return sign


def bottom_of(node: Any, index: int) -> tuple[Any, int, int]:
    """The node, and which of its outputs, behind multiples, masks, added constants and reshapes, and the sign with
    which it comes through: 0 where that differs between entries."""
    sign = 1
    for _ in range(LONGEST_CHAIN):
        inside = within(Summand(node, index, 1.0)) if node is not None else None
        if inside is None or len(inside) != 1 or kind_of(node) in TOGETHER:
            break
        (part,) = inside
        node, index, sign = part.node, part.index, sign * sign_of(part.number, part.factors)
    return node, index, sign


def argument_of(node: Any) -> tuple[Any, int]:
    """The first side of a node that has a graph."""
    return next(((p, i) for p, i in node.next_functions if p is not None), (None, 0))


def behind_views(node: Any) -> Any:
    """The node that made the numbers of which this one gives some, in any order."""
    return made_last(node, passing=TAKING)


def exponential(node: Any, index: int) -> tuple[Any, int]:
    """The exponential that a positive multiple or a part of is given by this output, and its output; (None, 0) for
    anything else."""
    found, index, sign = bottom_of(node, index)
    while found is not None and kind_of(found) in TAKING:
        found, index, more = bottom_of(*argument_of(found))
        sign *= more
    return (found, index) if found is not None and kind_of(found) == "Exp" and sign > 0 else (None, 0)


def is_even_power(node: Any) -> bool:
    """Whether it is an even power of something, or a product with itself."""
    kind, sides = kind_of(node), node.next_functions
    if kind == "Pow":
        exponent = getattr(node, "_saved_exponent", None)
        return isinstance(exponent, (int, float)) and float(exponent) % 2 == 0 and float(exponent) > 0
    return kind == "Mul" and len(sides) == 2 and sides[0] == sides[1] and sides[0][0] is not None


def never_negative(node: Any, index: int, deep: int = 0) -> bool:
    """Whether the output is a positive multiple or a sum of squares, absolute values or losses."""
    for _ in range(4):
        node, index, sign = bottom_of(node, index)
        if node is None or sign <= 0:
            return False
        if kind_of(node) in OF_ONE_SIGN or is_even_power(node):
            return True
        if kind_of(node) == "Add" and len(sides_of(node)) == 2 and float(node._saved_alpha) > 0 and deep < 4:
            return all(never_negative(*side, deep + 1) for side in sides_of(node))
        if kind_of(node) not in ("Sum", "Mean", "Select", "Index", "Sqrt"):
            return False
        node, index = argument_of(node)
    return False


def sides_of(node: Any) -> list[tuple[Any, int]]:
    """The sides of a node that have a graph."""
    return [(p, i) for p, i in node.next_functions if p is not None]


def is_part_of(node: Any, index: int, whole: Any, at_most: int = 12) -> bool:
    """Whether this very output went into what the node `whole` gave, a few operations before."""
    near = nodes_before([whole], at_most)
    return whole is node or any((p is node and i == index) for n in near for p, i in n.next_functions)


def products_with_exponentials(nodes: list[Any]) -> Iterator[tuple[Any, Any, int]]:
    """The nodes that multiply something by an exponential, or divide by one: with the exponential, and the sign of
    its exponent."""
    for node in nodes:
        kind = kind_of(node)
        if kind not in ("Mul", "Div") or is_even_power(node):
            continue
        for place, (side, index) in enumerate(node.next_functions):
            if kind == "Div" and place == 0:
                continue
            found, _ = exponential(side, index) if side is not None else (None, 0)
            if found is not None:
                yield node, found, 1 if kind == "Mul" else -1


def one_view(nodes: list[Any], view: Any, maker: Any) -> bool:
    """Whether what `view` gives is taken from what made it once, and not once more by another view."""
    if view is maker:
        return True
    entries = [(kind_of(n), _place(n)) for n in nodes for p, _ in n.next_functions if p is maker]
    return len(entries) == len(set(entries))


def _place(view: Any) -> Any:
    return tuple(getattr(view, f"_saved_{name}", None) for name in ("dim", "index", "start", "end"))
