"""From a recorded call and the gradient of its output to per-example gradients of its parameters.

Each entry of `FORMS` is one operation's rule. A rule that does not apply raises `NoClosedForm`, and
`diag.gradients.rules.fallback` takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diag.gradients.rules.blocks import Block, Dense, Outer
from diag.gradients.rules.call import Call, Form, NoClosedForm, call_with, is_argument
from diag.gradients.rules.combination import TableRows
from diag.gradients.rules.convolution import convolution
from diag.gradients.rules.norm_forms import NORM_FORMS
from diag.gradients.sources import ArgumentPlace


def _linear(call: Call, place: ArgumentPlace) -> Block:
    delta = call.steps(call.delta)
    if is_argument(place, 2, "bias"):
        return Dense(delta.sum(1))
    if not is_argument(place, 1, "weight"):
        raise NoClosedForm
    return _outer(call.steps(call.get(0, "input")), delta, call.use.slots[place].shape)


def _outer(a: Tensor, b: Tensor, shape: Sequence[int]) -> Outer:
    return Outer(a[:, None], b[:, None], shape)


def _matmul(call: Call, place: ArgumentPlace) -> Block:
    shape = call.use.slots[place].shape
    if place not in ((1,), ("other",), ("mat2",)):
        raise NoClosedForm
    x = call.get(0, "input")
    if len(shape) == 1:
        return Dense((call.steps(call.delta[..., None]) * call.steps(x)).sum(1))
    if len(shape) != 2:
        raise NoClosedForm
    return _outer(call.steps(call.delta), call.steps(x), shape)


def _addmm(call: Call, place: ArgumentPlace) -> Block:
    if call.get(3, "beta", 1) != 1 or call.get(4, "alpha", 1) != 1:
        raise NoClosedForm
    if is_argument(place, 0, "input"):
        return call.reduced(call.delta, call.use.slots[place].shape)
    if not is_argument(place, 2, "mat2"):
        raise NoClosedForm
    return _outer(call.steps(call.delta), call.steps(call.get(1, "mat1")), call.use.slots[place].shape)


def _embedding(call: Call, place: ArgumentPlace) -> Block:
    if not is_argument(place, 0, "weight"):
        raise NoClosedForm
    index, padding = call.get(1, "indices"), call.get(2, "padding_idx", -1)
    if call.layout.axis >= call.delta.ndim - 1:
        raise NoClosedForm
    index = call.layout.split(index, call.n).reshape(call.n, -1)
    delta = call.steps(call.delta)
    if padding >= 0:
        delta = delta * (index != padding)[..., None]
    return TableRows(index, delta, call.use.slots[place].shape[0])


def _convolution(call: Call, place: ArgumentPlace, transposed: bool = False) -> Block:
    """In the transpose of a convolution, input and output gradient change roles."""
    if is_argument(place, 2, "bias"):
        return Dense(call.channels(call.delta).sum(2))
    if not is_argument(place, 1, "weight"):
        raise NoClosedForm
    shape = call.use.slots[place].shape
    stride = _per_axis(call.get(3, "stride", 1), shape)
    padding = call.get(4, "padding", 0)
    padding = padding if isinstance(padding, str) else _per_axis(padding, shape)
    dilation = _per_axis(call.get(7 if transposed else 5, "dilation", 1), shape)
    x, b = call.get(0, "input"), call.delta
    x, b = (b, x) if transposed else (x, b)
    return convolution(x, b, shape, stride, padding, dilation, call.get(6, "groups", 1))


def _per_axis(value: Any, shape: torch.Size) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * (len(shape) - 2) if len(values) == 1 else values


def _prelu(call: Call, place: ArgumentPlace) -> Block:
    x = call.get(0, "input")
    if not is_argument(place, 1, "weight"):
        raise NoClosedForm
    per_channel = call.channels(call.delta * x.clamp(max=0)).sum(2)
    return Dense(per_channel if call.use.slots[place].shape.numel() > 1 else per_channel.sum(1, keepdim=True))


def _expanded(call: Call, place: ArgumentPlace) -> Block:
    shape = call.use.slots[place].shape
    lead = call.delta.ndim - len(shape)
    if any(size not in (1, call.delta.shape[lead + i]) for i, size in enumerate(shape)):
        raise NoClosedForm  # a repeat of more than single elements
    return call.reduced(call.delta, shape)


def _shifted(call: Call, place: ArgumentPlace) -> Block:
    if call.get(2, "alpha", 1) != 1:
        raise NoClosedForm
    return call.reduced(call.delta, call.use.slots[place].shape)


def _scaled(call: Call, place: ArgumentPlace) -> Block:
    other = call.get(1, "other") if place == (0,) else call.get(0, "input")
    return call.reduced(call.delta * other, call.use.slots[place].shape)


def _elementwise(call: Call, place: ArgumentPlace) -> Block:
    """Any broadcasting operation: pull the gradient back to the parameter as it was broadcast, then sum."""
    use, value = call.use, call.at(place)
    if value.ndim > len(use.shape):
        raise NoClosedForm
    others = {other: call.at(other) for other in use.versions if other != place}
    _, pull = torch.func.vjp(lambda w: call_with(use, {**others, place: w}), value.expand(use.shape))[:2]
    return call.reduced(pull(call.delta)[0], value.shape)


FORMS: dict[str, Form] = {
    **NORM_FORMS,
    "linear": _linear,
    "addmm": _addmm,
    "embedding": _embedding,
    "prelu": _prelu,
    **dict.fromkeys(("matmul", "mm", "__matmul__"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), partial(_convolution, transposed=True)
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat"), _expanded),
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), _shifted),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _scaled),
    **dict.fromkeys(("sub", "rsub", "__sub__", "__rsub__", "div", "true_divide"), _elementwise),
    **dict.fromkeys(("__truediv__", "__rtruediv__", "pow", "__rpow__"), _elementwise),
    **dict.fromkeys(("where", "lerp", "addcmul", "addcdiv", "maximum", "minimum"), _elementwise),
}
