"""Calls of the model without gradients on rows that training does not use: evaluations, also where one call is all.

What a call is for is not seen. Rows that training uses too are no evaluation (pseudo-labels, a rollout, batch
statistics that are taken again), nor are rows that are given again and again (dropout left on to sample answers).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

QUIET_ROWS, QUIET_NUMBERS = 256, 64  # of a call, and of each of its rows
QUIET_ROWS_KEPT = 1 << 13
MAY_COINCIDE = 0.02  # of the rows, with rows of training: equal ones occur
OFTEN_COINCIDE = 0.5  # the same, of rows of a small world that are given again, all of them, at each evaluation
ROWS_TO_KNOW = 4  # tell one batch from another
QUIET_CALLS_KEPT = 1 << 10
STEPS_SINCE_A_CALL = 5  # an agent that acts, or pseudo-labels for each step, calls more often


class QuietCalls:
    """Follows one stretch of calls without gradients after the other."""

    def __init__(self) -> None:
        self._trained: set[bytes] = set()
        self._largest = 0
        self._shape: tuple[Any, Any] = ((), None)
        self._last_step = 0
        self._before: set[bytes] = set()  # the rows of the stretch before
        self._forget()

    def _forget(self) -> None:
        self._rows: set[bytes] = set()
        self._batches: set[bytes] = set()
        self._calls = self._noisy = 0
        self._read, self._repeated, self._size = True, False, 0

    def training_call(self, t: Tensor | None) -> None:
        """The model was called in training; the stretch before is over, and `ended` has been asked."""
        if t is None or not _readable(t):
            return
        self._largest, self._shape = max(self._largest, len(t)), (t.shape[1:], t.dtype)
        if len(self._trained) < QUIET_ROWS_KEPT:
            self._trained.update(_marks(t))

    def quiet_call(self, t: Tensor | None, noisy: bool) -> None:
        """The model was called without gradients, with dropout or batch statistics on or not."""
        self._calls, self._noisy = self._calls + 1, self._noisy + noisy
        if t is None or not _readable(t) or (t.shape[1:], t.dtype) != self._shape:
            self._read = False
            return
        if not noisy or self._repeated or self._calls > QUIET_CALLS_KEPT:
            return
        marks = _marks(t)
        batch = b"".join(marks[:ROWS_TO_KNOW])
        self._repeated = batch in self._batches or 2 * len(set(marks)) <= len(marks)
        self._batches.add(batch)
        if len(self._rows) < QUIET_ROWS_KEPT:
            self._rows.update(marks)
        self._size = len(t)

    def over(self, step: int) -> int:
        """The stretch is over: how many calls it had, if it was an evaluation with all of them noisy, else 0."""
        calls, noisy, known = self._calls, self._noisy, self._read and not self._repeated
        rows, size, since = self._rows, self._size, step - self._last_step
        if calls:
            self._last_step = step
        self._forget()
        again, self._before = bool(rows) and rows == self._before, rows or self._before
        trained = len(rows & self._trained) > (OFTEN_COINCIDE if again else MAY_COINCIDE) * len(rows)
        if not calls or noisy < calls or not known or trained:
            return 0
        alone = calls == 1 and (size <= self._largest or since < STEPS_SINCE_A_CALL)
        return 0 if alone else calls


class PlainEvaluations:
    """Tells which calls without gradients are evaluations of a model in training mode of which no module acts
    otherwise in evaluation mode, so that nobody need call eval(): those of one tensor on more rows than any batch
    of training has, a few steps at least after the last one. An agent that acts, and targets that are made for each
    step, come more often or are smaller."""

    def __init__(self) -> None:
        self._largest = 0
        self._step = 0  # nothing is known of what the first steps call
        self._known = False

    def training_call(self, t: Tensor | None) -> None:
        """The model was called in training."""
        if t is not None and t.ndim:
            self._largest = max(self._largest, len(t))

    def quiet_call(self, t: Tensor | None, step: int) -> bool:
        """The model was called without gradients after this step: is it such an evaluation?"""
        if step != self._step:
            self._known, self._step = step - self._step >= STEPS_SINCE_A_CALL, step
        return self._known and 0 < self._largest < (0 if t is None or not t.ndim else len(t))


def _readable(t: Tensor) -> bool:
    return t.is_cpu and t.layout is torch.strided and not t.is_nested and t.ndim > 1 and t.numel() > 0


def _marks(t: Tensor) -> list[bytes]:
    """Numbers of each of the first rows, as bytes."""
    rows = t.detach()[:QUIET_ROWS].reshape(min(len(t), QUIET_ROWS), -1)
    rows = rows[:, :: 1 + (rows.shape[1] - 1) // QUIET_NUMBERS].contiguous()
    return [row.tobytes() for row in rows.float().numpy()]
