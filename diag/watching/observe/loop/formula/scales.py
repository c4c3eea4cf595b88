"""Scales that a loss holds beside what they scale: the variance of a predicted Gaussian, the weight of a task, the
coupling layers of a flow. Each is told from the graph by its exponential (or another function that is positive).

What an exponential exp(e) multiplies, an error or the latent of a flow, falls without end as e falls. The loss
needs a term that pays for it: minus e, with some factor. Where no term has e the scale is only ever driven to
zero; where the term has the other sign both fall together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, TAKING, kind_of, nodes_before
from diag.snapshot.loop.arithmetic import Odd
from diag.watching.observe.loop.formula.chains import (
    OddFound,
    argument_of,
    behind_views,
    bottom_of,
    exponential,
    is_part_of,
    never_negative,
    products_with_exponentials,
    sides_of,
    sign_of,
)
from diag.watching.observe.loop.formula.parts import Summand, depends

POSITIVE = ("Softplus", "Exp", "Relu", "Abs", "Sigmoid", "Pow", "Clamp", "ClampMin", "Sqrt", "Elu", *PASSING_ON)
RAW_OUTPUTS = ("Addmm", "Linear", "Convolution", "Mm", "AccumulateGrad", "Tanh", "Clamp", "ClampMin", "Hardtanh")
NODES_OF_A_FLOW, FEWEST_COUPLINGS, DEEPEST_TOP = 1200, 2, 12
CLAMPED = 0.05  # of the entries


@dataclass(frozen=True)
class Scale:
    """A part of the loss in which something that is never negative is multiplied by exp(sign * `bottom`), or
    divided by a positive function of `bottom`. exponent: which of the two."""

    part: Summand
    bottom: Any
    index: int
    sign: int
    exponent: bool


def scales(parts: list[Summand]) -> Iterator[OddFound]:
    """What is wrong with the scales of the errors that are summed."""
    found = [scale for part in parts if (scale := _scale(part)) is not None]
    for scale in found:
        paying = _paying(scale, parts)
        wrong = {sign_of(p.number, p.factors) * scale.sign for p in paying}
        if paying and wrong == {1}:
            yield OddFound(Odd.SCALE_FALLS, {"exponent": float(scale.exponent)})
        elif not paying and _alone(scale, found, parts):
            yield OddFound(Odd.SCALE_UNPAID, {"exponent": float(scale.exponent)})
    yield from _clamped(found, parts)


def _scale(part: Summand) -> Scale | None:
    if sign_of(part.number, part.factors) <= 0:
        return None
    sides = part.node.next_functions
    if part.kind == "Mul" and len(sides_of(part.node)) == 2 and not part.is_square:
        for one, other in (sides, sides[::-1]):
            found, _ = exponential(*one)
            if found is not None and never_negative(*other):
                return _of_exponent(part, found, 1)
    if part.kind == "Div" and len(sides_of(part.node)) == 2 and never_negative(*sides[0]):
        return _divided(part, sides[0], sides[1])
    inside = argument_of(part.node)[0] if part.is_square else None
    if inside is not None and kind_of(inside) == "Div" and len(sides_of(inside)) == 2:
        return _divided(part, *inside.next_functions)
    return None


def _of_exponent(part: Summand, found: Any, sign: int) -> Scale | None:
    bottom, index, more = bottom_of(*argument_of(found))
    if more == 0 or kind_of(behind_views(bottom)) not in RAW_OUTPUTS:
        return None
    return Scale(part, bottom, index, sign * more, True)


def _divided(part: Summand, above: tuple[Any, int], below: tuple[Any, int]) -> Scale | None:
    found, _ = exponential(*below)
    if found is not None:
        return _of_exponent(part, found, -1)
    node, index = below
    for _ in range(8):
        node, index, _sign = bottom_of(node, index)
        if node is None or kind_of(node) not in POSITIVE:
            break
        node, index = argument_of(node)
    if node is None or kind_of(behind_views(node)) not in RAW_OUTPUTS or is_part_of(node, index, above[0]):
        return None
    return Scale(part, node, index, -1, False)


def _paying(scale: Scale, parts: list[Summand]) -> list[Summand]:
    """The parts that are the exponent itself, or the logarithm of what is divided by."""
    if scale.exponent:
        return [p for p in parts if p.node is scale.bottom and p.index == scale.index]
    logs = [p for p in parts if p.kind == "Log"]
    return [p for p in logs if is_part_of(scale.bottom, scale.index, p.node)]


def _alone(scale: Scale, found: list[Scale], parts: list[Summand]) -> bool:
    """Whether nothing but such products depends on what the scale is a part of."""
    products = {id(s.part) for s in found}
    others = [p for p in parts if id(p) not in products]
    maker = behind_views(scale.bottom)
    return not others or depends(others, maker._sequence_nr()) is False


def _clamped(found: list[Scale], parts: list[Summand]) -> Iterator[OddFound]:
    """Variances that a clamp holds above zero: where it does they have no gradient and a huge weight."""
    for scale in found:
        below = scale.part.node.next_functions[1][0] if scale.part.kind == "Div" else None
        if below is None or kind_of(below) not in ("Clamp", "ClampMin"):
            continue
        kept, least = getattr(below, "_saved_self", None), getattr(below, "_saved_min", None)
        logs = any(p.kind == "Log" and argument_of(p.node)[0] is below for p in parts)
        if not isinstance(kept, Tensor) or not isinstance(least, (int, float)) or not kept.is_cpu or not logs:
            continue
        share = float((kept.detach() <= least).float().mean())
        if share >= CLAMPED and least > 0:
            yield OddFound(Odd.VARIANCE_CLAMPED, {"share": share, "least": float(least)})
            return


# Flows


def flows(parts: list[Summand]) -> Iterator[OddFound]:
    """What is wrong with the scales of a flow: squares of a latent that layers multiply by exponentials."""
    squares = [p for p in parts if p.is_square and sign_of(p.number, p.factors) > 0]
    latent = next((p for p in squares if _scaled_by_exponential(argument_of(p.node)[0])), None)
    if latent is None:
        return
    near = list(nodes_before([latent.node], NODES_OF_A_FLOW))
    layers = {e: sign for _, e, sign in products_with_exponentials(near)}
    bottoms = [(e, *bottom_of(*argument_of(e)), sign) for e, sign in layers.items()]
    bottoms = [
        b for b in bottoms if kind_of(behind_views(b[1])) in RAW_OUTPUTS and kind_of(b[1]) != "AccumulateGrad"
    ]
    if len(bottoms) < FEWEST_COUPLINGS:
        return
    paid = {e: _signs_of(parts, node, index) for e, node, index, *_ in bottoms}
    signs = [more * sign * one for e, _, _, more, sign in bottoms for one in paid[e]]
    if any(s > 0 for s in signs):
        yield OddFound(Odd.FLOW_FALLS, {"layers": float(len(bottoms))})
    elif not signs and _only_squares(parts, squares, [e for e, *_ in bottoms]):
        yield OddFound(Odd.FLOW_UNPAID, {"layers": float(len(bottoms))})
    elif signs:
        yield from _columns([e for e, *_ in bottoms])


def _signs_of(parts: list[Summand], node: Any, index: int) -> list[int]:
    return [sign_of(p.number, p.factors) for p in parts if p.node is node and p.index == index]


def _only_squares(parts: list[Summand], squares: list[Summand], layers: list[Any]) -> bool:
    own = {id(p) for p in squares}
    others = [p for p in parts if id(p) not in own]
    return all(depends(others, e._sequence_nr()) is False for e in layers) if others else True


def _scaled_by_exponential(node: Any, deep: int = 0) -> bool:
    """Whether the numbers are x * exp(a) + t of the network's own, with no constant, a target say, between."""
    if node is None or deep > DEEPEST_TOP:
        return False
    kind, sides = kind_of(node), sides_of(node)
    if kind in ("Mul", "Div"):
        if any(True for _ in products_with_exponentials([node])):
            return True
        other = getattr(node, "_saved_other", None)
        number = len(sides) == 1 and isinstance(other, Tensor) and other.numel() == 1
        return number and _scaled_by_exponential(sides[0][0], deep + 1)
    if kind in ("Add", "Sub") and len(sides) == 2:
        return any(_scaled_by_exponential(side, deep + 1) for side, _ in sides)
    if kind in ("Cat", "Stack", "Flip", "IndexPut", *TAKING):
        return any(_scaled_by_exponential(side, deep + 1) for side, _ in sides)
    return False


def _columns(layers: list[Any]) -> Iterator[OddFound]:
    """Columns that no layer scales: the exponential is exactly one there in every row of all of them."""
    results = [getattr(e, "_saved_result", None) for e in layers]
    kept = [r.detach() for r in results if isinstance(r, Tensor) and r.ndim == 2 and r.is_cpu and len(r) > 1]
    widths = {r.shape[1] for r in kept}
    if len(kept) < FEWEST_COUPLINGS or len(kept) != len(layers) or len(widths) != 1:
        return
    ones = [(r == 1).all(0) for r in kept]
    moved = [~one for one in ones]
    if not all(bool(m.any()) for m in moved):
        return  # layers that start at zero
    never = ones[0]
    for one in ones[1:]:
        never = never & one
    if bool(never.any()):
        first = int(never.nonzero()[0])
        yield OddFound(Odd.COLUMNS_KEPT, {"columns": float(never.sum()), "first": first, "layers": len(kept)})
