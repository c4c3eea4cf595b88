"""Per-example gradients of the scales and shifts of normalisation layers.

A scale's gradient is the sum, over the positions that share it, of output gradient times normalised input. The
kernels of the ordinary backward pass do that reading both once; they are used where their sum can be kept
from running over examples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from diag.gradients.rules.blocks import Block, Dense
from diag.gradients.rules.call import Call, Form, NoClosedForm, is_argument
from diag.gradients.rules.layout import ExampleLayout
from diag.gradients.sources import ArgumentPlace

SMALL_NORM = 65_536  # numbers of one example in a norm's input, below which a call for each example does not pay


def _over_features(of_weight: Callable[[Call, torch.Size], Dense], weight: int, bias: int | None) -> Form:
    """Norms whose weight has the shape of the trailing axes (LayerNorm, RMSNorm)."""

    def form(call: Call, place: ArgumentPlace) -> Block:
        shape = call.use.slots[place].shape
        if bias is not None and is_argument(place, bias, "bias"):
            return call.reduced(call.delta, shape)
        if not is_argument(place, weight, "weight"):
            raise NoClosedForm
        return of_weight(call, shape)

    return form


def _over_channels(of_weight: Callable[[Call], Dense], weight: int, bias: int) -> Form:
    """Norms whose weight has one element per channel, the second axis (GroupNorm, BatchNorm, InstanceNorm)."""

    def form(call: Call, place: ArgumentPlace) -> Block:
        if is_argument(place, bias, "bias"):
            return Dense(call.channels(call.delta).sum(2))
        if not is_argument(place, weight, "weight"):
            raise NoClosedForm
        return of_weight(call)

    return form


def _layer_norm_weight(call: Call, shape: torch.Size) -> Dense:
    x, delta, eps = call.get(0, "input"), call.delta, call.get(4, "eps", 1e-5)
    mean, scale = call.statistics() or torch.native_layer_norm(x, list(shape), None, None, eps)[1:]
    if call.layout != ExampleLayout(0) or delta.numel() < SMALL_NORM * call.n:
        return call.reduced((x - mean).mul_(scale).mul_(delta), shape)
    # One kernel that reads its inputs once: worth a call for each example where they are long.
    ones, size = x.new_ones(shape), list(shape)
    each = zip(*(v.unflatten(0, (call.n, -1)) for v in (delta, x, mean, scale)), strict=True)
    backward, mask = torch.ops.aten.native_layer_norm_backward, [False, True, False]
    return Dense(torch.stack([backward(d, v, size, m, s, ones, None, mask)[1] for d, v, m, s in each]))


def _rms_norm_weight(call: Call, shape: torch.Size) -> Dense:
    normalised = F.rms_norm(call.get(0, "input"), call.get(1, "normalized_shape"), eps=call.get(3, "eps"))
    return call.reduced(normalised.mul_(call.delta), shape)


def _group_norm_weight(call: Call) -> Dense:
    """The ordinary kernel's gradient, told that all examples' channels are those of one example."""
    x, groups, eps = call.get(0, "input").contiguous(), call.get(1, "num_groups"), call.get(4, "eps", 1e-5)
    delta = call.channels(call.delta).contiguous()
    channels, positions = delta.shape[1:]

    mean, scale = (
        call.statistics() or torch.native_group_norm(x, None, None, call.n, channels, positions, groups, eps)[1:]
    )
    return Dense(torch.ops.aten.native_group_norm_backward(
        delta, x, mean.view(1, -1), scale.view(1, -1), x.new_ones(call.n * channels), 1, call.n * channels,
        positions, call.n * groups, [False, True, False],
    )[1].view(call.n, channels))  # fmt: skip


def _batch_norm_weight(call: Call) -> Dense:
    if call.get(5, "training"):
        raise NoClosedForm
    return _from_running_statistics(call)


def _instance_norm_weight(call: Call) -> Dense:
    if not call.get(5, "use_input_stats"):
        return _from_running_statistics(call)
    return Dense(
        call.channels(F.instance_norm(call.get(0, "input"), eps=call.get(7, "eps")).mul_(call.delta)).sum(2)
    )


def _from_running_statistics(call: Call) -> Dense:
    mean, variance = call.get(3, "running_mean"), call.get(4, "running_var")
    normalised = F.batch_norm(call.get(0, "input"), mean, variance, eps=call.get(7, "eps"))
    return Dense(call.channels(normalised.mul_(call.delta)).sum(2))


NORM_FORMS: dict[str, Form] = {
    "layer_norm": _over_features(_layer_norm_weight, 2, 3),
    "rms_norm": _over_features(_rms_norm_weight, 2, None),
    "group_norm": _over_channels(_group_norm_weight, 2, 3),
    "batch_norm": _over_channels(_batch_norm_weight, 1, 2),
    "instance_norm": _over_channels(_instance_norm_weight, 1, 2),
}
