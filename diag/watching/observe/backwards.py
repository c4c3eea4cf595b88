"""What backward() was called on, looked at closely for one step: the calls of loss function and model behind it.

`LossObserver` follows every step and keeps little; here the calls are kept, so that it can be checked what a step
descends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.errors import DiagError
from diag.snapshot.batch import tensors_in
from diag.watching.guard import shielded
from diag.watching.observe.capture import ForwardCall, SeenLossCall

LONGEST = 64


@dataclass(frozen=True)
class SeenBackward:
    """One backward pass from a multiple of one loss function's value: that function's call, and the model's."""

    call: SeenLossCall
    forward: ForwardCall


class Backwards:
    """Follows the calls of a model and of loss functions while `active`."""

    def __init__(self) -> None:
        self.active = False
        self._forward: ForwardCall | None = None
        self._calls: dict[int, SeenLossCall] = {}
        self._pending: SeenLossCall | None = None
        self._reached = False

    def look(self, active: bool) -> None:
        """Follow from now on, or stop and let go of everything."""
        self.active = active
        self._calls.clear()
        self._forward = self._pending = None

    def forward_called(self, args: Any, kwargs: Any, outputs: Any) -> None:
        """The model returned `outputs`."""
        tensor = next((t for t in tensors_in(outputs) if t.requires_grad and not t.is_leaf), None)
        if self.active and tensor is not None and self._forward is None:
            tensor.register_hook(shielded(self._output_reached))  # returns None and so changes nothing
            try:
                self._forward = ForwardCall.of(args, kwargs, outputs)
            except (DiagError, LookupError):
                return

    def loss_called(self, function: Any, args: Any, kwargs: Any, value: Any) -> None:
        """A loss function returned `value`."""
        if self.active and isinstance(value, Tensor) and value.grad_fn is not None and value.numel() == 1:
            self._calls[value.grad_fn._sequence_nr()] = SeenLossCall.of(function, args, kwargs, value)

    def backward_called(self, roots: Any) -> None:
        """A backward pass from `roots` begins."""
        roots = [roots] if isinstance(roots, Tensor) else [r for r in roots or () if isinstance(r, Tensor)]
        self._reached = False
        self._pending = _behind(roots[0], self._calls) if self.active and len(roots) == 1 else None

    @property
    def descending(self) -> SeenLossCall | None:
        """The loss function's call that the backward pass which goes on leads back to."""
        return self._pending

    def backward_done(self) -> SeenBackward | None:
        """It has ended; what was seen of it, if it reached the model."""
        call, self._pending = self._pending, None
        if call is None or self._forward is None or not self._reached:
            return None
        return SeenBackward(call, self._forward)

    def _output_reached(self, gradient: Tensor) -> None:
        self._reached = True


def _behind(root: Tensor, calls: Mapping[int, SeenLossCall]) -> SeenLossCall | None:
    """The call whose value `root` came from by functions of that one number alone: its gradient is a multiple."""
    node: Any = root.grad_fn if root.numel() == 1 else None
    for _ in range(LONGEST):
        if node is None:
            return None
        if node._sequence_nr() in calls:
            return calls[node._sequence_nr()]
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        node = parents[0] if len(parents) == 1 else None
    return None
