"""Networks without an activation function: whether each linear layer takes what another one gave as it is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, constant_of, kind_of, parents_of

# Operations after which what was linear in the input is so still, at least in evaluation mode.
KEEPING_LINEAR = (*PASSING_ON, "NativeDropout", "NativeBatchNorm", "CudnnBatchNorm")
WITH_ANOTHER = ("Mul", "Div", "Add", "Sub")  # where that is a parameter, a number or the noise of dropout
DATA_OF, WEIGHT_OF = {"Addmm": 1, "Mm": 0}, {"Addmm": 2, "Mm": 1}  # which argument of a linear layer
LONGEST_WAY_BETWEEN = 16  # nodes
FEWEST_IN_A_ROW = 2  # layers


def linear_layers(nodes: Sequence[Any], parameters: Collection[int]) -> tuple[int, ...]:
    """The weights, by id, of a network that is nothing but linear layers one behind the other, of which no hidden
    one is narrower than both the input and the output; else empty. parameters: of all of it, by id."""
    weights = {n: w for n in nodes if kind_of(n) in DATA_OF and (w := _weight_of(n)) is not None}
    if len({id(w) for w in weights.values()}) < FEWEST_IN_A_ROW:
        return ()
    before = {n: _before(n) for n in weights}
    behind = {b for b in before.values() if b is not None}
    met = {id(n.variable) for n in nodes if kind_of(n) == "AccumulateGrad"}
    if not behind or not behind <= set(weights) or not parameters or not set(parameters) <= met:
        return ()
    takes = max(w.shape[1] for n, w in weights.items() if before[n] is None)
    gives = max(w.shape[0] for n, w in weights.items() if n not in behind)
    narrowest = min(weights[n].shape[0] for n in behind)
    return tuple(dict.fromkeys(id(w) for w in weights.values())) if narrowest >= min(takes, gives) else ()


def _weight_of(node: Any) -> Tensor | None:
    """The parameter that a product is taken with."""
    side, _ = node.next_functions[WEIGHT_OF[kind_of(node)]]
    for _ in range(3):
        if side is None or kind_of(side) == "AccumulateGrad":
            break
        side = next(iter(parents_of(side)), None) if kind_of(side) in ("T", "Transpose") else None
    weight: Tensor | None = None if side is None or not hasattr(side, "variable") else side.variable
    return weight if weight is not None and weight.ndim == 2 else None


def _before(layer: Any) -> Any:
    """The node behind a layer's data, past what keeps it linear; None for data without a graph."""
    node, _ = layer.next_functions[DATA_OF[kind_of(layer)]]
    for _ in range(LONGEST_WAY_BETWEEN):
        if node is None or not _keeps_linear(node):
            break
        inside = [p for p in parents_of(node) if kind_of(p) != "AccumulateGrad"]
        if len(inside) != 1 or node.next_functions[0][0] is not inside[0]:
            break
        node = inside[0]
    return node


def _keeps_linear(node: Any) -> bool:
    """Whether an operation is linear in the data. Another tensor that it takes, without a graph, may be made of the
    data: a mask of what is above zero is a ReLU."""
    kind = kind_of(node)
    if kind not in WITH_ANOTHER:
        return kind in KEEPING_LINEAR
    if any(kind_of(p) == "AccumulateGrad" for p in parents_of(node)):
        return True
    other = constant_of(node) if kind in ("Mul", "Div") else None
    return isinstance(other, Tensor) and _is_number_or_dropout(other)


def _is_number_or_dropout(factor: Tensor) -> bool:
    """Whether all entries are one number, or some are zero and the others one number above one."""
    if factor.numel() == 1:
        return True
    kept = factor[factor != 0]
    one = len(kept) > 0 and bool((kept == kept[0]).all())
    return one and (len(kept) == factor.numel() or float(kept[0]) > 1)
