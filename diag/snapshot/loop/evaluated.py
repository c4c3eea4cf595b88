"""What evaluations give the model beside what training gives it, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ArrangementFacts:
    """Of images (channels, height, width) or sequences (length, features) that the model is given as its first
    floating tensor: rows of training and of evaluation that were looked at.

    mirrored: for each way in which images may be mirrored or turned, what that makes negative of the moments of
    training's pixels (which are bright together) over the same of evaluation's, the correlation of the two, and by
    how much the smaller one is larger than its noise (squares). order: for each axis of sequences, 1 or 2, the
    correlation of neighbours along it within a row, in training and in evaluation (a random order of n gives about
    -1 / n), the fewest numbers that one of the two was told by, and the length of the axis."""

    rows: int = 0
    evaluated: int = 0
    mirrored: tuple[tuple[str, float, float, float], ...] = ()
    order: tuple[tuple[int, float, float, int, int], ...] = ()


@dataclass(frozen=True)
class ColumnFacts:
    """Of the first floating tensor of a call, by features (columns of a table, the last axis of sequences, channels
    of images): rows of training and of evaluation that were compared; features: that vary in both; apart: those
    whose standard deviations differ more than fourfold, or whose means differ by more than two of the larger one.
    example: one of them, with its mean and standard deviation in training (two numbers) and in evaluation (two).
    standing: columns of a table that are one number in all rows of evaluation (`number`) and another one in most of
    training's, which differ. moved: columns of a table that are in evaluation what another is in training, as
    (place in evaluation, place in training). turned: features that are lopsided in training, and as lopsided to the
    other side in evaluation (skewness of the first of them: `skews`, training's first), where all that vary are.
    arrangement: of what stands where in a row."""

    rows: int = 0
    evaluated: int = 0
    features: int = 0
    apart: int = 0
    example: int = -1
    numbers: tuple[float, ...] = ()
    standing: tuple[int, ...] = ()
    number: float = math.nan
    moved: tuple[tuple[int, int], ...] = ()
    turned: tuple[int, ...] = ()
    skews: tuple[float, ...] = ()
    arrangement: ArrangementFacts = field(default_factory=ArrangementFacts)


@dataclass(frozen=True)
class NoveltyFacts:
    """Of whole numbers that the model is given in training and evaluation (the `number`-th tensor of a call, from
    1).

    tokens: of evaluation that were looked at; new: the share of them that no looked-at call of training had; of
    training's later calls: expected. largest: number of rows of the largest embedding. pairs: of neighbouring
    tokens in evaluation, known: the share of them that training had; known_of_training: the same of training rows
    when they came for the first time, at the end of the looks before the evaluation. counted: tokens of training's
    sequences, without those that fill their ends; distinct: how many differ; common: the most frequent one, and
    its share. one_new: the most frequent id of evaluation that training never had, one_share: its share of
    evaluation's tokens, without what fills ends. rows, evaluated_rows: of sequences that were kept to compare their
    lengths, short: the length that nine in ten of training's have at least, longest: of evaluation's."""

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
    one_new: int = -1
    one_share: float = math.nan
    rows: int = 0
    evaluated_rows: int = 0
    short: int = 0
    longest: int = 0


@dataclass(frozen=True)
class AskedInEvaluation:
    """Of one loss between numbers (mse_loss, ...) that is called on the network's outputs as they are, in training
    and without gradients: how many targets were looked at in both, their quartiles (three numbers each), how many
    distinct ones training's were, and the shares of whole numbers among them. Empty, or NaN: not known."""

    function: str = ""
    targets: int = 0
    evaluated: int = 0
    quartiles: tuple[float, ...] = ()
    evaluated_quartiles: tuple[float, ...] = ()
    distinct: int = 0
    whole: float = math.nan
    evaluated_whole: float = math.nan
