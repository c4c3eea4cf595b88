"""Large tensors a few examples at a time, so that what is computed of them stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterable

import numpy
from torch import Tensor

BLOCK = 1 << 16  # entries


def example_blocks(values: Tensor) -> Iterable[Tensor]:
    """Parts of `values` along the first axis, of at most BLOCK entries where an example has no more; the whole on a
    device, where each part would be waited for."""
    if not values.is_cpu or not values.numel() or not values.ndim:
        return (values,)
    return values.split(max(BLOCK * len(values) // values.numel(), 1))


def number_true(mask: Tensor) -> int:
    """How many entries of a mask are true. On the host NumPy counts ten times as fast as torch does."""
    return int(numpy.count_nonzero(mask.numpy())) if mask.is_cpu else int(mask.sum())
