"""The course of held-out numbers that a training logged by itself: val_loss, eval/accuracy and names like these.

How many examples stand behind such a number is not known, so its error is taken from how it scatters around its
course. Of three that follow each other the median counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from diag.instruments.optimization.course import scatter
from diag.snapshot.history import History

NAMES_OF_HELD_OUT = frozenset({"val", "valid", "validation", "eval", "evaluation", "dev", "test", "heldout"})
NAMES_OF_TRAINING = frozenset({"train", "training"})
LOSS, RIGHT = frozenset({"loss"}), frozenset({"acc", "accuracy"})
MAY_STAND_THERE = frozenset({"epoch", "mean", "avg", "average", "top1"})
FEWEST_EVALUATIONS = 5

Metrics = Mapping[str, Sequence[tuple[int, float]]]


class Logged(NamedTuple):
    """One evaluation: the mean training loss since the one before, the held-out loss with its error, and the shares
    of right answers; NaN where they were not logged."""

    step: int
    loss: float
    held_out_loss: float
    held_out_loss_error: float
    accuracy: float
    held_out_accuracy: float
    held_out_accuracy_error: float


def logged_course(metrics: Metrics, history: History | None) -> list[Logged]:
    """The evaluations in `metrics` (by name: steps and values) beside the training loss of the record; none where
    fewer than five were logged, or no training loss."""
    course = _column(metrics, NAMES_OF_HELD_OUT, LOSS)
    if history is None or len(course) < FEWEST_EVALUATIONS:
        return []
    steps, values = numpy.array(sorted(course)), numpy.array([course[step] for step in sorted(course)])
    losses = _training_losses(history, steps)
    known = numpy.isfinite(losses) & numpy.isfinite(values)
    if known.sum() < FEWEST_EVALUATIONS:
        return []
    steps, values, losses = steps[known], values[known], losses[known]  # a median with NaN would be NaN
    right, own = (_shares(_column(metrics, rows, RIGHT), steps) for rows in (NAMES_OF_HELD_OUT, NAMES_OF_TRAINING))
    errors = scatter(values), scatter(right[numpy.isfinite(right)])
    values, right = _steady(values), _steady(right)
    return [
        Logged(int(step), float(loss), float(value), errors[0], float(mine), float(share), errors[1])
        for step, loss, value, mine, share in zip(steps, losses, values, own, right, strict=True)
    ]


def _column(metrics: Metrics, rows: frozenset[str], what: frozenset[str]) -> dict[int, float]:
    """The first logged number whose name says these rows and this quantity and nothing else, by step."""
    for name, course in metrics.items():
        words = set(re.split(r"[^a-z0-9]+", name.lower())) - {""}
        if words & rows and words & what and not words - rows - what - MAY_STAND_THERE:
            return dict(course)
    return {}


def _training_losses(history: History, steps: NDArray[numpy.int64]) -> NDArray[numpy.float64]:
    """The mean loss of the steps after each of `steps` but the last, up to the next; of the first, up to it."""
    loss, at = numpy.asarray(history.loss, float), numpy.searchsorted(history.steps, steps, side="right")
    starts = numpy.concatenate([[0], at[:-1]])
    parts = [loss[a:b][numpy.isfinite(loss[a:b])] for a, b in zip(starts, at, strict=True)]
    return numpy.array([part.mean() if len(part) else math.nan for part in parts])


def _shares(course: Mapping[int, float], steps: NDArray[numpy.int64]) -> NDArray[numpy.float64]:
    """The shares of right answers at these steps, NaN where there is none; per cent are divided by a hundred."""
    values = numpy.array([course.get(int(step), math.nan) for step in steps])
    finite = values[numpy.isfinite(values)]
    return values / 100.0 if len(finite) and finite.max() > 1.0 else values


def _steady(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """The median of each value and its neighbours, at the ends of the three there: the best of many that scatter
    is better than any is."""
    middle = numpy.clip(numpy.arange(len(values)), 1, len(values) - 2)
    return numpy.asarray(numpy.median(values[middle[:, None] + numpy.array([-1, 0, 1])], axis=1))
