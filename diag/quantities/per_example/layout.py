"""Which elements of a tensor belong to which example.

The first axis need not be the examples': attention layers put time first, and models fold time into the
batch. The answer is measured, not assumed. Two backward passes, one of sum_i l_i and one of sum_i w_i l_i
with distinct weights w, give each element's gradient twice; where an element acts on one example's loss only,
the ratio of the two is that example's weight. Where no arrangement fits, examples share the element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-3  # of an example's gradient; rounding stays near 1e-6 in float32


@dataclass(frozen=True)
class Layout:
    """Examples lie along `axis`, whose length is a multiple c of their number: slow (n, c) or fast (c, n)."""

    axis: int
    slow: bool = True

    def split(self, values: Tensor, n: int) -> Tensor:
        """(n, ...): examples first; the rest of the folded axis stays where the axis was."""
        count = values.shape[self.axis] // n
        sizes = (n, count) if self.slow else (count, n)
        return values.unflatten(self.axis, sizes).movedim(self.axis + (0 if self.slow else 1), 0)

    def fits(self, shape: torch.Size, n: int) -> bool:
        return self.axis < len(shape) and shape[self.axis] > 0 and shape[self.axis] % n == 0


def find_layout(gradient: Tensor, weighted: Tensor, weights: Tensor) -> Layout | None:
    """The arrangement under which `weighted` is `gradient` times the weight of each element's example.

    None where there is none. Raises ValueError where the gradient is zero everywhere and says nothing.
    """
    if not bool(gradient.any()) and not bool(weighted.any()):
        raise ValueError("the gradient is zero")
    n = len(weights)
    for axis, size in enumerate(gradient.shape):
        for slow in (True, False) if size > n else (True,):
            layout = Layout(axis, slow)
            if layout.fits(gradient.shape, n) and _explains(layout, gradient, weighted, weights):
                return layout
    return None


def _explains(layout: Layout, gradient: Tensor, weighted: Tensor, weights: Tensor) -> bool:
    n = len(weights)
    first, second = layout.split(gradient, n).reshape(n, -1), layout.split(weighted, n).reshape(n, -1)
    error = torch.linalg.vector_norm(second - weights[:, None].to(first) * first, dim=1)
    # Below this scale a row's gradient is rounding; judged by itself it would refuse a row that is right.
    floor = 1e-5 * torch.linalg.vector_norm(first) / n
    return bool((error <= TOLERANCE * torch.linalg.vector_norm(first, dim=1) + floor).all())
