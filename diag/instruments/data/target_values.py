"""What the targets are: one feature of the input, all alike, or of two classes that are very unequal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.instruments.data.class_counts import CLASS_RATIO, times_rarer
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.asked import AskedFacts
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.paired import PairedFacts

SOURCE = "arithmetic of the targets beside the inputs"
CALLS_OF_TARGETS, ROWS_BESIDE_TARGETS, TARGETS_COUNTED = 3, 48, 64  # calls, their rows, and targets, at least
FEATURES_OF_A_TABLE = 2  # a toy with one feature may be a straight line


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetValues(LoopCheck):
    """Targets that can be read from the input, or guessed without it."""


@instrument(
    source=SOURCE,
    title="Targets",
    kind="check",
    why="Targets that are all alike leave nothing to learn, and targets that stand among the inputs will "
    "not be there when the network is used.",
)
def target_values(loop: Loop) -> TargetValues:
    """Whether one feature of the input gives the target, and whether the targets differ at all.

    A feature is told of where the target is an affine function of it on every row of every batch that was looked at
    (for classes: where it tells one class from all others), to a correlation of one within 1e-6. Targets that a
    shuffling DataLoader gave and that are all one number in six batches and more teach one answer. Of one binary
    target an example, one value that is ten times rarer than the other (with two standard errors more of it) is
    told of, where the loss does not weight it.

    Raises nothing of its own.
    """
    own = [p for p in loop.paired if not p.function]
    seen = Precondition("targets", bool(loop.asked or own), "no targets of a loss were seen.")
    findings = [f for asked in loop.asked for f in _findings(asked, loop)]
    if not any(f.cause is Cause.ANSWER_IN_INPUT for f in findings):
        findings += [f for p in own for f in _of_own(p)]
    return judged(
        TargetValues,
        loop.step,
        findings,
        "No single feature of the input gives the target.",
        preconditions=(seen,),
    )


def _findings(f: AskedFacts, loop: Loop) -> Iterator[LoopFinding]:
    compared = f.copied_looks >= CALLS_OF_TARGETS and f.rows >= ROWS_BESIDE_TARGETS
    if f.copied >= 0 and compared and f.features >= FEATURES_OF_A_TABLE:
        yield _given_away(f.rows, f.copied, f.first_step)
    if f.binary and f.one_a_row and not f.weighted and f.targets >= TARGETS_COUNTED and f.low < f.high:
        yield from _unequal(f)
    one = f.targets >= TARGETS_COUNTED and f.looked > CALLS_OF_TARGETS and f.from_data
    if one and loop.batches.shuffled and (f.low == f.high or f.classes == 1):
        value_text = "" if f.classes == 1 else f" ({format_number(f.low)})"
        yield LoopFinding(
            Level.ALARM,
            Cause.TARGETS_ALL_EQUAL,
            f"All {f.targets:,} targets in the {f.looked} batches that were looked at are the same{value_text}, so "
            "there is nothing to learn but this one answer.",
            "Look at how the labels are made or selected; the other classes are not in the training set.",
            "A batch whose targets differ.",
            step=f.first_step,
            explained_by=(Cause.TARGETS_CAST,),
        )


def _of_own(p: PairedFacts) -> Iterator[LoopFinding]:
    """Of targets that the loop's own arithmetic compares."""
    if p.copied >= 0 and p.copied_rows >= ROWS_BESIDE_TARGETS and p.features >= FEATURES_OF_A_TABLE:
        yield _given_away(p.copied_rows, p.copied, 1)


def _given_away(rows: int, feature: int, step: int) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.ANSWER_IN_INPUT,
        f"The input holds the answer: on all {rows:,} rows that were compared, the target follows from "
        f"feature {feature} of the input alone.",
        "Look at how this feature is made: a copy of the label, a window that reaches to the moment that is "
        "to be foretold, or something that is known only afterwards.",
        "A row on which the feature does not give the target.",
        step=step,
    )


def _unequal(f: AskedFacts) -> Iterator[LoopFinding]:
    ones = round(f.mean * f.targets)
    rare, value = min((ones, 1), (f.targets - ones, 0))
    ratio = times_rarer(f.targets - rare, rare)
    if ratio > CLASS_RATIO:
        yield LoopFinding(
            Level.WARNING,
            Cause.CLASS_IMBALANCE,
            f"The two classes differ in number, {format_number(ratio)}-fold or more: {rare:,} of the {f.targets:,} "
            f"targets that were looked at are {value}.",
            "Judge by the accuracy of each class; sample the rare class more often or give pos_weight=.",
            "Other examples of the training set have this class.",
            step=f.first_step,
        )
