"""What a backward pass is called on, read from its graph: the mean over a batch, or a fraction of it.

A loss that is divided by a number of micro-batches carries that factor in all of its terms, so one term that is the
plain mean of something says that the whole was not divided.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, kind_of, parents_of

NODES_VISITED = 64  # of a graph that are visited
MEAN_REDUCTION = 1


def undivided(root: Tensor) -> bool | None:
    """Whether a term of the root is a mean over a batch, times one; None where no term's factor is known."""
    waiting: list[tuple[Any, float]] = [(root.grad_fn, 1.0)]
    factors: list[float] = []
    for _ in range(NODES_VISITED):
        if not waiting:
            break
        node, factor = waiting.pop()
        if node is None:
            continue
        name = kind_of(node)
        if name in ("Add", "Sub") or name == "Neg":
            waiting += [(parent, factor) for parent in parents_of(node)]
        elif name in ("Div", "Mul"):
            waiting += [(parent, _scaled(name, node, factor)) for parent in parents_of(node)]
        elif name in PASSING_ON:
            waiting += [(parent, factor) for parent in parents_of(node)]
        else:
            factors.append(_of_mean(name, node, factor))
    known = [f for f in factors if not math.isnan(f)]
    return any(math.isclose(f, 1.0, rel_tol=1e-6) for f in known) if known else None


def _scaled(name: str, node: Any, factor: float) -> float:
    other = getattr(node, "_saved_other", None)
    on_host = isinstance(other, Tensor) and other.is_cpu and other.numel() == 1 and not other.requires_grad
    value = float(other) if isinstance(other, (int, float)) or on_host else math.nan  # type: ignore[arg-type]
    if name == "Div":
        return factor / value if value else math.nan
    return factor * value


def _of_mean(name: str, node: Any, factor: float) -> float:
    """The factor of the mean that this node takes, NaN where it takes none."""
    if name == "Mean":
        return factor
    if name == "Sum":  # divided by the length of the batch it is a mean over the examples
        sizes = getattr(node, "_saved_self_sym_sizes", ())
        return factor * sizes[0] if sizes and math.isclose(factor * sizes[0], 1.0, rel_tol=1e-6) else math.nan
    return factor if getattr(node, "_saved_reduction", None) == MEAN_REDUCTION else math.nan
