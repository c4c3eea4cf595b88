"""A model that is moved while it trains, to another precision or device: what is measured on goes with it.

The probe set is kept as the loop gave it to the model. After `model.double()`, `model.bfloat16()` or `model.cuda()`
the loop gives the model other inputs, and the kept ones no longer fit.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diag.snapshot.batch import Batch, map_tensors


class ModelPlace(NamedTuple):
    """The precision and the device of a model's first floating-point parameter."""

    dtype: torch.dtype
    device: torch.device


def place_of_parameters(model: nn.Module) -> ModelPlace | None:
    """None for a model without such a parameter."""
    found = (ModelPlace(p.dtype, p.device) for p in model.parameters() if p.is_floating_point() and not p.is_meta)
    return next(found, None)


class MovedBatches:
    """Batches that were kept while the model was at home elsewhere, as it would be called on them now."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._first = model, place_of_parameters(model)
        # Those that were given, where the model was then, and what they are there.
        self._moved: tuple[list[Batch], ModelPlace, list[Batch]] | None = None

    def begin(self) -> None:
        """The batches are kept from here on."""
        self._first = place_of_parameters(self._model)

    def here(self, batches: list[Batch]) -> list[Batch]:
        """The same batches: inputs in the model's former precision are in its present one, all on its device."""
        now = place_of_parameters(self._model)
        if now is None or self._first is None or now == self._first:
            return batches
        if self._moved is None or self._moved[1] != now or not _are(self._moved[0], batches):
            self._moved = (list(batches), now, [_moved(batch, self._first, now) for batch in batches])
        return self._moved[2]


def _are(kept: list[Batch], batches: list[Batch]) -> bool:
    return len(kept) == len(batches) and all(map(operator.is_, kept, batches))


def _moved(batch: Batch, before: ModelPlace, now: ModelPlace) -> Batch:
    def follow(t: Tensor) -> Tensor:
        dtype = now.dtype if t.dtype == before.dtype else t.dtype
        return t.to(now.device if t.device == before.device else t.device, dtype)

    def beside(t: Tensor) -> Tensor:
        return t.to(now.device) if t.device == before.device else t

    args, kwargs = map_tensors(follow, batch.args), map_tensors(follow, batch.kwargs)
    targets = map_tensors(beside, batch.targets)  # in the precision in which the loss compares them
    return replace(batch, args=args, kwargs=kwargs, targets=targets)
