"""Losses that an answer of zero meets, or nearly: sums of squares in which nothing is compared with a number that
is given, and errors that are averaged over rows without a target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import TAKING, constant_of, kind_of
from diag.snapshot.loop.arithmetic import Odd
from diag.watching.observe.loop.formula.chains import (
    TOGETHER,
    OddFound,
    argument_of,
    sides_of,
    sign_of,
)
from diag.watching.observe.loop.formula.parts import MEAN_REDUCTION, Summand

DEEPEST_SUM, MOST_TERMS = 24, 64
OF_ROWS = ("MseLoss", "SmoothL1Loss", "HuberLoss")
EMPTY_ROWS, FEWEST_FULL = 0.5, 8  # of the rows of targets; of those that are not zero
OF_WEIGHTS = ("Addmm", "Mm", "Bmm", "Linear", "Convolution", "ConvolutionBackward")  # zero where the weights are


def met_by_zero(parts: list[Summand]) -> Iterator[OddFound]:
    """A loss all of whose parts are squares, or absolute values, of combinations of the network's outputs and their
    derivatives without any constant."""
    if parts and all(map(_is_met, parts)):
        yield OddFound(Odd.MET_BY_ZERO, {"parts": float(len(parts))})


def _is_met(part: Summand) -> bool:
    plain = part.is_square or part.kind == "Abs"
    return plain and sign_of(part.number, part.factors) > 0 and _without_constant(argument_of(part.node)[0])


def _without_constant(start: Any) -> bool:
    """Whether it is a combination of what is zero where weights are zero, and of nothing else."""
    waiting, terms = [(start, 0)], 0
    while waiting:
        node, deep = waiting.pop()
        terms += 1
        if node is None or deep > DEEPEST_SUM or terms > MOST_TERMS:
            return False
        if kind_of(node) in OF_WEIGHTS:
            continue
        inside = _terms(node)
        if inside is None:
            return False
        waiting += [(side, deep + 1) for side in inside]
    return True


def _terms(node: Any) -> list[Any] | None:
    """What a node is a combination of; None for anything else, and where a constant is added."""
    kind, sides = kind_of(node), [side for side, _ in sides_of(node)]
    if kind in ("Add", "Sub"):
        return sides if len(sides) == len(node.next_functions) == 2 else None
    if kind in ("Neg", *TOGETHER[:2], *TAKING):
        return sides if len(sides) == 1 else None
    if kind in ("Mul", "Div") and len(sides) == 1:
        over_it = kind == "Div" and node.next_functions[0][0] is None
        return sides if isinstance(constant_of(node), Tensor) and not over_it else None
    return None


def diluted(nodes: list[Any]) -> Iterator[OddFound]:
    """A mean over rows of targets most of which are zero throughout, where another term is taken over as many rows
    as are not, at the places of objects, say."""
    targets = [(n, t) for n in nodes if isinstance(t := getattr(n, "_saved_target", None), Tensor) and t.is_cpu]
    for node, target in targets:
        means = getattr(node, "_saved_reduction", None) == MEAN_REDUCTION
        if kind_of(node) not in OF_ROWS or not means or target.ndim < 2 or target.shape[-1] < 2:
            continue
        empty = (target == 0).all(-1)
        full = int((~empty).sum())
        others = {len(t) for other, t in targets if other is not node and t.ndim}
        if float(empty.float().mean()) >= EMPTY_ROWS and full >= FEWEST_FULL and full in others:
            yield OddFound(Odd.DILUTED, {"rows": float(empty.numel()), "full": float(full)}, kind_of(node))
            return
