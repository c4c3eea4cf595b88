"""The operations whose second derivative torch computes at length, and what stands in for them.

`SHORTER` maps torch functions to ones of the same value and derivatives (the rounding differs):

- a convolution is bilinear, so each of the six terms of its product is one more convolution with its own kernel
  (torch goes through transposed copies), on the CPU with channels last;
- an elementwise activation keeps its first two derivatives, computed once for all products of a graph;
- a rectifier has no second derivative, and none is added up;
- batch norm with running statistics is an affine map, and one with the convolution that it follows;
- the cross-entropy of a last linear layer with many outputs keeps none of them (`vocabulary`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.curvature.kernels import Convolution, Elementwise, Rectified, plain
from diag.curvature.vocabulary import loss as vocabulary


@dataclass(frozen=True)
class Convolved:
    """What an output was convolved from."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: tuple[Any, ...]

    def output(self) -> Tensor:
        """The convolution of x with w, which the products differentiate."""
        output = Convolution.apply(self.input, self.weight, self.settings)
        return output if self.bias is None else output + self.bias.view(_channels(output))

    def normalised(self, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The output less `mean`, times `scale`, plus `bias`: a convolution with another weight and bias."""
        shift = -mean if self.bias is None else self.bias - mean
        shift = shift * scale if bias is None else shift * scale + bias
        weight = self.weight * scale.view(-1, *[1] * (self.weight.ndim - 1))
        return replace(self, weight=weight, bias=shift).output()


def _channels(t: Tensor) -> tuple[int, ...]:
    """The shape in which a vector over the channels meets (n, channels, ...)."""
    return (-1, *[1] * (t.ndim - 2))


def _convolve(native: Callable[..., Tensor], dims: int, transposed: bool) -> Callable[..., Tensor]:
    def convolve(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        *more: Any,
        **named: Any,
    ) -> Tensor:
        if not plain(input, weight) or isinstance(padding, str) or input.ndim != dims + 2:
            return native(input, weight, bias, stride, padding, *more, **named)
        names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        arguments = dict(zip(names, more, strict=False)) | named
        sizes = [stride, padding, arguments.get("dilation", 1), arguments.get("output_padding", 0)]
        stride, padding, dilation, beyond = ([s] * dims if isinstance(s, int) else list(s) for s in sizes)
        if dims == 2 and input.device.type == "cpu":
            input = input.contiguous(memory_format=torch.channels_last)
        settings = (stride, padding, dilation, transposed, beyond, arguments.get("groups", 1))
        made = Convolved(input, weight, bias, settings)
        output = made.output()
        if not transposed:  # a batch norm that follows takes the convolution over, unless somebody writes to it
            output.convolved = made, output._version  # type: ignore[attr-defined]
        return output

    return convolve


def _elementwise(native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(input: Tensor, *args: Any, **named: Any) -> Tensor:
        in_place = named.get("inplace", False) or any(a is True for a in args)
        if in_place or not plain(input):
            return native(input, *args, **named)
        return Elementwise.apply(input, partial(_called, native, args, named))

    return apply


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu(input, inplace) if inplace or not plain(input) else Rectified.apply(input)


def _called(function: Callable[..., Tensor], args: Any, named: Any, x: Tensor) -> Tensor:
    return function(x, *args, **named)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None or not plain(input):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    made, version = getattr(input, "convolved", (None, 0))
    if made is not None and version == input._version:
        return made.normalised(running_mean, scale, bias)
    mean, scale = (v.to(input.dtype).view(_channels(input)) for v in (running_mean, scale))
    output = (input - mean) * scale  # the mean first: it may be many standard deviations
    return output if bias is None else output + bias.to(input.dtype).view(_channels(input))


def _view(self: Tensor, *shape: Any) -> Tensor:
    """A view; a copy where the channels lie last and the caller could not know."""
    try:
        return torch.Tensor.view(self, *shape)
    except RuntimeError:
        if self.is_contiguous():
            raise
        return self.contiguous().view(*shape)


SHORTER: dict[Callable[..., Any], Callable[..., Any]] = {
    **{
        native: _convolve(native, dims, transposed)
        for native, dims, transposed in (
            *((F.conv1d, 1, False), (F.conv2d, 2, False), (F.conv3d, 3, False)),
            *((F.conv_transpose1d, 1, True), (F.conv_transpose2d, 2, True), (F.conv_transpose3d, 3, True)),
        )
    },
    **{f: _elementwise(f) for f in (F.gelu, F.silu, F.mish, F.softplus)},
    **dict.fromkeys((F.relu, torch.relu, torch.Tensor.relu), _relu),
    F.batch_norm: _batch_norm,
    F.linear: vocabulary.linear,
    F.cross_entropy: vocabulary.cross_entropy,
    torch.Tensor.view: _view,
}
