"""Losses that choose each row's partner among others by their similarity, as a part of a loop's facts (see
`facts`): read from the autograd graph, with the numbers that it keeps.

Steps are counted from 1 as in the record of the run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ContrastLook:
    """A softmax over similarities of embeddings at one backward pass, in which one answer of each row is asked for.

    rows, answers: how many rows, and answers of each. own: rows and answers are one set of embeddings, so that each
    row is among its answers; shared: both come from the same layers, None where that is not known. unit: all
    embeddings have the length one; factor: what their products are multiplied with, one over the temperature, NaN
    where it is learned or not known. masked: the share of rows whose right answer is masked out; itself: whose
    right answer is the row itself; among: that are among their own wrong answers. free: answers that are not
    masked, the median of the rows. equal: every right answer is the row's embedding, to rounding, and others are
    not. rank: the mean share of the wrong answers that are less like the row than the right one is: a half by
    chance; NaN where all are alike. loss: the mean cross-entropy."""

    step: int
    rows: int
    answers: int
    own: bool
    shared: bool | None
    unit: bool
    factor: float
    masked: float
    itself: float
    among: float
    free: float
    equal: bool
    rank: float
    loss: float


@dataclass(frozen=True)
class ContrastFacts:
    """The looks at such a softmax, the first and the last of them. read: backward passes whose loss was read;
    drawn: those of them whose loss holds nothing but the similarity of outputs of common layers, drawn together;
    first: the step of the first of these; alike: at the last of these, the mean cosine of different rows, NaN
    where not known."""

    looks: tuple[ContrastLook, ...] = ()
    read: int = 0
    drawn: int = 0
    first: int = 0
    alike: float = float("nan")
