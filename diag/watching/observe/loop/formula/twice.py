"""Functions that are applied twice: softmax or sigmoid, in the loss, of an output that is one already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import (
    COPYING,
    PASSING_ON,
    constant_of,
    first_arguments,
    kind_of,
    nodes_before,
    parents_of,
    signed,
)
from diag.watching.observe.loop.formula.parts import given_shape

NODES_OF_A_FORMULA = 2048
APPLIED = ("softmax", "sigmoid")
AGAIN = {"Softmax": "softmax", "LogSoftmax": "softmax", "Logsumexp": "softmax", "Sigmoid": "sigmoid",
         "LogSigmoid": "sigmoid"}  # fmt: skip

OutputsMade = dict[
    int, tuple[str, int | None]
]  # by the number of an output's node: the function that made it, its axis


def applied_twice(root: Tensor, made: OutputsMade) -> str:
    """The function that made an output and is applied to it again on the way to the loss; empty for none."""
    if not any(name in APPLIED for name, _ in made.values()):
        return ""
    for node in nodes_before([root.grad_fn], NODES_OF_A_FORMULA, lambda n: n._sequence_nr() in made):
        name = "" if node._sequence_nr() in made else AGAIN.get(kind_of(node), "")
        if name and (name, _axis(node)) in [made.get(p._sequence_nr()) for p in _passed_on(node, name)]:
            return name
    return "sigmoid" if any(name == "sigmoid" for name, _ in made.values()) and _crossed(root, made) else ""


def _axis(node: Any) -> int | None:
    """The axis that a softmax runs over, from the front; None for what has none."""
    axis, parent = getattr(node, "_saved_dim", None), next(iter(node.next_functions), (None, 0))
    shape = given_shape(*parent)
    if axis is None or shape is None:
        return None
    if isinstance(axis, (tuple, list)):
        if len(axis) != 1:
            return None
        (axis,) = axis
    return signed(axis) % len(shape) if shape else None


def _passed_on(node: Any, name: str) -> Iterator[Any]:
    """The nodes from the one that made a function's argument back to the first that is more than a copy, or for a
    sigmoid, which has no axis, another shape."""
    passing = PASSING_ON if name == "sigmoid" else COPYING
    for before in first_arguments(next(iter(parents_of(node)), None), 8):
        yield before
        if kind_of(before) not in passing:
            return


def _crossed(root: Tensor, made: OutputsMade) -> bool:
    """Whether softplus(z) - y z, the cross-entropy of a logit z, or softplus(-z), its half in a game, is taken of
    an output z that a sigmoid made."""
    softened, multiplied = set[int](), set[int]()
    for node in nodes_before([root.grad_fn], NODES_OF_A_FORMULA, lambda n: n._sequence_nr() in made):
        kind, before = kind_of(node), parents_of(node)
        if kind == "Softplus":
            turned = kind_of(before[0]) == "Neg"
            own = _own_sigmoid(parents_of(before[0])[0] if turned else before[0], made)
            if turned and own:
                return True
            softened.add(own)
        elif kind == "Mul" and len(before) == 1 and not is_multiple(node):
            multiplied.add(_own_sigmoid(before[0], made))
    return bool((softened & multiplied) - {0})


def _own_sigmoid(node: Any, made: OutputsMade) -> int:
    """The number of the output that this node passes on, if a sigmoid made it; else 0."""
    for before in first_arguments(node, 8):
        if made.get(before._sequence_nr(), ("",))[0] == "sigmoid":
            return int(before._sequence_nr())
        if kind_of(before) not in PASSING_ON:
            return 0
    return 0


def is_multiple(node: Any) -> bool:
    """Whether a product is one with a single number."""
    other = constant_of(node)
    return isinstance(other, Tensor) and other.numel() == 1
