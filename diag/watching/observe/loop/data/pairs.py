"""Pairs that a loss compares: are the two sides the same example?

Where several calls of the model come before one backward pass, the outputs of two of them may meet in the loss: two
views of an example, an anchor and its positive. Seen in the autograd graph is whether they meet, entry by entry or
in a product, before each has been reduced or cut; and in the numbers whether the two calls had the same inputs and
gave the same outputs, as they do not where dropout or noise makes the views.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import kind_of, nodes_before
from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.data import PairFacts
from diag.watching.observe.loop.moment import Moment, due

CALLS_OF_A_PASS = 4  # that are kept before a backward pass
NODES_OF_A_LOSS = 512
EACH = 8  # backward passes that are looked at one by one, then ever fewer
LOOKS_TOLD = (3, 5)  # that are news
BRING_TOGETHER = frozenset(
    ("Sub", "Rsub", "Mul", "Mm", "Bmm", "Matmul", "Dot", "Cat", "Stack", "Cdist", "EuclideanDist")
)
TAKE_A_PART = frozenset(
    ("Slice", "Select", "Index", "IndexSelect", "Split", "SplitWithSizes", "Unbind", "Gather", "Narrow")
)

OF_LOSSES = ("NllLoss", "NllLoss2D", "MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "KlDiv", "SoftMarginLoss")
REDUCED = frozenset((*OF_LOSSES, "Sum", "Mean", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"))


class _Call(NamedTuple):
    """One call of the model: what it was given, and its first output with the number of its graph node."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    number: int


class PairedCalls:
    """Follows the calls before each backward pass."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._calls: deque[_Call] = deque(maxlen=CALLS_OF_A_PASS)
        self._passes = self._looked = self._same = self._first = 0

    def training_call(self, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        """The model was called in training."""
        inputs = tuple(tensors_in((args, dict(kwargs))))
        found = (t for t in tensors_in(outputs) if t.is_floating_point() and t.is_cpu and t.ndim > 1 and len(t) > 1)
        output = next(found, None)
        node = None if output is None else output.grad_fn
        if output is not None and node is not None and inputs and not any(t.requires_grad for t in inputs):
            self._calls.append(_Call(inputs, output.detach(), node._sequence_nr()))

    def backward_called(self, roots: Any) -> None:
        """A backward pass begins."""
        calls, self._calls = list(self._calls), deque(maxlen=CALLS_OF_A_PASS)
        pairs = [(a, b) for i, a in enumerate(calls) for b in calls[i + 1 :] if a.output.shape == b.output.shape]
        if not pairs or not isinstance(roots, Tensor) or roots.grad_fn is None:
            return
        self._passes += 1
        if self._passes > EACH and not due(self._passes):
            return
        same = [(a, b) for a, b in pairs if _is_same(a, b)]
        self._looked += 1
        if any(meet(roots.grad_fn, a.number, b.number) for a, b in same):
            self._same += 1
            self._first = self._first or self._moment.step
            if self._same == self._looked in LOOKS_TOLD:
                self._moment.news(("pairs", self._looked), "pairs")

    def facts(self) -> PairFacts:
        """As plain data."""
        return PairFacts(self._looked, self._same, self._first)


def meet(root: Any, a: int, b: int) -> bool:
    """Whether what the graph nodes `a` and `b` gave, whole, come together in one operation on the way to `root`."""
    reached = {a: {a}, b: {b}}
    nodes = list(nodes_before([root], NODES_OF_A_LOSS, lambda n: n._sequence_nr() in (a, b)))
    for node in sorted(nodes, key=lambda n: n._sequence_nr()):  # each after those that it was made of
        number, name = node._sequence_nr(), kind_of(node)
        if number in (a, b) or name in TAKE_A_PART:
            continue
        before = [reached[p._sequence_nr()] for p, _ in node.next_functions if p and p._sequence_nr() in reached]
        sides = set().union(*before)
        if len(sides) == 2:
            if name in BRING_TOGETHER and any(one != sides for one in before):
                return True
            continue  # sums of what has been reduced
        if sides and name not in REDUCED:
            reached[number] = sides
    return False


def _is_same(a: _Call, b: _Call) -> bool:
    if not torch.equal(a.output, b.output) or len(a.inputs) != len(b.inputs):
        return False
    return all(_equal(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
