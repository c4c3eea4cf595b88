"""Is the loss of evaluation taken against targets of the kind that the network was trained on?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition
from diag.snapshot.loop.evaluated import AskedInEvaluation
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the targets of losses in training and in evaluation"
QUARTILES_APART, MEDIANS_APART = 4.0, 4.0  # ratio of the distances between quartiles; medians, in the larger one
LOGARITHM_FITS = 0.5  # of the distance between training's quartiles
TARGETS_OF_INTEGERS, SEVERAL_INTEGERS, NOT_INTEGERS = 200, 3, 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationTargets(LoopCheck):
    """Targets of evaluation that are not what the network was trained on."""

    cites: ClassVar[str] = SOURCE


@instrument(
    source=SOURCE,
    title="Targets of evaluation",
    kind="check",
    why="A network that was trained on standardised or logarithmic targets answers with such numbers; an error "
    "against the original ones says nothing of how well it does.",
)
def evaluation_targets(loop: Loop) -> EvaluationTargets:
    """Whether the loss of evaluation compares outputs with targets like those that training compares them with.

    Of a loss between numbers (mse_loss, l1_loss, ...) that is called on the network's outputs as they are, in
    training and without gradients. A warning where the distances between the quartiles of the targets differ more
    than fourfold, or the medians by more than four of the larger one; and where all of at least 200 targets of
    training are whole numbers (three different ones or more) and most of evaluation's are not. Outputs that are
    scaled back before they are compared are not judged.

    Raises nothing of its own.
    """
    a = loop.asked_in_evaluation
    seen = Precondition(
        "both",
        bool(a.quartiles),
        "no loss between numbers was seen on one output of the network in training and in evaluation.",
    )
    fine = "Targets of evaluation are like those of training in what was compared."
    return judged(EvaluationTargets, loop.step, _findings(a), fine, preconditions=(seen,))


def _findings(a: AskedInEvaluation) -> Iterator[LoopFinding]:
    if not a.quartiles:
        return
    (low, middle, high), (low_, middle_, high_) = a.quartiles, a.evaluated_quartiles
    narrow, wide = sorted((high - low, high_ - low_))
    if narrow > 0 and (wide > QUARTILES_APART * narrow or abs(middle - middle_) > MEDIANS_APART * wide):
        yield _of_another_scale(a)
    whole = a.targets >= TARGETS_OF_INTEGERS and a.whole == 1 and a.distinct >= SEVERAL_INTEGERS
    if whole and a.evaluated_whole <= 1 - NOT_INTEGERS:
        yield LoopFinding(
            Level.WARNING,
            Cause.TARGETS_CAST,
            f"All {a.targets:,} targets of training that were looked at are whole numbers, and "
            f"{format_share(1 - a.evaluated_whole)} of the {a.evaluated:,} of evaluation are not: if the two are "
            "of one kind, the network learns to answer with what a conversion to integers left of them.",
            "Look where training's targets are made: .long(), int(), astype(int) or // cut off what comes after "
            "the point; a regression takes them as floats.",
            "Training's targets that are whole where they come from.",
            step=1,
        )


def _of_another_scale(a: AskedInEvaluation) -> LoopFinding:
    (low, middle, high), (low_, middle_, high_) = a.quartiles, a.evaluated_quartiles
    logarithm = " They are about exp() of training's: what the network learns are logarithms." if _is_exp(a) else ""
    return LoopFinding(
        Level.WARNING,
        Cause.HELD_OUT_LABELS_DIFFER,
        f"The loss of evaluation is taken against other numbers than the network is trained on: {a.function} "
        f"compares outputs with targets around {format_number(middle_)} there (half of them between "
        f"{format_number(low_)} and {format_number(high_)}), and around {format_number(middle)} in training "
        f"(between {format_number(low)} and {format_number(high)}).{logarithm}",
        "Compare both on one scale: undo on the outputs what was done to training's targets (outputs * std + mean, "
        "exp(outputs)), or do the same to those of evaluation.",
        "Sources of the two whose targets differ so much as they come.",
        step=1,
        explained_by=(Cause.HELD_OUT_DIFFERS,),  # as where targets are the inputs
        confidence=Confidence.WEAK_EMPIRICAL,
    )


def _is_exp(a: AskedInEvaluation) -> bool:
    """Whether training's quartiles are the logarithms of evaluation's."""
    if min(a.evaluated_quartiles) <= 0:
        return False
    apart = (abs(q - math.log(q_)) for q, q_ in zip(a.quartiles, a.evaluated_quartiles, strict=True))
    return max(apart) <= LOGARITHM_FITS * (a.quartiles[2] - a.quartiles[0])
