"""What evaluations give the model beside what training gives it, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ColumnFacts:
    """Of the first floating tensor of a call, by features (columns of a table, the last axis of sequences, channels
    of images): rows of training and of evaluation that were compared; features: that vary in both; apart: those
    whose standard deviations differ more than fourfold, or whose means differ by more than two of the larger one.
    example: one of them, with its mean and standard deviation in training (two numbers) and in evaluation (two).
    standing: columns of a table that are one number in all rows of evaluation (`number`) and another one in most of
    training's, which differ."""

    rows: int = 0
    evaluated: int = 0
    features: int = 0
    apart: int = 0
    example: int = -1
    numbers: tuple[float, ...] = ()
    standing: tuple[int, ...] = ()
    number: float = math.nan


@dataclass(frozen=True)
class NoveltyFacts:
    """Of whole numbers that the model is given in training and evaluation (the `number`-th tensor of a call, from
    1).

    tokens: of evaluation that were looked at; new: the share of them that no looked-at call of training had; of
    training's later calls: expected. largest: number of rows of the largest embedding. pairs: of neighbouring
    tokens in evaluation, known: the share of them that training had; known_of_training: the same of training rows
    when they came for the first time, at the end of the looks before the evaluation. counted: tokens of training's
    sequences, without those that fill their ends; distinct: how many differ; common: the most frequent one, and
    its share."""

    number: int
    tokens: int = 0
    new: float = math.nan
    expected: float = math.nan
    largest: int = 0
    pairs: int = 0
    known: float = math.nan
    known_of_training: float = math.nan
    counted: int = 0
    distinct: int = 0
    common: int = -1
    share: float = math.nan
