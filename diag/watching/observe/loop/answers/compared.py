"""What the loop's own arithmetic compares: squared or absolute differences between a part of the model's outputs
and numbers without a graph, anywhere in the loss, read from the autograd graph.

The difference is what the graph keeps of it; the part of the output is taken again as the graph took it. So the
targets are right to rounding, whatever else the loss is made of (a variance, weights, other terms).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, kind_of, nodes_before, parents_of, signed
from diag.watching.observe.loop.data.own import Outputs, square_or_size, targets_vary

NODES_OF_LOSS, NODES_TO_PART = 256, 12
KEEP_THEIR_RESULT = ("Relu", "Tanh", "Sigmoid", "Exp", "Softmax")
VIEWS = ("View", "UnsafeView", "ReshapeAlias")


@dataclass(frozen=True)
class Compared:
    """function: of torch that takes the same of a difference; output: the part of the model's outputs, without a
    graph; node: what made it; targets: what it is compared with, of its shape."""

    function: str
    output: Tensor
    node: Any
    targets: Tensor


def comparisons_behind(roots: Any, outputs: Outputs) -> list[Compared]:
    """The comparisons in what a backward pass descends."""
    if not outputs or not isinstance(roots, Tensor) or roots.grad_fn is None:
        return []
    ends = {number for number, _ in outputs}
    nodes = nodes_before([roots.grad_fn], NODES_OF_LOSS, lambda node: node._sequence_nr() in ends)
    found = (compared_by(node, outputs) for node in nodes)
    return [one for one in found if one is not None and targets_vary(one.targets)]


def compared_by(node: Any, outputs: Outputs) -> Compared | None:
    """What a node compares, if it takes the square or the size of a difference between a part of an output and
    numbers of its shape."""
    function, kept, before = square_or_size(node)
    if not function or not isinstance(kept, Tensor) or not kept.ndim or kind_of(before) not in ("Sub", "Rsub"):
        return None
    sides = [parent for parent, _ in before.next_functions]
    here = [i for i, parent in enumerate(sides) if parent is not None]
    if len(here) != 1 or getattr(before, "_saved_alpha", 1) != 1:
        return None
    made, index = before.next_functions[here[0]]
    output = taken_part(made, index, outputs)
    if output is None or output.numel() != kept.numel():
        return None
    output, difference = output.reshape(kept.shape).to(kept.dtype), kept.detach()
    # The graph of `a - b` has the side that comes first at its first edge; of `rsub` the arguments are exchanged.
    positive = here[0] == 0 and kind_of(before) == "Sub"
    return Compared(function, output, made, output - difference if positive else output + difference)


def taken_part(node: Any, index: int, outputs: Outputs) -> Tensor | None:
    """The numbers that an output of a node has, where it and those before it only take a part of an output of the
    model, pass it on, or keep what they made of it."""
    chain: list[tuple[Any, int]] = []
    for _ in range(NODES_TO_PART):
        if (node._sequence_nr(), index) in outputs:
            return _taken(outputs[node._sequence_nr(), index], reversed(chain))
        if kind_of(node) in KEEP_THEIR_RESULT:
            kept = getattr(node, "_saved_result", None)
            return _taken(kept.detach(), reversed(chain)) if isinstance(kept, Tensor) else None
        if len(parents_of(node)) != 1:
            return None
        chain.append((node, index))
        node, index = next(side for side in node.next_functions if side[0] is not None)
    return None


def _taken(t: Tensor, nodes: Iterator[tuple[Any, int]]) -> Tensor | None:
    """The part of a tensor that these operations take, one after the other."""
    viewed = False
    for node, index in nodes:
        kind = kind_of(node)
        if viewed and kind not in PASSING_ON:
            return None
        if kind == "Select":
            t = t.select(signed(node._saved_dim), signed(node._saved_index))
        elif kind == "Slice":
            every = [slice(None)] * t.ndim
            every[signed(node._saved_dim)] = slice(signed(node._saved_start), _end(node), node._saved_step)
            t = t[tuple(every)]
        elif kind == "Unbind":
            t = t.unbind(signed(node._saved_dim))[index]
        elif kind == "Split":
            t = t.split(signed(node._saved_split_size), signed(node._saved_dim))[index]
        elif viewed:
            continue
        elif kind == "Squeeze":
            t = t.squeeze() if not hasattr(node, "_saved_dim") else _squeezed(t, node._saved_dim)
        elif kind == "Unsqueeze":
            t = t.unsqueeze(signed(node._saved_dim))
        elif kind not in PASSING_ON:
            return None
        elif kind in VIEWS:
            viewed = True  # into which shape is not kept
    return t


def _end(node: Any) -> int | None:
    end = signed(node._saved_end)
    return None if end >= 1 << 62 else end


def _squeezed(t: Tensor, axis: Any) -> Tensor:
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    for a in sorted((signed(a) % t.ndim for a in axes), reverse=True):
        t = t.squeeze(a)
    return t
