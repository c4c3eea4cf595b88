"""How the tensor that a loss was called on came from the model's outputs, read from the autograd graph.

A training loop rarely gives the outputs to the loss as they are: a language model's are flattened or shifted by
one position, `log_softmax` is taken first, half precision is widened. A `Route` repeats these steps on other
outputs. It claims nothing: its user checks that it gives the loss that was observed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, SINK, first_arguments, kind_of, signed

LONGEST_ROUTE = 16
OF_THE_FORM = ("slice", "select", "mul", "div")  # steps that make another loss of a loss function's call
PASSED_ON = ("ToCopy", SINK)
# These only rearrange memory or copy it; the final reshape accounts for them.
REARRANGING = (*PASSING_ON, SINK)


class RouteStep(NamedTuple):
    """One step on the way: a method of tensors by name with its arguments, or "slice" with (axis, slice)."""

    name: str
    arguments: tuple[Any, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        if self.name != "slice":
            return getattr(x, self.name)(*self.arguments)
        axis, start, end, step = self.arguments
        return x[(slice(None),) * axis + (slice(start, end, step),)]


ALL_OF_IT = RouteStep("slice", (0, 0, None, 1))


@dataclass(frozen=True)
class Node:
    """A node of the graph by its operation, and what does its step again (None where that is not known)."""

    name: str
    sequence: int
    step: RouteStep | CutEnd | None


@dataclass(frozen=True)
class Route:
    """The steps from the outputs' tensor to the loss's input.

    tail: the shape of the input after its first axis, to which the result is brought; flatten: whether leading
    axes are merged into one for it. dtype: what the input was widened to. positions: how many positions of the
    second axis are kept, where the rest were cut off the end (a language model's shift), else None.
    """

    steps: tuple[RouteStep, ...] = ()
    tail: tuple[int, ...] = ()
    flatten: bool = False
    dtype: torch.dtype | None = None
    positions: int | None = None

    def unflattened(self, outputs: Tensor) -> Tensor:
        """The loss's input before its leading axes are merged, the positions cut off still in place."""
        for step in self.steps:
            outputs = step(outputs)
        # Widening only: measuring in float64 must not be narrowed to what training used.
        wider = self.dtype is not None and self.dtype.itemsize > outputs.dtype.itemsize
        return outputs.to(self.dtype) if wider else outputs

    def __call__(self, outputs: Tensor) -> Tensor:
        value = self.unflattened(outputs)
        return value.reshape(-1, *self.tail) if self.flatten else value


def route_between(outputs: Tensor, source: int | None, prediction: Tensor, nodes: list[Node]) -> Route | None:
    """The route from `outputs` (made by the graph node numbered `source`) to the loss's input `prediction`.

    nodes: the chain of graph nodes that ends in `prediction`, the last first. None where there is no known way.
    """
    same_memory = prediction.data_ptr() == outputs.data_ptr() and prediction.numel() == outputs.numel()
    if same_memory and prediction.dtype == outputs.dtype:
        return _rearranged(outputs, prediction)
    numbers = [n.sequence for n in nodes]
    if source is None or source not in numbers:
        return None
    chain = nodes[: numbers.index(source)][::-1]
    needed = [n for n in chain if not _is_transparent(n)]
    steps = [n.step for n in needed if n.step is not None]
    if len(steps) < len(needed):
        return None
    cut = steps[0] if steps and isinstance(steps[0], CutEnd) else None
    kept: list[Any] = [s for s in steps if s is not cut]
    return Route(tuple(kept), tuple(prediction.shape[1:]), True, prediction.dtype, cut.length if cut else None)


def chain_of(prediction: Tensor) -> list[Node]:
    """The graph nodes before `prediction`, the last first, along its first differentiable argument."""
    return [
        Node(kind_of(n), n._sequence_nr(), _step_of(n)) for n in first_arguments(prediction.grad_fn, LONGEST_ROUTE)
    ]


def source_of(outputs: Tensor) -> int | None:
    """The number of the graph node that made `outputs`, before wrappers widened them or passed them on.

    Accelerate widens a model's outputs after the model itself has computed its loss from them.
    """
    node = outputs.grad_fn
    if node is not None and kind_of(node) in PASSED_ON:
        made = (n for n in first_arguments(node, LONGEST_ROUTE) if kind_of(n) not in PASSED_ON)
        node = next(made, None)
    return None if node is None else node._sequence_nr()


@dataclass(frozen=True)
class CutEnd:
    """Keep the first `length` positions of the second axis."""

    length: int

    def __call__(self, x: Tensor) -> Tensor:
        return x[:, : self.length]


def _rearranged(outputs: Tensor, prediction: Tensor) -> Route | None:
    layout = (prediction.shape, prediction.stride())
    if layout == (outputs.shape, outputs.stride()):
        return Route()
    if outputs.is_contiguous() and prediction.is_contiguous():
        return Route(tail=tuple(prediction.shape[1:]), flatten=True)
    if outputs.ndim > 2 and layout == (outputs.movedim(-1, 1).shape, outputs.movedim(-1, 1).stride()):
        return Route(steps=(RouteStep("movedim", (-1, 1)),))
    return None


def _is_transparent(node: Node) -> bool:
    return node.step is None and node.name in REARRANGING


def _step_of(node: Any) -> RouteStep | CutEnd | None:
    kind = kind_of(node)
    if kind == "LogSoftmax":
        dim = signed(node._saved_dim)
        return RouteStep("log_softmax", (-1 if dim == node._saved_result.ndim - 1 else dim,))
    if kind == "Sigmoid":
        return RouteStep("sigmoid")
    if kind == "Transpose":
        return RouteStep("transpose", (signed(node._saved_dim0), signed(node._saved_dim1)))
    if kind == "Permute":
        return RouteStep("permute", (tuple(signed(d) for d in node._saved_dims),))
    if kind == "Slice":
        return _slice_step(node)
    if kind in ("Mul", "Div"):
        return _scale_step(node, kind)
    if kind == "Select":
        dim, index = signed(node._saved_dim), signed(node._saved_index)
        return RouteStep("select", (dim, index)) if dim != 0 else None
    return None


def _scale_step(node: Any, kind: str) -> RouteStep | None:
    """A constant number times the outputs, as a temperature."""
    if node.next_functions[0][0] is None:
        return None
    other = node._saved_other
    known = isinstance(other, Tensor) and other.numel() == 1 and other.is_cpu and not other.requires_grad
    return RouteStep(kind.lower(), (float(other),)) if known else None


def _slice_step(node: Any) -> RouteStep | CutEnd | None:
    dim, start, step = signed(node._saved_dim), signed(node._saved_start), signed(node._saved_step)
    length, end = node._saved_self_sym_sizes[dim], signed(node._saved_end)
    end = min(end if end >= 0 else end + length, length)
    if (start, step) == (0, 1) and end == length:
        return ALL_OF_IT
    if (dim, start, step) == (1, 0, 1):
        return CutEnd(end)
    # To the end it is to the end of longer ones too.
    return RouteStep("slice", (dim, start, None if end == length else end, step)) if dim > 0 else None


def part_of(prediction: Tensor, numbers: Container[int]) -> tuple[int, tuple[Any, ...]] | None:
    """The number among `numbers` of the graph node that a loss's input came from, and which part of it was taken:
    how long what was cut off is does not count. None where it came from none of them."""
    steps: list[Any] = []
    for node in first_arguments(prediction.grad_fn, LONGEST_ROUTE):
        if (number := node._sequence_nr()) in numbers:
            return number, selecting(steps[::-1])
        if (step := _step_of(node)) is not None:
            steps.append(step)
    return None


def selecting(steps: Iterable[Any]) -> tuple[Any, ...]:
    """Those of the steps that take a part, or that scale it: another temperature is another loss."""
    return tuple(s for s in steps if isinstance(s, RouteStep) and s.name in OF_THE_FORM and s != ALL_OF_IT)
