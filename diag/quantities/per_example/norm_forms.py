"""Per-example gradients of the scales and shifts of normalisation layers.

A scale's gradient is the sum, over the positions that share it, of output gradient times normalised input. The
kernels of the ordinary backward pass do that reading both once; they are used where their sum can be kept
from running over examples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.quantities.per_example.blocks import SCRATCH, Block, Dense
from diag.quantities.per_example.call import Call, Form, NoClosedForm, is_argument
from diag.quantities.per_example.layout import Layout
from diag.quantities.per_example.sources import Place

SMALL_NORM = 65_536  # numbers of one example in a norm's input, below which a call for each example does not pay


def _over_features(of_weight: Callable[[Call, torch.Size], Dense], weight: int, bias: int | None) -> Form:
    """Norms whose weight has the shape of the trailing axes (LayerNorm, RMSNorm)."""

    def form(call: Call, place: Place) -> Block:
        shape = call.use.slots[place].shape
        if bias is not None and is_argument(place, bias, "bias"):
            return call.reduced(call.delta, shape)
        if not is_argument(place, weight, "weight"):
            raise NoClosedForm
        return of_weight(call, shape)

    return form


def _over_channels(of_weight: Callable[[Call], Dense], weight: int, bias: int) -> Form:
    """Norms whose weight has one element per channel, the second axis (GroupNorm, BatchNorm, InstanceNorm)."""

    def form(call: Call, place: Place) -> Block:
        if is_argument(place, bias, "bias"):
            return Dense(call.channels(call.delta).sum(2))
        if not is_argument(place, weight, "weight"):
            raise NoClosedForm
        return of_weight(call)

    return form


def _layer_norm_weight(call: Call, shape: torch.Size) -> Dense:
    x, delta, eps = call.get(0, "input"), call.delta, call.get(4, "eps", 1e-5)
    if call.layout != Layout(0) or delta.numel() < SMALL_NORM * call.n:
        return call.reduced(F.layer_norm(x, shape, eps=eps).mul_(delta), shape)
    ones, mask, size = x.new_ones(shape), [False, True, False], list(shape)

    def alone(x: Tensor, delta: Tensor) -> Tensor:
        _, mean, scale = torch.native_layer_norm(x, size, None, None, eps)
        return torch.ops.aten.native_layer_norm_backward(delta, x, size, mean, scale, ones, None, mask)[1]

    pairs = zip(*(v.unflatten(0, (call.n, -1)) for v in (x, delta)), strict=True)
    return Dense(torch.stack([alone(*pair) for pair in pairs]))


def _rms_norm_weight(call: Call, shape: torch.Size) -> Dense:
    normalised = F.rms_norm(call.get(0, "input"), call.get(1, "normalized_shape"), eps=call.get(3, "eps"))
    return call.reduced(normalised.mul_(call.delta), shape)


def _group_norm_weight(call: Call) -> Dense:
    """The ordinary kernel's gradient, told that all examples' channels are those of one example."""
    x, groups, eps = call.get(0, "input").contiguous(), call.get(1, "num_groups"), call.get(4, "eps", 1e-5)
    delta = call.channels(call.delta).contiguous()
    channels, positions = delta.shape[1:]

    def few(x: Tensor, delta: Tensor) -> Tensor:
        n = len(x)
        _, mean, scale = torch.native_group_norm(x, None, None, n, channels, positions, groups, eps)
        return torch.ops.aten.native_group_norm_backward(
            delta, x, mean.view(1, -1), scale.view(1, -1), x.new_ones(n * channels), 1, n * channels, positions,
            n * groups, [False, True, False],
        )[1].view(n, channels)  # fmt: skip

    step = max(1, SCRATCH // (4 * channels * positions))
    return Dense(torch.cat([few(*parts) for parts in zip(x.split(step), delta.split(step), strict=True)]))


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
