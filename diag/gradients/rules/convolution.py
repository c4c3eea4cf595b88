"""Per-example gradients of convolutions: outer products of a patch of the input and an output gradient.

No patches are cut out where it can be helped, since they take as many times the input's memory as the kernel has
elements. The gradients of a few examples are the weight gradient of one convolution in which every example is a
group of its own; sums and projections are convolutions too; and the inner products of two patches are
sums of inner products of pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.gradients.rules.blocks import SCRATCH, Block, Outer
from diag.gradients.rules.float64_sums import squared, sums, sums_of_squares

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ADDITION = 16  # multiplications in a matrix product that take as long as one addition of T x T products


class Patches(Outer):
    """The weight's gradients for `F.conv{1,2,3}d(x, weight, ...)`: G_i = sum_t b_it patch_t(x_i)'.

    x (n, C, *spatial); b (n, C_out, *out); shape (C_out, C / groups, *kernel); zeros are padded on both sides.
    """

    def __init__(
        self,
        x: Tensor,
        b: Tensor,
        shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.x, self.b, self.shape = x, b, tuple(shape)
        self.stride, self.padding, self.dilation, self.groups = tuple(stride), padding, tuple(dilation), groups
        self.n, self.q = x.shape[0], shape[0] // groups
        self.device, self.dtype = b.device, b.dtype
        self.steps, self.p = math.prod(b.shape[2:]), math.prod(shape[1:])

    # ---- patches -------------------------------------------------------------------------------

    def factors(self, examples: slice | Tensor) -> tuple[Tensor, Tensor]:
        x, b = self.x[examples], self.b[examples]
        patches = self._unfold(x).transpose(-1, -2)
        return patches, b.reshape(b.shape[0], self.groups, self.q, self.steps).transpose(-1, -2)

    def _unfold(self, x: Tensor) -> Tensor:
        """(n, g, C/g * kernel, out positions)."""
        # One strided copy per kernel element; F.unfold is three to five times slower on the CPU.
        make = x.new_zeros if any(self.padding) else x.new_empty
        patches = make(*x.shape[:2], math.prod(self.shape[2:]), *self.b.shape[2:])
        for k, (inside, where) in enumerate(self._windows()):
            patches[:, :, k][(..., *inside)] = x[(..., *where)]
        return patches.view(x.shape[0], self.groups, self.p, self.steps)

    def _windows(self) -> Iterator[tuple[Any, Any]]:
        """For each kernel element: the outputs at which it meets the input, and the pixels that it meets there."""
        axes = list(zip(self.x.shape[2:], self.b.shape[2:], self.stride, self.padding, self.dilation, strict=True))
        for offset in itertools.product(*(range(size) for size in self.shape[2:])):
            inside, where = [], []
            for o, (size, out, stride, padding, dilation) in zip(offset, axes, strict=True):
                shift = o * dilation - padding  # output t meets pixel t * stride + shift
                first = max(0, -(shift // stride))
                last = max(first, min(out, (size - 1 - shift) // stride + 1))
                begin = first * stride + shift
                inside.append(slice(first, last))
                where.append(
                    slice(begin, begin + stride * (last - first - 1) + 1 if last > first else begin, stride)
                )
            yield inside, where

    def slices(self, numbers_each: int | None = None) -> Iterator[slice]:
        patches = self.groups * self.p * self.steps
        return Block.slices(self, patches + (numbers_each or self.size))

    # ---- norms: by pixels, by patches or in full, whichever multiplies least ----------------------

    def squared_norms(self) -> Tensor:
        if self.steps == 1:
            return super().squared_norms()
        square, pixels, kernel = self.steps**2, math.prod(self.x.shape[2:]), math.prod(self.shape[2:])
        full, by_patch = self.steps * self.p * self.q, square * (self.p + self.q) + ADDITION * self.steps * self.p
        by_pixel = pixels**2 * self.x.shape[1] + square * (self.q + kernel * ADDITION)
        direct = self.groups == 1 and set(self.stride) == {1}
        if direct and by_pixel < min(full, by_patch):
            parts = [self._settled(s, *self._pixel_sums(s)) for s in Block.slices(self, pixels**2 + 2 * square)]
        elif by_patch < full:
            return self._ghost_norms()
        else:
            parts = [squared(self.dense(s)) for s in self._few()]
        return torch.cat(parts)

    def _pixel_sums(self, examples: slice) -> tuple[Tensor, Tensor]:
        """The inner product of two patches is that of their pixels, summed over the kernel's elements."""
        x, b = self.x[examples].flatten(2), self.b[examples].flatten(2)
        sizes, out = self.x.shape[2:], self.b.shape[2:]
        pixels = (x.transpose(1, 2) @ x).view(len(x), *sizes, *sizes)
        patches = x.new_zeros(len(x), *out, *out)
        for inside, where in self._windows():
            patches[(slice(None), *inside, *inside)] += pixels[(slice(None), *where, *where)]
        terms = patches.view(len(x), self.steps, self.steps).mul_(b.transpose(1, 2) @ b)
        return sums(terms), sums_of_squares(terms)

    # ---- the gradients themselves, as convolutions -----------------------------------------------

    def _few(self) -> Iterator[slice]:
        """Slices of the examples whose gradients, and no patches, fit a small cache."""
        step = max(1, SCRATCH // 4 // self.size)
        for start in range(0, self.n, step):
            yield slice(start, min(start + step, self.n))

    def dense(self, examples: slice) -> Tensor:
        if self.device.type != "cpu":  # other devices have slow kernels for many groups
            return super().dense(examples)
        return self._grouped(self.x[examples], self.b[examples])

    def dense_rows(self, rows: slice) -> Tensor:
        if self.device.type != "cpu" or self.groups > 1:
            return super().dense_rows(rows)
        return torch.cat([self._grouped(self.x[s], self.b[s][:, rows]) for s in self._few()])

    def _grouped(self, x: Tensor, b: Tensor) -> Tensor:
        """(m, channels of b, C/g, *kernel): every example is a group of one convolution's weight gradient."""
        m, channels = b.shape[:2]
        shape = (m * channels, *self.shape[1:])
        x, b = (v.reshape(1, -1, *v.shape[2:]) for v in (x, b))
        found = weight_gradient(x, b, shape, self.stride, self.padding, self.dilation, m * self.groups)
        return found.view(m, channels, *self.shape[1:])

    def _convolve(self, kernels: Tensor) -> Tensor:
        convolve = _CONVOLVE[len(self.shape) - 2]
        return convolve(self.x, kernels, None, self.stride, self.padding, self.dilation, self.groups)

    def _sum(self, group: Tensor) -> Tensor:
        x, b = self.x[group], self.b[group]
        return weight_gradient(x, b, self.shape, self.stride, self.padding, self.dilation, self.groups)

    def project(self, directions: Tensor) -> Tensor:
        if len(directions) > 2:
            return Block.project(self, directions)
        products = [(self._convolve(v) * self.b).flatten(1).sum(1) for v in directions]
        return torch.stack(products, 1)


def weight_gradient(
    x: Tensor,
    b: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The ordinary gradient of a convolution's weight, summed over the examples in x."""
    if not len(x):
        return x.new_zeros(shape)
    return torch.ops.aten.convolution_backward(
        b, x, x.new_empty(1).expand(shape), None, list(stride), list(padding), list(dilation), False,
        [0] * len(stride), groups, [False, True, False],
    )[1]  # fmt: skip


def convolution(
    x: Tensor,
    b: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Patches:
    """The block of a convolution with any padding, and where the input is larger than the output needs."""
    kernel = shape[2:]
    sides = _sides(padding, kernel, dilation)
    reach = [
        (out - 1) * s + d * (k - 1) + 1 for out, s, d, k in zip(b.shape[2:], stride, dilation, kernel, strict=True)
    ]
    slack = [x.shape[2 + i] + sum(sides[i]) - reach[i] for i in range(len(kernel))]
    if any(left != right for left, right in sides) or any(e >= s for e, s in zip(slack, stride, strict=True)):
        x = F.pad(x, [side for pair in reversed(sides) for side in pair])
        inside: Any = (..., *(slice(size) for size in reach))
        x = x[inside]
        sides = [(0, 0)] * len(kernel)
    return Patches(x, b, shape, stride, [left for left, _ in sides], dilation, groups)


def _sides(padding: str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after the input along each axis."""
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in padding]
