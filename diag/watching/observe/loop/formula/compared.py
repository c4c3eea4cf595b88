"""What a loss compares, entry by entry, and which of it counts: pairs of scores, masks, the ends of the network.

All of it is read from nodes near the root of a backward pass and from what these keep of the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, kind_of, made_last
from diag.snapshot.loop.arithmetic import Odd
from diag.watching.observe.loop.answers.compared import compared_by
from diag.watching.observe.loop.data.bounds import RANGES, UNBOUNDED, range_of
from diag.watching.observe.loop.formula.chains import (
    TOGETHER,
    OddFound,
    argument_of,
    behind_views,
    bottom_of,
    is_even_power,
    one_view,
    sides_of,
)
from diag.watching.observe.loop.formula.parts import LONGEST_CHAIN, Summand, given_shape, within

FEWEST_IN_A_LOSS = 8
LOGISTIC = ("Softplus", "LogSigmoid")
OF_PAIRS = (*LOGISTIC, "Sigmoid", "Relu", "ClampMin", "Clamp")
OF_TARGETS = ("BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "NllLoss", "NllLoss2D")
OUT_OF_REACH, SLACK = 0.05, 0.01  # of the targets; of their range
UNREDUCED = 0
WEIGHT_OF_A_SUM = 0.5  # of a row, at least: a square may be halved


def pairs(nodes: list[Any]) -> Iterator[OddFound]:
    """Differences of two entries of one tensor of scores, which a function that is not even asks to be large."""
    masks = {_source(node): _mask_of(node) for node in nodes if kind_of(node) == "Index"}
    for node in nodes:
        if kind_of(node) not in OF_PAIRS:
            continue
        difference = _difference(node)
        if difference is None:
            continue
        sides = [(behind_views(side), side, index) for side, index in difference.next_functions]
        made = {kind_of(maker) for maker, _, _ in sides if maker is not None}
        of, low, high = RANGES.get(made.pop(), UNBOUNDED) if len(made) == 1 else UNBOUNDED
        if kind_of(node) in LOGISTIC and math.isfinite(width := high - low):
            yield OddFound(Odd.PAIRS_BOUNDED, {"width": width, "least": math.log1p(math.exp(-width))}, of)
        mask = masks.get(node)
        if mask is not None and _both_ways(mask, sides):
            yield OddFound(Odd.PAIRS_BOTH_WAYS, {"pairs": float(mask.sum())})


def _source(node: Any) -> Any:
    """What is indexed, past multiples."""
    return bottom_of(*argument_of(node))[0]


def _mask_of(node: Any) -> Tensor | None:
    """The mask of whole entries that an indexing was made with."""
    indices = [i for i in getattr(node, "_saved_indices", ()) if i is not None]
    mask = indices[0] if len(indices) == 1 else None
    shape = tuple(getattr(node, "_saved_self_sym_sizes", ()))
    whole = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.is_cpu and tuple(mask.shape) == shape
    return mask if whole else None


def _difference(node: Any) -> Any:
    """The difference of two sides with a graph that this function is taken of, of its negative, or of a margin
    less it; None for a multiple of one, as a temperature gives."""
    before, _ = argument_of(node)
    for _ in range(6):
        if before is None:
            return None
        kind, sides = kind_of(before), sides_of(before)
        if kind == "Sub" and len(sides) == 2:
            return before
        if kind not in ("Neg", "Rsub", "Add", "Sub", *PASSING_ON) or len(sides) != 1:
            return None
        before = sides[0][0]
    return None


def _both_ways(mask: Tensor, sides: list[tuple[Any, Any, int]]) -> bool:
    """Whether one tensor's entries meet in a square of pairs, of which the mask takes each both ways."""
    if len(sides) != 2 or sides[0][0] is not sides[1][0]:
        return False
    shapes = [given_shape(side, index) for _, side, index in sides]
    if any(s is None or len(s) != mask.ndim for s in shapes):
        return False
    first = [i for i in range(mask.ndim) if (shapes[0] or ())[i] == 1 < mask.shape[i]]
    second = [i for i in range(mask.ndim) if (shapes[1] or ())[i] == 1 < mask.shape[i]]
    if len(first) != 1 or len(second) != 1 or first == second:
        return False
    return bool(mask.any()) and torch.equal(mask, mask.transpose(first[0], second[0]))


# Which targets count


def one_kind(nodes: list[Any], parts: list[Summand]) -> Iterator[OddFound]:
    """A loss of single entries of which a mask leaves those of one target alone."""
    losses = [n for n in nodes if kind_of(n) in OF_TARGETS]
    targets = [t for n in losses if isinstance(t := getattr(n, "_saved_target", None), Tensor) and t.is_cpu]
    if len(targets) < len(losses):
        return
    weights = {p.node: p.weights for p in parts if p.factors and p.kind in OF_TARGETS}
    counted = [(n, t, _counted(n, t, nodes, weights)) for n, t in zip(losses, targets, strict=True)]
    for node, target, chosen in counted:
        if not FEWEST_IN_A_LOSS <= chosen.numel() < target.numel():
            continue
        kind = kind_of(node)
        # What another term of the same kind asks for may be what this one leaves out.
        asked = [c for n, _, c in counted if kind_of(n)[:3] == kind[:3]]
        if len({float(v) for c in asked for v in c.unique()[:4].tolist()}) != 1 or _used_again(nodes, node):
            continue
        kept = float(chosen.reshape(-1)[0])
        left = float((target != kept).float().mean())
        if left > 0:
            yield OddFound(Odd.ONE_TARGET, {"target": kept, "left": left, "classes": float("Nll" in kind)})
            return


