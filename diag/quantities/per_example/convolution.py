"""Per-example gradients of convolutions: outer products of a patch of the input and an output gradient.

Patches are cut out a slice of the examples at a time, since they take as many times the input's memory as the
kernel has elements; sums, projections and sketches need no patches at all, because a convolution with the
direction as its kernel is the same sum of products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.quantities.per_example.blocks import Block, Outer

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Patches(Outer):
    """The weight's gradients for `F.conv{1,2,3}d(x, weight, ...)`: G_i = sum_t b_it patch_t(x_i)'.

    x (n, C, *spatial), already padded; b (n, C_out, *out); shape (C_out, C / groups, *kernel).
    """

    def __init__(
        self,
        x: Tensor,
        b: Tensor,
        shape: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.x, self.b, self.shape = x, b, tuple(shape)
        self.stride, self.dilation, self.groups = tuple(stride), tuple(dilation), groups
        self.n, self.q = x.shape[0], shape[0] // groups
        self.device, self.dtype = b.device, b.dtype
        self.steps, self.p = math.prod(b.shape[2:]), math.prod(shape[1:])

    def factors(self, examples: slice | Tensor) -> tuple[Tensor, Tensor]:
        x, b = self.x[examples], self.b[examples]
        patches = self._unfold(x).transpose(-1, -2)
        return patches, b.reshape(b.shape[0], self.groups, self.q, self.steps).transpose(-1, -2)

    def _unfold(self, x: Tensor) -> Tensor:
        """(n, g, C/g * kernel, out positions)."""
        kernel, out = self.shape[2:], self.b.shape[2:]
        # One strided copy per kernel element; F.unfold is three to five times slower on the CPU.
        patches = x.new_empty(*x.shape[:2], math.prod(kernel), *out)
        for k, offset in enumerate(itertools.product(*(range(size) for size in kernel))):
            steps = zip(offset, self.dilation, self.stride, out, strict=True)
            where: Any = tuple(slice(o * d, o * d + s * (size - 1) + 1, s) for o, d, s, size in steps)
            patches[:, :, k] = x[(slice(None), slice(None), *where)]
        return patches.view(x.shape[0], self.groups, self.p, self.steps)

    def slices(self, numbers_each: int | None = None) -> Iterator[slice]:
        patches = self.groups * self.p * self.steps
        return Block.slices(self, patches + (numbers_each or self.size))

    def _convolve(self, kernels: Tensor) -> Tensor:
        convolve = _CONVOLVE[len(self.shape) - 2]
        out = convolve(self.x, kernels, None, self.stride, 0, self.dilation, self.groups)
        inside: Any = (..., *(slice(size) for size in self.b.shape[2:]))
        return out[inside]

    def _sum(self, group: Tensor) -> Tensor:
        return weight_gradient(self.x[group], self.b[group], self.shape, self.stride, self.dilation, self.groups)

    def project(self, directions: Tensor) -> Tensor:
        if len(directions) > 2:
            return Block.project(self, directions)
        products = [(self._convolve(v) * self.b).flatten(1).sum(1) for v in directions]
        return torch.stack(products, 1)

    def sketch(self, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        if self.groups > 1 or columns is None:
            return Block.sketch(self, rows, columns)
        a = self._convolve(columns.T.reshape(-1, *self.shape[1:])).flatten(2)
        b = self.b.flatten(2)
        b = b if rows is None else rows.T @ b
        return b @ a.transpose(-1, -2)


def weight_gradient(
    x: Tensor, b: Tensor, shape: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """The ordinary gradient of a convolution's weight, summed over the examples in x."""
    spatial = len(shape) - 2
    if not len(x):
        return x.new_zeros(shape)
    return torch.ops.aten.convolution_backward(
        b, x, x.new_empty(1).expand(shape), None, list(stride), [0] * spatial, list(dilation), False,
        [0] * spatial, groups, [False, True, False],
    )[1]  # fmt: skip


def pad_input(x: Tensor, padding: str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Zero-padded input, so that what follows is a convolution without padding."""
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in padding]
    flat = [side for pair in reversed(sides) for side in pair]
    return F.pad(x, flat) if any(flat) else x
