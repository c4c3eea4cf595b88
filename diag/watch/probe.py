"""The probe set: the fixed examples on which every measurement of a run is made, so that curves compare.

By default these are the first examples that training saw, as it saw them (augmented where it augments).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diag.quantities.batch import Batch, map_tensors, tensors_in

EXAMPLES = 512
# Inputs and outputs are held for all examples at once, so a language model's vocabulary bounds their number.
BYTES = 1 << 28


class Probe:
    """Collects up to `limit` examples, fewer where inputs and outputs would take more than `limit_bytes`."""

    def __init__(self, limit: int = EXAMPLES, limit_bytes: int = BYTES) -> None:
        self.batches: list[Batch] = []
        self.complete = False
        self._limit, self._limit_bytes = limit, limit_bytes

    @property
    def size(self) -> int:
        """The number of examples so far."""
        return sum(b.size for b in self.batches)

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any, outputs: Any) -> None:
        """Add the examples of one micro-batch, as copies; what is not needed any more is left out."""
        size = _examples(args, kwargs, targets)
        if size is None or self.complete:
            return
        each = sum(t.numel() * t.element_size() for t in tensors_in((args, kwargs, targets, outputs))) / size
        room = min(self._limit, max(1, int(self._limit_bytes / max(each, 1)))) - self.size
        batch = Batch(args, dict(kwargs), targets, size)
        if room < size:
            batch = batch.slice(0, max(room, 0))
            self.complete = True
        if batch.size > 0:
            args, kwargs, targets = (map_tensors(_copy, x) for x in (batch.args, batch.kwargs, batch.targets))
            self.batches.append(Batch(args, kwargs, targets, batch.size))
        self.complete = self.complete or self.size >= self._limit


def _examples(args: Any, kwargs: Any, targets: Any) -> int | None:
    tensors = [t for t in tensors_in((args, kwargs, targets)) if t.ndim]
    return tensors[0].shape[0] or None if tensors else None


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.preserve_format)
