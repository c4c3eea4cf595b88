"""Rows that the loop evaluates on, kept as held-out data where the user gives none.

The targets of a row are not seen in an evaluation, whose score is the user's own arithmetic. They are taken from
the place in the DataLoader's batch where training's targets were found. Rows that training uses are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.measure.probe import Probe

ROWS_HELD, BYTES_HELD = 256, 1 << 26
TRIED = 8  # losses whose targets are looked for in the batch


class EvaluatedData:
    """Collects the rows of the first evaluation."""

    def __init__(self) -> None:
        self._probe = Probe(ROWS_HELD, BYTES_HELD)
        self._batch: list[Tensor] = []
        self._place: int | None = None
        self._tried = 0
        self._over = False

    @property
    def batches(self) -> list[Batch] | None:
        """The rows, once an evaluation is over; None before."""
        return self._probe.batches if self._over and self._probe.batches else None

    @property
    def may_come(self) -> bool:
        """Whether there may still be some."""
        return not self._over and (self._place is not None or self._tried < TRIED)

    def fetched(self, batch: Any) -> None:
        """A DataLoader gave a batch."""
        self._batch = [] if self._over else tensors_in(batch)

    def training_call(self) -> None:
        """The model was called in training: an evaluation is over."""
        self._over |= bool(self._probe.batches)

    def loss_called(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss function was called in training: where in the batch are its targets?"""
        batch, self._batch = self._batch, []
        if self._place is not None or self._tried >= TRIED or not batch:
            return
        self._tried += 1
        _, target = input_and_target(args, kwargs)
        if isinstance(target, Tensor):
            self._place = place_of(target, batch)

    def evaluated(self, args: Any, kwargs: Mapping[str, Any], untrained: bool) -> None:
        """The model was called without gradients; untrained: on rows that training is known not to use."""
        batch, self._batch = self._batch, []
        if self._over or self._place is None or self._place >= len(batch) or not untrained:
            return
        targets = batch[self._place]
        inputs = tensors_in((args, dict(kwargs)))
        if not inputs or any(t.ndim == 0 or len(t) != len(targets) for t in (*inputs, targets)):
            return
        self._probe.add(args, dict(kwargs), targets.to(inputs[0].device), ())


def place_of(target: Tensor, batch: list[Tensor]) -> int | None:
    """Which tensor of the batch the target is, None where that is not certain. Numbers are compared on the host
    only; elsewhere it is the one with the target's shape and type, if there is one such."""
    alike = [i for i, t in enumerate(batch) if t.shape == target.shape and t.dtype == target.dtype and t.ndim]
    same = [i for i in alike if batch[i] is target]
    if not same and target.is_cpu:
        same = [i for i in alike if batch[i].is_cpu and torch.equal(batch[i], target)]
    elif not same:
        same = alike
    return same[0] if len(same) == 1 else None
