"""From a recorded call and the gradient of its output to per-example gradients of its parameters.

Each entry of `FORMS` is one operation's rule. A rule that does not apply raises `NoClosedForm`, and
`diag.quantities.per_example.fallback` takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.quantities.per_example.blocks import Block, Dense, Outer
from diag.quantities.per_example.capture import Place, Use
from diag.quantities.per_example.combination import Rows
from diag.quantities.per_example.convolution import Patches, pad_input
from diag.quantities.per_example.layout import Layout


class NoClosedForm(Exception):
    """The rule does not cover this call; another method must."""


@dataclass(frozen=True)
class Call:
    """A recorded call, the gradient `delta` of the summed loss at its output, and where its examples lie."""

    use: Use
    delta: Tensor
    layout: Layout
    n: int

    def get(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword, as it was when the call was made."""
        if name in self.use.kwargs:
            return self.at((name,))
        return self.at((index,)) if index < len(self.use.args) else default

    def at(self, place: Place) -> Any:
        value = self.use.argument(place)
        if isinstance(value, Tensor) and self.use.overwritten(place):
            raise NoClosedForm(f"an argument of {self.use.name} was overwritten in place")
        return single(value.detach()) if isinstance(value, Tensor) else value

    def steps(self, values: Tensor) -> Tensor:
        """(n, T, features): everything but the last axis folded into steps."""
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


Form = Callable[[Call, Place], Block]


def _is(place: Place, index: int, name: str) -> bool:
    return place in ((index,), (name,))


def _linear(call: Call, place: Place) -> Block:
    delta = call.steps(call.delta)
    if _is(place, 2, "bias"):
        return Dense(delta.sum(1))
    if not _is(place, 1, "weight"):
        raise NoClosedForm
    return _outer(call.steps(call.get(0, "input")), delta, call.use.slots[place].shape)


def _outer(a: Tensor, b: Tensor, shape: Sequence[int]) -> Outer:
    return Outer(a[:, None], b[:, None], shape)


def _matmul(call: Call, place: Place) -> Block:
    shape = call.use.slots[place].shape
    if place not in ((1,), ("other",), ("mat2",)):
        raise NoClosedForm
    x = call.get(0, "input")
    if len(shape) == 1:
        return Dense((call.steps(call.delta[..., None]) * call.steps(x)).sum(1))
    if len(shape) != 2:
        raise NoClosedForm
    return _outer(call.steps(call.delta), call.steps(x), shape)


def _addmm(call: Call, place: Place) -> Block:
    if call.get(3, "beta", 1) != 1 or call.get(4, "alpha", 1) != 1:
        raise NoClosedForm
    if _is(place, 0, "input"):
        return call.reduced(call.delta, call.use.slots[place].shape)
    if not _is(place, 2, "mat2"):
        raise NoClosedForm
    return _outer(call.steps(call.delta), call.steps(call.get(1, "mat1")), call.use.slots[place].shape)


def _embedding(call: Call, place: Place) -> Block:
    if not _is(place, 0, "weight"):
        raise NoClosedForm
    index, padding = call.get(1, "indices"), call.get(2, "padding_idx", -1)
    if call.layout.axis >= call.delta.ndim - 1:
        raise NoClosedForm
    index = call.layout.split(index, call.n).reshape(call.n, -1)
    delta = call.steps(call.delta)
    if padding >= 0:
        delta = delta * (index != padding)[..., None]
    return Rows(index, delta, call.use.slots[place].shape[0])


def _convolution(call: Call, place: Place) -> Block:
    delta = call.channels(call.delta)
    if _is(place, 2, "bias"):
        return Dense(delta.sum(2))
    if not _is(place, 1, "weight"):
        raise NoClosedForm
    shape = call.use.slots[place].shape
    stride, dilation = _per_axis(call.get(3, "stride", 1), shape), _per_axis(call.get(5, "dilation", 1), shape)
    padding = call.get(4, "padding", 0)
    padding = padding if isinstance(padding, str) else _per_axis(padding, shape)
    x = pad_input(call.get(0, "input"), padding, shape[2:], dilation)
    return Patches(x, call.delta, shape, stride, dilation, call.get(6, "groups", 1))


def _transposed_convolution(call: Call, place: Place) -> Block:
    """The transpose of a convolution: input and output gradient change roles."""
    delta = call.channels(call.delta)
    if _is(place, 2, "bias"):
        return Dense(delta.sum(2))
    if not _is(place, 1, "weight"):
        raise NoClosedForm
    shape = call.use.slots[place].shape
    stride, dilation = _per_axis(call.get(3, "stride", 1), shape), _per_axis(call.get(7, "dilation", 1), shape)
    padding = _per_axis(call.get(4, "padding", 0), shape)
    groups = call.get(6, "groups", 1)
    padded = pad_input(call.delta, padding, shape[2:], dilation)
    return Patches(padded, call.get(0, "input"), shape, stride, dilation, groups)


def _per_axis(value: Any, shape: torch.Size) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * (len(shape) - 2) if len(values) == 1 else values


