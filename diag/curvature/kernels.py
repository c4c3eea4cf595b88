"""Derivatives of derivatives by the shortest way: autograd functions that stand in for torch's own.

The product with a Hessian differentiates a backward pass. Torch has a general form for that, which for some
operations costs several times what the arithmetic needs. These have the same value and derivatives, up to rounding,
and where a third derivative is asked for, they go torch's way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_convolution_backward = torch.ops.aten.convolution_backward.default


class Convolution(torch.autograd.Function):
    """y = C(x, w), bilinear; `settings` are stride, padding, dilation, transposed, output padding, groups."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, settings: tuple[Any, ...]) -> Tensor:
        """The convolution C(x, w)."""
        return torch.convolution(x, w, None, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the derivatives need."""
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
        """Keep what the derivatives need."""
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
        """The function f(x), entry by entry."""
        return f(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the derivatives need."""
        x, ctx.f = inputs
        ctx.first = None  # f'(x), once the backward pass has been differentiated
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Its derivative, g f'(x)."""
        (x,), (g,) = ctx.saved_tensors, grads
        if torch.is_grad_enabled():  # this derivative will itself be differentiated
            ctx.first, second = _two_derivatives(ctx.f, x)
            return ElementwiseBackward.apply(g, x, ctx.first, second, ctx.f), None
        return (_derivative(ctx.f, x.detach().requires_grad_(), g) if ctx.first is None else g * ctx.first), None


class ElementwiseBackward(torch.autograd.Function):
    """g f'(x), with f'(x) and f''(x) given."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, first: Tensor, second: Tensor, f: Callable[..., Tensor]) -> Tensor:
        """Its derivative, g f'(x)."""
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


class Rectified(torch.autograd.Function):
    """y = max(x, 0), whose slope is taken as constant everywhere, as torch does."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """The rectifier max(x, 0)."""
        return x.relu()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the derivatives need."""
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """g where y > 0."""
        return RectifiedBackward.apply(grads[0], ctx.saved_tensors[0])


class RectifiedBackward(torch.autograd.Function):
    """g where y > 0; linear in g, and with no derivative in y (torch would add zeros there)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor) -> Tensor:
        """g where y > 0."""
        ctx.save_for_backward(y)
        return torch.ops.aten.threshold_backward(g, y, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The same mask on the cotangent."""
        return RectifiedBackward.apply(grads[0], ctx.saved_tensors[0]), None


def _derivative(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, create_graph: bool = False) -> Tensor:
    with torch.enable_grad():
        return torch.autograd.grad(f(x), x, g, create_graph=create_graph)[0]


def _two_derivatives(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    at = x.detach().requires_grad_()
    first = _derivative(f, at, torch.ones_like(at), create_graph=True)
    (second,) = torch.autograd.grad(first, at, torch.ones_like(at))
    return first.detach(), second


def plain(*tensors: Tensor) -> bool:
    """Whether the tensors are ordinary strided ones, and no transform of torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is None and all(
        isinstance(t, Tensor) and type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided
        for t in tensors
    )
