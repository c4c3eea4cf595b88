"""What the inputs of training and of evaluation were, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class InputFacts:
    """Of the first tensor that the model is called with, where its rows are the examples.

    looked: training calls; rows: examples in them, in all; distinct: rows of a call that differ from one another,
    all calls together; different: rows that differ over all calls. mean, deviation: of all entries of floating
    inputs, NaN for others. evaluated: calls in evaluation mode without gradients that were looked at,
    evaluated_rows their examples, evaluated_mean and evaluated_deviation of their entries. shape_alike: an example
    had the same shape in both."""

    looked: int = 0
    rows: int = 0
    distinct: int = 0
    different: int = 0
    mean: float = math.nan
    deviation: float = math.nan
    evaluated: int = 0
    evaluated_rows: int = 0
    evaluated_mean: float = math.nan
    evaluated_deviation: float = math.nan
    shape_alike: bool = True


@dataclass(frozen=True)
class EvaluationFacts:
    """Losses computed without gradients: how many were looked at, how many of them were not a number (broken), and
    the step under way at the first of these."""

    looked: int = 0
    broken: int = 0
    first_step: int = 0