def _over_features(normalise: Callable[[Call], Tensor], weight: int, bias: int | None) -> Form:
    """Norms whose weight has the shape of the trailing axes (LayerNorm, RMSNorm)."""

    def form(call: Call, place: Place) -> Block:
        shape = call.use.slots[place].shape
        if bias is not None and _is(place, bias, "bias"):
            return call.reduced(call.delta, shape)
        if not _is(place, weight, "weight"):
            raise NoClosedForm
        return call.reduced(call.delta * normalise(call), shape)

    return form


def _over_channels(normalise: Callable[[Call], Tensor], weight: int, bias: int) -> Form:
    """Norms whose weight has one element per channel, the second axis (GroupNorm, BatchNorm, InstanceNorm)."""

    def form(call: Call, place: Place) -> Block:
        if _is(place, bias, "bias"):
            return Dense(call.channels(call.delta).sum(2))
        if not _is(place, weight, "weight"):
            raise NoClosedForm
        return Dense(call.channels(call.delta * normalise(call)).sum(2))

    return form


def _layer_normalised(call: Call) -> Tensor:
    return F.layer_norm(call.get(0, "input"), call.get(1, "normalized_shape"), eps=call.get(4, "eps", 1e-5))


def _rms_normalised(call: Call) -> Tensor:
    return F.rms_norm(call.get(0, "input"), call.get(1, "normalized_shape"), eps=call.get(3, "eps"))


def _group_normalised(call: Call) -> Tensor:
    return F.group_norm(call.get(0, "input"), call.get(1, "num_groups"), eps=call.get(4, "eps", 1e-5))


def _batch_normalised(call: Call) -> Tensor:
    if call.get(5, "training"):
        raise NoClosedForm
    mean, variance = call.get(3, "running_mean"), call.get(4, "running_var")
    return F.batch_norm(call.get(0, "input"), mean, variance, eps=call.get(7, "eps"))


def _instance_normalised(call: Call) -> Tensor:
    if not call.get(5, "use_input_stats"):
        mean, variance = call.get(3, "running_mean"), call.get(4, "running_var")
        return F.batch_norm(call.get(0, "input"), mean, variance, eps=call.get(7, "eps"))
    return F.instance_norm(call.get(0, "input"), eps=call.get(7, "eps"))


def _prelu(call: Call, place: Place) -> Block:
    x = call.get(0, "input")
    if not _is(place, 1, "weight"):
        raise NoClosedForm
    per_channel = call.channels(call.delta * x.clamp(max=0)).sum(2)
    return Dense(per_channel if call.use.slots[place].shape.numel() > 1 else per_channel.sum(1, keepdim=True))


def _expanded(call: Call, place: Place) -> Block:
    shape = call.use.slots[place].shape
    lead = call.delta.ndim - len(shape)
    if any(size not in (1, call.delta.shape[lead + i]) for i, size in enumerate(shape)):
        raise NoClosedForm  # a repeat of more than single elements
    return call.reduced(call.delta, shape)


def _shifted(call: Call, place: Place) -> Block:
    if call.get(2, "alpha", 1) != 1:
        raise NoClosedForm
    return call.reduced(call.delta, call.use.slots[place].shape)


def _scaled(call: Call, place: Place) -> Block:
    other = call.get(1, "other") if place == (0,) else call.get(0, "input")
    return call.reduced(call.delta * other, call.use.slots[place].shape)


def _elementwise(call: Call, place: Place) -> Block:
    """Any broadcasting operation: pull the gradient back to the parameter as it was broadcast, then sum."""
    use, value = call.use, call.at(place)
    if value.ndim > len(use.shape):
        raise NoClosedForm
    others = {other: call.at(other) for other in use.versions if other != place}
    _, pull = torch.func.vjp(lambda w: call_with(use, {**others, place: w}), value.expand(use.shape))[:2]
    return call.reduced(pull(call.delta)[0], value.shape)


def call_with(use: Use, tensors: dict[Place, Tensor]) -> Tensor:
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


FORMS: dict[str, Form] = {
    "linear": _linear,
    "addmm": _addmm,
    "embedding": _embedding,
    "prelu": _prelu,
    "layer_norm": _over_features(_layer_normalised, 2, 3),
    "rms_norm": _over_features(_rms_normalised, 2, None),
    "group_norm": _over_channels(_group_normalised, 2, 3),
    "batch_norm": _over_channels(_batch_normalised, 1, 2),
    "instance_norm": _over_channels(_instance_normalised, 1, 2),
    **dict.fromkeys(("matmul", "mm", "__matmul__"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat"), _expanded),
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), _shifted),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _scaled),
    **dict.fromkeys(("sub", "rsub", "__sub__", "__rsub__", "div", "true_divide"), _elementwise),
    **dict.fromkeys(("__truediv__", "__rtruediv__", "pow", "__rpow__"), _elementwise),
    **dict.fromkeys(("where", "lerp", "addcmul", "addcdiv", "maximum", "minimum"), _elementwise),
}
