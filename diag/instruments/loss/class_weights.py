"""Class weights of the loss: what they leave each class of the loss, beside how often it occurs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.ranges import Share
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition
from diag.snapshot.loop.data import LossFacts
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the loss's weights and the labels"
Shares = NDArray[numpy.float64]
# A class is neglected where its part of the loss is far below both its share of the examples and an even part.
FAR_BELOW, NEXT_TO_NOTHING = 0.1, 0.01
MANY_EXAMPLES = 0.25  # of the examples, for the neglected classes together
LABELS_COUNTED = 64  # fewer say too little of how often a class occurs
# Of the ones of binary cross-entropy: how many times their weight exceeds the one that evens them out; and the
# weight below which rare ones count less still, where it is hardly more than the inverse of that one.
FAR_ABOVE_EVEN, FAR_BELOW_ONE, NEAR_INVERSE = 10.0, 0.25, 1.5
STANDARD_ERRORS_OF_COUNTS = 3.0  # of a count
# How much more frequent a class, and larger its weight, must be to be told apart; nearly all pairs must agree.
RATIO_TOLD_APART, AGREE = 1.5, 0.9


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassWeights(LoopCheck):
    """Weights that leave one class nearly the whole loss, or that are larger where examples are more."""

    cites = SOURCE


@instrument(
    source=SOURCE,
    title="Class weights",
    kind="check",
    why="A class whose part of the loss is next to nothing is not learned, however many examples it has.",
)
def class_weights(loop: Loop, *, nothing: Share = NEXT_TO_NOTHING) -> ClassWeights:
    """Whether the class weights of the loss even out the classes, or do the opposite.

    loop: the facts of the loop, which hold the weights given to cross_entropy, nll_loss or
    binary_cross_entropy_with_logits and the labels counted. The part of the loss that a class has is its number of
    examples times its weight, over the sum of these. Classes with a quarter of the examples that have less than
    `nothing` of it, each ten times less than an even part and than without weights, are a warning: they hardly
    count. So are weights that are larger for the more frequent classes, and a weight of the ones of binary
    cross-entropy of over ten times what evens out ones and zeros, or one that makes rare ones count less still. A
    weight of zero leaves a class out on purpose.

    Raises nothing of its own.
    """
    kinds = [f for f in loop.losses if f.class_weights or f.positive_weights]
    known = Precondition("class weights", bool(kinds), "the loss was given no class weights.")
    fine = "Of classes with a weight above zero none was found that the weights leave next to nothing of the loss."
    findings = [found for f in kinds for found in _findings(f, loop, nothing)]
    return judged(ClassWeights, loop.step, findings, fine, preconditions=(known,))


def _findings(f: LossFacts, loop: Loop, nothing: float) -> Iterator[LoopFinding]:
    yield from _of_ones(f)
    # Labels are counted over all losses: with several, it is not known which are this one's.
    alone = sum(other.of_log_probabilities for other in loop.losses) == 1
    counted = _shares(loop.batches.label_counts, len(f.class_weights)) if f.class_weights and alone else None
    if counted is None:
        return
    weight_array = numpy.array(f.class_weights)
    neglected = list(_neglected(f, counted, weight_array, nothing))
    yield from neglected
    if not neglected and _wrong_way(counted, weight_array):
        yield _the_wrong_way(f, counted, weight_array)


def _of_ones(f: LossFacts) -> Iterator[LoopFinding]:
    """What the weights of the ones leave ones and zeros of binary cross-entropy."""
    columns = list(zip(f.positive_weights, f.ones, strict=False))
    # What a few more ones by chance would say is not told, nor what frequent ones say without a weight.
    counted = [(w, n / f.entries, _at_least(n) / f.entries) for w, n in columns]
    large = [
        (w * s / (1 - s), w, s)
        for w, s, low in counted
        if s < 1 and w > RATIO_TOLD_APART and w * low > FAR_ABOVE_EVEN * (1 - low)
    ]
    rare = [_at_least(f.entries - n) > n for _, n in columns]
    small = [
        (w, w, s)
        for (w, s, low), seldom in zip(counted, rare, strict=True)
        if seldom and 0 < w < FAR_BELOW_ONE and w * (1 - low) < NEAR_INVERSE * low
    ]
    if large:
        times, weight, share = max(large)
        yield _finding(
            f"pos_weight={format_number(weight)} makes the ones count {format_number(times)} times as much as the "
            f"zeros together{_of_columns(large, columns)}: they are {format_share(share)} of the targets of "
            f"{f.function}, and {format_number((1 - share) / share)} evens the two out.",
            f.first_step,
        )
    if small:
        _, weight, share = min(small)
        part = weight * share / (weight * share + 1 - share)
        yield _finding(
            f"pos_weight={format_number(weight)} makes the ones, {format_share(share)} of the targets of "
            f"{f.function}, count less still{_of_columns(small, columns)}: {format_share(part)} of the loss, where "
            f"{format_number((1 - share) / share)} evens the two out.",
            f.first_step,
        )


def _at_least(count: float) -> float:
    """What a count of independent things is at least, but for chance."""
    return max(count - STANDARD_ERRORS_OF_COUNTS * math.sqrt(count), 0.0)


def _of_columns(found: Sequence[object], columns: Sequence[object]) -> str:
    """How many of several columns are found."""
    return f" in {len(found):,} of {len(columns):,} columns" if len(columns) > 1 else ""


def _shares(counts: Mapping[int, int], classes: int) -> Shares | None:
    """The share of each class among the labels; None where these are few or not numbers of the classes."""
    inside = {k: n for k, n in counts.items() if 0 <= k < classes}
    total = sum(inside.values())
    if total < LABELS_COUNTED:
        return None
    return numpy.array([inside.get(k, 0) / total for k in range(classes)])


def _neglected(f: LossFacts, shares: Shares, weights: Shares, nothing: float) -> Iterator[LoopFinding]:
    parts = shares * weights
    if not parts.sum() > 0:
        return
    parts = parts / parts.sum()
    even = 1 / int((parts > 0).sum())
    few = (parts > 0) & (parts < FAR_BELOW * numpy.minimum(shares, even))
    if not few.any() or shares[few].sum() < MANY_EXAMPLES or parts[few].sum() >= nothing:
        return
    names = [f"class {k}" for k in range(len(parts))]
    most, least = int(parts.argmax()), int(numpy.where(few, shares, 0.0).argmax())
    yield _finding(
        f"The weights of {f.function} leave {format_share(float(shares[few].sum()))} of the examples "
        f"{format_share(float(parts[few].sum()))} of the loss, so that they hardly count: the weight of "
        f"{names[least]} is {format_number(float(weights[least]))}, and that of {names[most]} "
        f"{format_number(float(weights[most]))}.",
        f.first_step,
    )


def _wrong_way(shares: Shares, weights: Shares) -> bool:
    """Whether classes that are clearly more frequent have clearly larger weights, in nearly all pairs of such."""
    present = (shares > 0) & (weights > 0)
    shares, weights = numpy.log(shares[present]), numpy.log(weights[present])
    more = (shares[:, None] - shares) > math.log(RATIO_TOLD_APART)
    larger = (weights[:, None] - weights) > math.log(RATIO_TOLD_APART)
    return bool(more.any()) and int((more & larger).sum()) >= AGREE * int(more.sum())


def _the_wrong_way(f: LossFacts, shares: Shares, weights: Shares) -> LoopFinding:
    most = int(shares.argmax())
    least = int(numpy.where(shares > 0, shares, numpy.inf).argmin())
    return _finding(
        f"The weights of {f.function} are larger for the more frequent classes: class {most}, with "
        f"{format_share(float(shares[most]))} of the examples, has {format_number(float(weights[most]))}, and "
        f"class {least}, with {format_share(float(shares[least]))}, has {format_number(float(weights[least]))}.",
        f.first_step,
    )


def _finding(sentence: str, step: int) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.CLASS_WEIGHTS_WRONG,
        sentence,
        "Weights that even out the classes are the inverse of their numbers: total / (classes * count); for "
        "pos_weight, negatives / positives.",
        "Weights that are meant to favour this class.",
        step=step,
        confidence=Confidence.ARITHMETIC,
    )