def _counted(node: Any, target: Tensor, nodes: list[Any], weights: Mapping[Any, Tensor]) -> Tensor:
    """The targets that masks, or weights that are not zero, leave in the loss."""
    if getattr(node, "_saved_reduction", None) != UNREDUCED:
        return target
    masks = [_mask_of(n) for n in nodes if kind_of(n) == "Index" and _source(n) is node]
    masks += [weights[node] != 0] if node in weights else []
    fit = [m for m in masks if m is not None and m.shape == target.shape]
    return target[torch.stack(fit).any(0)] if fit else target


def _used_again(nodes: list[Any], node: Any) -> bool:
    """Whether something else of the loss depends on the outputs that this one compares."""
    argument, index = argument_of(node)
    users = [n for n in nodes for p, i in n.next_functions if p is argument and i == index]
    return len(users) != 1 or not one_view(nodes, argument, behind_views(argument))


# The end of the network against what it is compared with


def beyond(nodes: list[Any]) -> Iterator[OddFound]:
    """Targets that the function before a difference cannot reach."""
    for node in nodes:
        found = _output_and_target(node)
        if found is None:
            continue
        name, lower, upper, target = found
        low, high = float(target.min()), float(target.max())
        slack = SLACK * (high - low)
        outside = float(((target < lower - slack) | (target > upper + slack)).float().mean())
        if outside >= OUT_OF_REACH:
            yield OddFound(
                Odd.BEYOND_REACH,
                {"outside": outside, "low": low, "high": high, "lower": lower, "upper": upper},
                name,
            )
            return


def _output_and_target(node: Any) -> tuple[str, float, float, Tensor] | None:
    if not (kind_of(node) == "Abs" or is_even_power(node)):  # of torch's functions the calls are seen
        return None
    found = compared_by(node, {})
    if found is None or not found.targets.is_cpu or not FEWEST_IN_A_LOSS <= found.targets.numel() < 1 << 22:
        return None
    name, lower, upper = range_of(found.node)
    return (name, lower, upper, found.targets) if name else None


def outputs_cut(node: Any) -> int:
    """How many numbers there are in outputs that a ReLU made zero, every one of them; 0 for any other outputs."""
    made = made_last(node)
    result = getattr(made, "_saved_result", None) if made is not None and kind_of(made) == "Relu" else None
    if not isinstance(result, Tensor) or not result.is_cpu or result.numel() < FEWEST_IN_A_LOSS:
        return 0
    return 0 if bool(result.any()) else result.numel()


# The whole


def squared_mean(parts: list[Summand]) -> Iterator[OddFound]:
    """A loss that is the square, or the absolute value, of the mean of differences."""
    if len(parts) != 1 or parts[0].shape not in ((), (1,)):
        return
    (part,) = parts
    if not (part.is_square or part.kind == "Abs"):
        return
    node, _ = argument_of(part.node)
    while node is not None and (kind_of(node) in ("Neg", *PASSING_ON)):
        node, _ = argument_of(node)
    sizes = tuple(getattr(node, "_saved_self_sym_sizes", ())) if node is not None else ()
    if node is None or kind_of(node) not in ("Mean", "Sum") or math.prod(sizes) < FEWEST_IN_A_LOSS:
        return
    inside = made_last(argument_of(node)[0])
    if inside is not None and kind_of(inside) in ("Sub", "Rsub") and len(sides_of(inside)) == 1:
        kind = Odd.MEAN_SQUARED if part.is_square else Odd.MEAN_ABSOLUTE
        yield OddFound(kind, {"entries": float(math.prod(sizes))})


def summed(root: Tensor, rows: int) -> Iterator[OddFound]:
    """A loss that is the plain sum of one number of each row of the batch, and of no weighted mean."""
    node: Any = root.grad_fn
    for _ in range(6):
        if node is None or kind_of(node) not in ("Neg", *PASSING_ON):
            break
        node, _index = argument_of(node)
    sizes = tuple(getattr(node, "_saved_self_sym_sizes", ())) if node is not None else ()
    if node is None or kind_of(node) != "Sum" or hasattr(node, "_saved_dim") or sizes[:1] != (rows,):
        return
    if _weight_of_entries(*argument_of(node)) >= WEIGHT_OF_A_SUM * rows:
        yield OddFound(Odd.SUMMED, {"rows": float(rows)})


def _weight_of_entries(node: Any, index: int) -> float:
    """The sum of the sizes of what entries were multiplied by last: of a mean by hand it is about one, whether the
    weights are constants or a softmax."""
    part = Summand(node, index, 1.0)
    for _ in range(LONGEST_CHAIN):
        inside = within(part)
        if inside is None or len(inside) != 1 or part.kind in TOGETHER:
            break
        (part,) = inside
    weights = part.weights.abs()
    for side, _ in sides_of(part.node) if part.kind == "Mul" else ():
        shares = getattr(side, "_saved_result", None) if kind_of(side) == "Softmax" else None
        if isinstance(shares, Tensor) and shares.is_cpu and shares.shape == weights.shape:
            weights = weights * shares.detach()
    return float(weights.sum())


def flat_derivative(nodes: list[Any]) -> Iterator[OddFound]:
    """A second derivative through a ReLU: the derivative of its slope, which is zero."""
    for node in nodes:
        if kind_of(node) != "Mm" or not node.next_functions:
            continue
        before, _ = node.next_functions[0]
        if before is None or kind_of(before) != "ThresholdBackward" or before.next_functions[0][0] is not None:
            continue
        kept = getattr(node, "_saved_self", None)
        if isinstance(kept, Tensor) and kept.is_cpu and kept.numel() >= FEWEST_IN_A_LOSS and not bool(kept.any()):
            yield OddFound(Odd.SECOND_DERIVATIVE, {"entries": float(kept.numel())})
            return
