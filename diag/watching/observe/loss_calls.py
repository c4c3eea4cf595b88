"""Which loss function's call leads to a backward pass, told by the numbers that autograd gives its nodes.

No graph is held on to: of each call its number and its value are kept until the pass is over.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from torch import Tensor

from diag.watching.observe.capture import LossCall

WALK = 64  # nodes of the graph before the root that are looked at
MOST = 8  # calls that are kept
WHY = {0: "no loss function of torch was seen to lead to it", 1: "the loss is reduced after its call"}


class Seen(NamedTuple):
    """A loss function's call: the number of its graph node, its value, and what is kept of it to learn from."""

    number: int
    value: Tensor
    call: LossCall | None
    summed: bool


class Pass(NamedTuple):
    """A backward pass: its loss, the call behind it or the reason why none is known, and what it descends; whether
    the loss is a part that adds up with the other micro-batches' to the step's."""

    value: Tensor
    call: LossCall | None
    reason: str
    root: Tensor
    is_part: bool


class LossCalls:
    """The calls since the last backward pass."""

    def __init__(self) -> None:
        self._calls: deque[Seen] = deque(maxlen=MOST)
        self._scaled: dict[int, Tensor] = {}

    def add(self, value: Tensor, call: LossCall | None, summed: bool) -> None:
        """A loss function returned `value`, which has a graph."""
        self._calls.append(Seen(_number(value), value.detach(), call, summed))

    def scaled(self, loss: Tensor, scaled: Tensor) -> None:
        """A GradScaler made `scaled` of `loss`."""
        self._scaled = {_number(scaled): loss.detach()}

    def behind(self, root: Tensor) -> Pass:
        """The loss of a backward pass from `root`, a tensor of one number."""
        used = self._used(root)
        descended = self._scaled.get(_number(root), root.detach()).reshape(())
        if len(used) != 1 or used[0].value.numel() != 1:
            return Pass(descended, None, WHY.get(len(used), "several loss functions lead to it"), descended, False)
        seen = used[0]
        # A sum that is divided is divided by a count of the whole step's: the micro-batches' parts add up.
        is_part = seen.summed and _number(root) != seen.number and _is_multiple(root, seen.number)
        return Pass(descended if is_part else seen.value.reshape(()), seen.call, "", descended, is_part)

    def forget_contents(self) -> None:
        """Keep of the calls no more than their values: nothing is learned from them any more."""
        self._calls = deque((seen._replace(call=None) for seen in self._calls), maxlen=MOST)

    def clear(self) -> None:
        """The pass is over."""
        self._calls.clear()
        self._scaled.clear()

    def _used(self, root: Tensor) -> list[Seen]:
        numbers = {seen.number: seen for seen in self._calls}
        found: dict[int, Seen] = {}
        front: list[Any] = [root.grad_fn]
        looked_at = 0
        while front and looked_at < WALK and len(found) < len(numbers):
            node = front.pop()
            if node is None:
                continue
            looked_at += 1
            number = node._sequence_nr()
            if number in numbers:
                found[number] = numbers[number]
            else:
                front.extend(parent for parent, _ in node.next_functions)
        return list(found.values())


def _number(tensor: Tensor) -> int:
    return -1 if tensor.grad_fn is None else tensor.grad_fn._sequence_nr()


def _is_multiple(root: Tensor, number: int) -> bool:
    """Whether `root` is what the graph node with this number gave, but for factors."""
    node: Any = root.grad_fn
    while node is not None and node._sequence_nr() != number:
        if not node.name().startswith(("DivBackward", "MulBackward")):
            return False
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    return node is not None
