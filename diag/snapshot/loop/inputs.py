"""What the inputs of training and of evaluation were, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class InputFacts:
    """Of the first tensor that the model is called with, where its rows are the examples.

    looked: training calls; rows: examples in them, in all; distinct: rows of a call that differ from one another,
    all calls together; different: rows that differ over all calls. mean, deviation: of all entries of floating
    inputs, NaN for others. evaluated: calls without gradients that evaluate it and were looked at,
    evaluated_rows their examples, evaluated_mean and evaluated_deviation of their entries. shape_alike: an example
    had the same shape in both. others_differ: the rows of another tensor of a call do. places: of a data set whose
    rows were looked at, where they are all that the model is given, of_places: how many of these rows differ;
    continuous: those that differ do so in a number that hardly any two share, so that equal ones are copies."""

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
    others_differ: bool = False
    places: int = 0
    of_places: int = 0
    continuous: bool = False


@dataclass(frozen=True)
class TokenFacts:
    """Of the whole numbers that a model is called with, where it is given nothing else: in `calls` calls that were
    looked at, how many there were and how many distinct ones, and one of these. bags: of calls that cut one row of
    tokens into bags (ids, offsets), how many bags; empty_calls: those of the `bag_calls` such calls in which every
    bag but the last is empty."""

    calls: int = 0
    numbers: int = 0
    distinct: int = 0
    one: int = 0
    bag_calls: int = 0
    bags: int = 0
    empty_calls: int = 0


@dataclass(frozen=True)
class StoredFacts:
    """The data where it is stored. slices: calls whose input was a slice of the tensor that the input of the call
    before was a slice of; written: those between which that tensor was changed in place; rows_again: rows that a
    later slice held again, rows_changed those with other numbers then. epochs: of a data set whose arrays were
    there before; epochs_changed: those before which they had been changed in place, with the standard deviation of
    what was looked at, before the first change and after the last (spread_before, spread)."""

    slices: int = 0
    written: int = 0
    rows_again: int = 0
    rows_changed: int = 0
    epochs: int = 0
    epochs_changed: int = 0
    spread_before: float = math.nan
    spread: float = math.nan


@dataclass(frozen=True)
class EvaluationFacts:
    """Losses computed without gradients: how many were looked at, how many of them were not a number (broken), and
    the step under way at the first of these."""

    looked: int = 0
    broken: int = 0
    first_step: int = 0
