"""Where the first loss that is not finite came from: the batch, the network, or the computation of the loss.

The number that backward() is called on is read where that waits for no device. The first time that it is not
finite, the batch and the outputs of the model's last call are looked at, and the graph before the loss for the
operation that made it so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import kind_of, nodes_before
from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.steps import OriginFacts
from diag.watching.observe.loop.moment import Moment

NODES_BEFORE_LOSS = 256  # of the graph before the loss
# What an operation kept of its argument or its result where it left the numbers, and in words.
SINGULAR = (
    ("Log", "_saved_self", lambda t: t <= 0, "the logarithm of zero, or of a negative number"),
    ("Log2", "_saved_self", lambda t: t <= 0, "the logarithm of zero, or of a negative number"),
    ("Log10", "_saved_self", lambda t: t <= 0, "the logarithm of zero, or of a negative number"),
    ("Div", "_saved_other", lambda t: t == 0, "a division by zero"),
    ("Exp", "_saved_result", torch.isposinf, "an exponential that is too large"),
    ("Sqrt", "_saved_result", torch.isnan, "the square root of a negative number"),
    ("Reciprocal", "_saved_result", torch.isinf, "a division by zero"),
)


class Origin:
    """Follows the calls of the model and the losses until one is not finite.

    What a call was given and returned is held until the backward pass begins, on the CPU alone.
    """

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._inputs: Any = ()  # tensors, or all that the call was given
        self._outputs: list[Tensor] = []
        self._ends: set[int] = set()  # the graph nodes of the outputs
        self.found: OriginFacts | None = None

    def training_call(self, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        """The model was called in training."""
        if self.found is not None:
            return
        if type(outputs) is Tensor and outputs.is_cpu:  # what is floating is found where it is asked for
            node = outputs.grad_fn
            self._inputs, self._outputs = (args, kwargs), [outputs.detach()]
            self._ends = set() if node is None else {node._sequence_nr()}
        else:
            self._inputs, self._outputs = list(_floating((args, dict(kwargs)))), list(_floating(outputs))
            self._ends = {t.grad_fn._sequence_nr() for t in self._outputs if t.grad_fn is not None}
            self._outputs = [t.detach() for t in self._outputs]

    def backward_called(self, roots: Any) -> None:
        """A backward pass begins."""
        inputs, outputs, ends = self._inputs, self._outputs, self._ends
        self._inputs, self._outputs, self._ends = (), [], set()
        known = self.found is None and isinstance(roots, Tensor) and roots.is_cpu and roots.numel() == 1
        if not known or math.isfinite(roots.item()):
            return
        fine, inputs = _all_finite(list(_floating(outputs))), list(_floating(inputs))
        operation = "" if fine is False or roots.grad_fn is None else _singular(roots.grad_fn, ends)
        self.found = OriginFacts(self._moment.step, _all_finite(inputs), fine, operation)
        self._moment.news("loss not finite", "origin")


def _floating(value: Any) -> Iterator[Tensor]:
    found = [value] if isinstance(value, Tensor) else tensors_in(value)
    return (t for t in found if t.is_floating_point() and t.is_cpu)


def _all_finite(found: list[Tensor]) -> bool | None:
    """Whether the tensors are finite; None where there is none."""
    return all(bool(t.isfinite().all()) for t in found) if found else None


def _singular(root: Any, ends: set[int]) -> str:
    """The operation nearest to the network's outputs that left the numbers; empty where none is known."""
    found = ""
    for node in nodes_before([root], NODES_BEFORE_LOSS, lambda n: n._sequence_nr() in ends):
        for kind, saved, bad, words in SINGULAR:
            kept = getattr(node, saved, None) if kind_of(node) == kind else None
            if isinstance(kept, Tensor) and bool(bad(kept.detach()).any()):
                found = words
    return found
