"""Second derivatives by the shortest way, for operations whose derivative autograd differentiates at length.

The product with a Hessian differentiates a backward pass. Torch has a general form for that, which for some
operations costs several times what the arithmetic needs. `SHORTER` maps those operations to stand-ins of the same
value and derivatives (the rounding differs):

- a convolution is bilinear, so each of the six terms of its product is one more convolution with its own kernel
  (torch goes through transposed copies), on the CPU with channels last;
- an elementwise activation keeps its first two derivatives, computed once for all products of a graph;
- batch norm with running statistics is an affine map.

Where a third derivative is asked for, the stand-ins go torch's way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_convolution_backward = torch.ops.aten.convolution_backward.default


class Convolution(torch.autograd.Function):
    """y = C(x, w), bilinear; `settings` are stride, padding, dilation, transposed, output padding, groups."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, settings: tuple[Any, ...]) -> Tensor:
        """C(x, w)."""
        return torch.convolution(x, w, None, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, ctx.settings = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """B_x(g, w) and B_w(g, x)."""
        x, w = ctx.saved_tensors
        return *ConvolutionBackward.apply(grads[0], x, w, ctx.settings, ctx.needs_input_grad[:2]), None


class ConvolutionBackward(torch.autograd.Function):
    """B_x(g, w), B_w(g, x), where <B_x(g, w), u> = <g, C(u, w)> and <B_w(g, x), v> = <g, C(x, v)>."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, w: Tensor, settings: tuple[Any, ...], needed: Sequence[bool]) -> Any:
        """The derivatives of <g, C(x, w)> in x and w; None for one that is not needed."""
        return _convolution_backward(g, x, w, None, *settings, [*needed, False])[:2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        g, x, w, ctx.settings, _ = inputs
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The derivatives of <g, C(u, w) + C(x, v)> in g, x and w, with u, v the cotangents."""
        (u, v), (g, x, w), settings = grads, ctx.saved_tensors, ctx.settings
        in_g = in_x = in_w = None
        if u is not None:
            in_g = torch.convolution(u, w, None, *settings)
            in_w = _convolution_backward(g, u, w, None, *settings, [False, True, False])[1]
        if v is not None:
            other = torch.convolution(x, v, None, *settings)
            in_g = other if in_g is None else in_g + other
            if ctx.needs_input_grad[1]:
                in_x = _convolution_backward(g, x, v, None, *settings, [True, False, False])[0]
        return in_g, in_x, in_w, None, None


class Elementwise(torch.autograd.Function):
    """y = f(x) for a smooth function of each entry."""

    @staticmethod
    def forward(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """f(x)."""
        return f(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.f = inputs
        ctx.first = None  # f'(x), once the backward pass has been differentiated
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """g f'(x)."""
        (x,), (g,) = ctx.saved_tensors, grads
        if torch.is_grad_enabled():  # this derivative will itself be differentiated
            ctx.first, second = _two_derivatives(ctx.f, x)
            return ElementwiseBackward.apply(g, x, ctx.first, second, ctx.f), None
        return (_derivative(ctx.f, x.detach().requires_grad_(), g) if ctx.first is None else g * ctx.first), None


class ElementwiseBackward(torch.autograd.Function):
    """g f'(x), with f'(x) and f''(x) given."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, first: Tensor, second: Tensor, f: Callable[..., Tensor]) -> Tensor:
        """g f'(x)."""
        ctx.f = f
        ctx.save_for_backward(g, x, first, g * second)
        return g * first

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The derivatives of <u, g f'(x)> in g and x, with u the cotangent."""
        (u,), (g, x, first, curved) = grads, ctx.saved_tensors
        if not torch.is_grad_enabled():
            return u * first, u * curved, None, None, None
        slope = _derivative(ctx.f, x, g, create_graph=True)
        asked = [t for t in (g, x) if t.requires_grad]
        found = dict(zip(map(id, asked), torch.autograd.grad(slope, asked, u, create_graph=True), strict=True))
        return found.get(id(g)), found.get(id(x)), None, None, None


def _derivative(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, create_graph: bool = False) -> Tensor:
    with torch.enable_grad():
        return torch.autograd.grad(f(x), x, g, create_graph=create_graph)[0]


def _two_derivatives(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    at = x.detach().requires_grad_()
    first = _derivative(f, at, torch.ones_like(at), create_graph=True)
    (second,) = torch.autograd.grad(first, at, torch.ones_like(at))
    return first.detach(), second


# -- the operations under their public names -------------------------------------------------------


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
        if not _plain(input, weight) or isinstance(padding, str) or input.ndim != dims + 2:
            return native(input, weight, bias, stride, padding, *more, **named)
        names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        given = dict(zip(names, more, strict=False)) | named
        sizes = [stride, padding, given.get("dilation", 1), given.get("output_padding", 0)]
        stride, padding, dilation, beyond = ([s] * dims if isinstance(s, int) else list(s) for s in sizes)
        input, weight = _autocast(input, weight)
        if dims == 2 and input.device.type == "cpu":
            input = input.contiguous(memory_format=torch.channels_last)
        settings = (stride, padding, dilation, transposed, beyond, given.get("groups", 1))
        output = Convolution.apply(input, weight, settings)
        return output if bias is None else output + bias.to(output.dtype).view(-1, *[1] * dims)

    return convolve


def _elementwise(native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(input: Tensor, *args: Any, **named: Any) -> Tensor:
        if not _plain(input) or named.get("inplace", False) or True in args:
            return native(input, *args, **named)
        return Elementwise.apply(input, partial(_called, native, args, named))

    return apply


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
    if training or running_mean is None or running_var is None or not _plain(input):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    shape = (-1, *[1] * (input.ndim - 2))
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    # The mean is taken out first: it may be many standard deviations.
    output = (input - running_mean.to(input.dtype).view(shape)) * scale.to(input.dtype).view(shape)
    return output if bias is None else output + bias.to(input.dtype).view(shape)


def _view(self: Tensor, *shape: Any) -> Tensor:
    """A view; a copy where the channels lie last and the caller could not know."""
    try:
        return torch.Tensor.view(self, *shape)
    except RuntimeError:
        if self.is_contiguous():
            raise
        return self.contiguous().view(*shape)


def _plain(*tensors: Tensor) -> bool:
    """Whether the tensors are ordinary strided ones, and no transform of torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is None and all(
        isinstance(t, Tensor) and type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided
        for t in tensors
    )


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that autocast, where it is in force, would give a convolution."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(device)) for t in tensors]


SHORTER: dict[Callable[..., Any], Callable[..., Any]] = {
    **{
        native: _convolve(native, dims, transposed)
        for native, dims, transposed in (
            *((F.conv1d, 1, False), (F.conv2d, 2, False), (F.conv3d, 3, False)),
            *((F.conv_transpose1d, 1, True), (F.conv_transpose2d, 2, True), (F.conv_transpose3d, 3, True)),
        )
    },
    **{f: _elementwise(f) for f in (F.gelu, F.silu, F.mish, F.softplus)},
    F.batch_norm: _batch_norm,
    torch.Tensor.view: _view,
}
