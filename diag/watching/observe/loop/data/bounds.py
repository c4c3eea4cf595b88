"""The range in which the function that ends a network holds its outputs, read from the autograd graph: that of a
bounded activation, of a clamp, and of either times a number."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from diag.display import format_number
from diag.snapshot.autograd_graph import TAKING, constant_of, kind_of, made_last, parents_of

UNBOUNDED = ("", -math.inf, math.inf)
RANGES = {
    "Relu": ("relu", 0.0, math.inf),
    "Tanh": ("tanh", -1.0, 1.0),
    "Sigmoid": ("sigmoid", 0.0, 1.0),
    "Softmax": ("softmax", 0.0, 1.0),
    "Softplus": ("softplus", 0.0, math.inf),
}
KEEPING_RANGE = (*TAKING, "Gather")
FARTHEST_FUNCTION = 24  # nodes
MOST_FACTORS = 3  # numbers that outputs are multiplied by
CLAMPS = {"Clamp": ("_saved_min", "_saved_max"), "Hardtanh": ("_saved_min_val", "_saved_max_val")}


def bounded_by(prediction: Tensor) -> tuple[str, float, float]:
    """The function that made the tensor, if it holds it within a range, and the range."""
    return range_of(prediction.grad_fn)


def range_of(node: Any) -> tuple[str, float, float]:
    """The same of what a node of the graph gave; of a function's value times a number, as "tanh times 10"."""
    factor = 1.0
    for _ in range(MOST_FACTORS + 1):
        node = made_last(node, FARTHEST_FUNCTION, KEEPING_RANGE)
        by = None if node is None else _factor(node)
        if by is None:
            break
        factor, node = factor * by, next(iter(parents_of(node)), None)
    name, lower, upper = _of_function(node)
    if factor == 1.0 or not name:
        return name, lower, upper
    lower, upper = sorted((factor * lower, factor * upper))
    return f"{name} times {format_number(factor)}", lower, upper


def _factor(node: Any) -> float | None:
    """The number that a product, a quotient or a sign multiplies by; None for anything else, zero among it."""
    kind = kind_of(node)
    if kind == "Neg":
        return -1.0
    if kind not in ("Mul", "Div") or sum(parent is not None for parent, _ in node.next_functions) != 1:
        return None
    other = constant_of(node)
    one = isinstance(other, Tensor) and other.numel() == 1 and other.is_cpu
    if not one or not math.isfinite(value := float(other)) or value == 0:
        return None
    if kind == "Mul":
        return value
    return 1 / value if node.next_functions[0][0] is not None else None  # and not a number over the outputs


def _of_function(node: Any) -> tuple[str, float, float]:
    name = kind_of(node) if node is not None else ""
    if name in RANGES:
        return RANGES[name]
    if name not in CLAMPS:
        return UNBOUNDED
    low, high = (getattr(node, saved, None) for saved in CLAMPS[name])
    before = made_last(next(iter(parents_of(node)), None))  # a sigmoid, say, that a clamp keeps from zero and one
    of = RANGES.get(kind_of(before), ("",))[0] if before is not None else ""
    lower = float(low) if isinstance(low, (int, float)) else -math.inf
    return of or "clamp", lower, float(high) if isinstance(high, (int, float)) else math.inf
