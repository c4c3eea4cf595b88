"""Losses that the loop computes without gradients: how many were not numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diag.snapshot.loop.inputs import EvaluationFacts
from diag.watching.observe.loop.moment import Moment, due

LOSSES_LOOKED_AT, LOSSES_KEPT = 16, 64  # one by one, then ever fewer; and those kept on a device


class Evaluations:
    """Looks at some of the losses; what is on a device is read when the facts are asked for."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._losses = self._looked = self._broken = self._first = 0
        self._away: list[tuple[int, Tensor]] = []

    def loss(self, value: Any) -> None:
        """A loss function returned a value without a graph."""
        self._losses += 1
        if not isinstance(value, Tensor) or value.numel() != 1 or self._moment.step < 2:
            return
        if self._losses > LOSSES_LOOKED_AT and not due(self._losses):
            return
        if value.is_cpu:
            self._note(self._moment.step, value)
        elif len(self._away) < LOSSES_KEPT:
            self._away.append((self._moment.step, value.detach().clone()))

    def _note(self, step: int, value: Tensor) -> None:
        self._looked += 1
        if bool(torch.isnan(value)):
            self._broken += 1
            self._first = self._first or step
            self._moment.news("evaluation is not a number", "evaluation")

    def facts(self) -> EvaluationFacts:
        """As plain data."""
        waiting, self._away = self._away, []
        for step, value in waiting:
            self._note(step, value)
        return EvaluationFacts(self._looked, self._broken, self._first)
