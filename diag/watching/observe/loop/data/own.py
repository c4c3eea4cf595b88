"""Losses that are the user's own arithmetic and amount to one of torch's: the mean of squared or absolute
differences between the model's outputs and targets, read from the autograd graph.

The difference is what the graph keeps of it, so that the targets are the outputs less the difference: right to
rounding. Nothing else is guessed: a difference of two things that both have a graph, of something computed from the
outputs, or of another shape than theirs is left alone.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, kind_of, parents_of
from diag.snapshot.batch import tensors_in
from diag.watching.observe.terms import terms_of

OUTPUTS_KEPT = 8  # of the calls before a backward pass
ROUNDING_OF_DIFFERENCE = 1e-5  # of the largest difference
LEAST_SPREAD = 1e-3  # of the targets, beside their size
NUMBERS_OF_SPREAD = 1 << 16  # numbers of the targets whose spread is taken, at most
NODES_PASSING_ON = 8  # that may pass the outputs on to the difference


# By the number of a node and which of its outputs: chunks of one tensor have one node.
Outputs = dict[tuple[int, int], Tensor]


@dataclass(frozen=True)
class OwnDifference:
    """The mean of a function of `output - target`, which is what torch's `function` gives of the two.

    difference: as the graph keeps it, of the sign `sign`. expanded: the shapes of output and targets where they
    were broadcast against each other, so that every output is compared with every target; else empty.
    """

    function: str
    output: Tensor
    difference: Tensor
    sign: int
    expanded: tuple[tuple[int, ...], ...] = ()

    @functools.cached_property
    def targets(self) -> Tensor:
        """What the outputs are compared with, to rounding."""
        return self.output - self.sign * self.difference


class ModelOutputs:
    """Follows the model's outputs up to each backward pass, on the host: what lies on a device cannot be looked at
    without waiting for it."""

    def __init__(self) -> None:
        self._outputs: deque[tuple[tuple[int, int], Tensor]] = deque(maxlen=OUTPUTS_KEPT)

    def training_call(self, outputs: Any) -> None:
        """The model was called in training."""
        for t in tensors_in(outputs)[:OUTPUTS_KEPT]:
            if t.grad_fn is not None and t.is_cpu and t.is_floating_point():
                self._outputs.append(((t.grad_fn._sequence_nr(), t.output_nr), t.detach()))

    def before_backward(self) -> Outputs:
        """The outputs before the backward pass that begins; none are kept in memory past it."""
        outputs = dict(self._outputs)
        self._outputs.clear()
        return outputs


def difference_behind(roots: Any, outputs: Outputs) -> OwnDifference | None:
    """What a backward pass descends, where that is one such difference and nothing else."""
    if not outputs or not isinstance(roots, Tensor) or roots.grad_fn is None:
        return None
    terms = terms_of(roots, ())
    found = _difference(terms[0].node, outputs) if len(terms) == 1 and not terms[0].factors else None
    return found if found is not None and (found.expanded or targets_vary(found.targets)) else None


def targets_vary(targets: Tensor) -> bool:
    """Whether the targets are more than one number, and rounding: the real half of two networks asks for 1."""
    if targets.numel() < 2:
        return False
    wide = targets.reshape(-1)[:: -(-targets.numel() // NUMBERS_OF_SPREAD)].double()
    return bool(wide.std() > LEAST_SPREAD * wide.square().mean().sqrt())


def _difference(node: Any, outputs: Outputs) -> OwnDifference | None:
    made_of = parents_of(node)
    if kind_of(node) != "Mean" or hasattr(node, "_saved_dim") or len(made_of) != 1:
        return None
    function, kept, before = square_or_size(made_of[0])
    if not function or not isinstance(kept, Tensor) or kind_of(before) not in ("Sub", "Rsub"):
        return None
    sides = before.next_functions
    here = [i for i, (parent, _) in enumerate(sides) if parent is not None]
    if len(here) != 1 or getattr(before, "_saved_alpha", 1) != 1:
        return None
    made, index = sides[here[0]]
    output = _passed_on(made, index, outputs)
    sign = 1 if here[0] == 0 and kind_of(before) == "Sub" else -1
    if output is None or not kept.ndim:
        return None
    if output.numel() != kept.numel():
        shapes = _expanded(output, kept.detach(), sign)
        return OwnDifference(function, output, kept.detach(), sign, shapes) if shapes else None
    return OwnDifference(function, output.reshape(kept.shape), kept.detach(), sign)


def square_or_size(node: Any) -> tuple[str, Any, Any]:
    """The function of torch whose mean a node's squares or sizes are, what they are of, and the node that made
    that; nothing for another operation."""
    kind, before = kind_of(node), parents_of(node)
    if kind == "Pow" and len(before) == 1 and float(node._saved_exponent) == 2:
        return "mse_loss", node._saved_self, before[0]
    if kind == "Mul" and len(before) == 2 and before[0] is before[1] and node._saved_self is not None:
        return "mse_loss", node._saved_self, before[0]
    if kind == "Abs" and len(before) == 1:
        return "l1_loss", node._saved_self, before[0]
    return "", None, None


def _expanded(output: Tensor, difference: Tensor, sign: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of output and targets where each has one entry along an axis along which the other has several."""
    for axis in range(difference.ndim):
        shape = (*difference.shape[:axis], 1, *difference.shape[axis + 1 :])
        if difference.shape[axis] < 2 or output.numel() != math.prod(shape):
            continue
        targets = output.reshape(shape) - sign * difference
        slack = ROUNDING_OF_DIFFERENCE * float(difference.abs().max())
        for other in range(difference.ndim):
            same = other != axis and bool((targets - targets.narrow(other, 0, 1)).abs().max() <= slack)
            if same and difference.shape[other] > 1 and targets_vary(targets):
                return shape, (*difference.shape[:other], 1, *difference.shape[other + 1 :])
    return ()


def _passed_on(node: Any, index: int, outputs: Outputs) -> Tensor | None:
    """The output of the model that this output of the node gives on as it is."""
    for _ in range(NODES_PASSING_ON):
        if (node._sequence_nr(), index) in outputs:
            return outputs[node._sequence_nr(), index]
        if kind_of(node) not in PASSING_ON or len(parents_of(node)) != 1:
            return None
        node, index = next(side for side in node.next_functions if side[0] is not None)
    return None
