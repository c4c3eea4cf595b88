"""Which elements of a tensor belong to which example.

The first axis need not be the examples': attention layers put time first, and models fold time into the
batch. The answer is measured, not assumed. Two backward passes, one of sum_i l_i and one of sum_i w_i l_i
with distinct weights w, give each element's gradient twice; where an element acts on one example's loss only,
the ratio of the two is that example's weight. Where no arrangement fits, examples share the element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUT_TOLERANCE = 1e-3  # of an example's gradient; rounding stays near 1e-6 in float32
HALF_TOLERANCE = 3e-2  # the same in half precision, whose numbers are rounded to 4e-3


@dataclass(frozen=True)
class ExampleLayout:
    """Examples lie along `axis`, whose length is a multiple c of their number n.

    `inner` is how many neighbours along it belong to one example: all c (None), 1, or a number between, as where
    windows are folded into the batch between time steps; then `folded` is c, and other c do not fit.
    """

    axis: int
    inner: int | None = None
    folded: int | None = None

    def split(self, values: Tensor, n: int) -> Tensor:
        """(n, ...): examples first; the rest of the folded axis stays where the axis was."""
        count = values.shape[self.axis] // n
        inner = count if self.inner is None else self.inner
        apart = values.unflatten(self.axis, (count // inner, n, inner)).movedim(self.axis + 1, 0)
        return apart.flatten(self.axis + 1, self.axis + 2)

    def fits(self, shape: torch.Size, n: int) -> bool:
        """Whether n examples can lie so in a tensor of this shape."""
        if self.axis >= len(shape) or shape[self.axis] == 0 or shape[self.axis] % n:
            return False
        return self.folded in (None, shape[self.axis] // n)


def _candidates(shape: torch.Size, n: int) -> Iterator[ExampleLayout]:
    for axis, size in enumerate(shape):
        if size and size % n == 0:
            count = size // n
            yield ExampleLayout(axis)
            if count > 1:
                yield ExampleLayout(axis, 1)
            yield from (ExampleLayout(axis, inner, count) for inner in range(2, count) if count % inner == 0)


def find_layout(gradient: Tensor, weighted: Tensor, weights: Tensor) -> ExampleLayout | None:
    """The arrangement under which `weighted` is `gradient` times the weight of each element's example.

    None where there is none. Raises ValueError where the gradient is zero everywhere and says nothing.
    """
    if not bool(gradient.any()) and not bool(weighted.any()):
        raise ValueError("the gradient is zero")
    n = len(weights)
    for layout in _candidates(gradient.shape, n):
        if _explains(layout, gradient, weighted, weights):
            return layout
    return None


def _explains(layout: ExampleLayout, gradient: Tensor, weighted: Tensor, weights: Tensor) -> bool:
    n = len(weights)
    first, second = layout.split(gradient, n).reshape(n, -1), layout.split(weighted, n).reshape(n, -1)
    error = torch.linalg.vector_norm(second - weights[:, None].to(first) * first, dim=1)
    # Below this scale a row's gradient is rounding; judged by itself it would refuse a row that is right.
    floor = 1e-5 * torch.linalg.vector_norm(first) / n
    tolerance = LAYOUT_TOLERANCE if gradient.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
    return bool((error <= tolerance * torch.linalg.vector_norm(first, dim=1) + floor).all())
