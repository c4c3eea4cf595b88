"""A recorded call as the closed forms see it: its arguments, and the gradient of the loss at its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.gradients.capture import Use
from diag.gradients.rules.blocks import Block, Dense
from diag.gradients.rules.layout import ExampleLayout
from diag.gradients.sources import ArgumentPlace

NORM_NODES = ("NativeLayerNormBackward0", "NativeGroupNormBackward0")


class NoClosedForm(Exception):
    """The rule does not cover this call; another method must."""


@dataclass(frozen=True)
class Call:
    """A recorded call, the gradient `delta` of the summed loss at its output, and where its examples lie."""

    use: Use
    delta: Tensor
    layout: ExampleLayout
    n: int

    def get(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword, as it was when the call was made."""
        if name in self.use.kwargs:
            return self.at((name,))
        return self.at((index,)) if index < len(self.use.args) else default

    def at(self, place: ArgumentPlace) -> Any:
        """The argument at this place without its graph. Raises NoClosedForm where it has been overwritten since."""
        value = self.use.argument(place)
        if isinstance(value, Tensor) and self.use.overwritten(place):
            raise NoClosedForm(f"an argument of {self.use.name} was overwritten in place")
        return single(value.detach()) if isinstance(value, Tensor) else value

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and 1 / standard deviation, where the graph node of a norm kept them and still has them."""
        if not (self.use.readable and self.use.edge.node.name() in NORM_NODES):
            return None
        try:
            mean, scale = self.use.edge.node._saved_result1, self.use.edge.node._saved_result2  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError):  # the backward pass is over
            return None
        return mean.detach().to(self.delta.dtype), scale.detach().to(self.delta.dtype)

    def steps(self, values: Tensor) -> Tensor:
        """(n, T, features): everything but the last axis folded into steps."""
        if self.layout == ExampleLayout(0) and values.ndim > 1:
            return values.reshape(self.n, -1, values.shape[-1])
        if self.layout.axis >= values.ndim - 1:
            raise NoClosedForm("the examples lie along the feature axis")
        return self.layout.split(values, self.n).reshape(self.n, -1, values.shape[-1])

    def channels(self, values: Tensor) -> Tensor:
        """(n, C, positions) of a tensor with examples first and channels second."""
        if self.layout.axis != 0 or values.shape[0] != self.n:
            raise NoClosedForm("the examples do not lie along the first axis")
        return values.flatten(2) if values.ndim > 2 else values[..., None]

    def reduced(self, gradient: Tensor, shape: torch.Size) -> Dense:
        """Sum a gradient of the output's shape over what a parameter of `shape` was broadcast along."""
        lead = gradient.ndim - len(shape)
        axis = self.layout.axis
        if axis >= lead and shape[axis - lead] != 1:
            raise NoClosedForm("the parameter has an axis along the examples")
        split = self.layout.split(gradient, self.n)
        return Dense(split.sum_to_size(self.n, *[1] * lead, *shape).reshape(self.n, *shape))


def single(values: Tensor) -> Tensor:
    """Half-precision numbers in float32, in which products of them do not underflow."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


Form = Callable[[Call, ArgumentPlace], Block]


def is_argument(place: ArgumentPlace, index: int, name: str) -> bool:
    """Whether a place is this argument, given by position or by name."""
    return place in ((index,), (name,))


def call_with(use: Use, tensors: dict[ArgumentPlace, Tensor]) -> Tensor:
    """The recorded call made again, with other tensors in some of its places."""
    args: list[Any] = [list(a) if isinstance(a, (tuple, list)) else a for a in use.args]
    kwargs = dict(use.kwargs)
    for place, tensor in tensors.items():
        holder: Any = kwargs if isinstance(place[0], str) else args
        if len(place) == 2:
            holder[place[0]][place[1]] = tensor
        else:
            holder[place[0]] = tensor
    return use.func(*args, **kwargs)
