"""Is the loss of an evaluation a number?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the losses that the loop computes without gradients"
EXPLAINED_BY = (
    Cause.NOT_FINITE, Cause.DATA_NOT_FINITE, Cause.TRAINING_DIVERGED, Cause.LEARNING_RATE_TOO_HIGH,
    Cause.GRADIENTS_NOT_ZEROED, Cause.NORMALIZATION_STATISTICS_BAD,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class FiniteEvaluation(LoopCheck):
    """Losses of evaluations that are not numbers."""

    cites = SOURCE


@instrument(
    source=SOURCE,
    title="Evaluation finite",
    kind="check",
    why="A validation loss that is NaN says nothing of the network, and what is chosen by it is chosen at random.",
)
def finite_evaluation(loop: Loop) -> FiniteEvaluation:
    """Whether the losses that the loop computes without gradients are numbers.

    loop: the facts of the loop, which hold how many of these losses were looked at after the first step, and how
    many were NaN. One is a warning; where training's losses are not finite either it follows from that. Raises
    nothing of its own.
    """
    e = loop.evaluation
    known = Precondition("an evaluation", e.looked > 0, "no loss was computed without gradients.")
    fine = f"All {e.looked:,} losses of evaluations that were looked at are numbers."
    return judged(FiniteEvaluation, loop.step, list(_findings(loop)), fine, preconditions=(known,))


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    e = loop.evaluation
    if e.broken:
        yield LoopFinding(
            Level.WARNING,
            Cause.NOT_FINITE,
            f"The loss of the evaluation is not a number: {e.broken:,} of the {e.looked:,} that were looked at, "
            f"for the first time before step {e.first_step:,}.",
            "Look for rows of attention that may look at nothing (a mask, or padding, that leaves a position no "
            "key), and for batches without a single target that counts.",
            "An evaluation on the same rows whose loss is finite.",
            step=e.first_step,
            explained_by=EXPLAINED_BY,
        )
