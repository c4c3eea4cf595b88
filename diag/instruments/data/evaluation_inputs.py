"""Inputs of the user's own evaluation against those of training: whether they are prepared in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.instruments.data.held_out_inputs import MEAN_SHIFT, SPREAD_RATIO, inputs_apart
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.inputs import InputFacts

SOURCE = "arithmetic of the inputs of calls in training and in evaluation mode"
ROWS_OF_EVALUATION = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationInputs(LoopCheck):
    """Inputs whose mean or scale is another one in evaluation."""


@instrument(
    source=SOURCE,
    title="Inputs of evaluation",
    kind="check",
    why="A network that is judged on inputs of another scale than those it learned from looks worse than it "
    "is, and the reason is in the preparation of the data.",
)
def evaluation_inputs(loop: Loop) -> EvaluationInputs:
    """Whether the inputs that the model is evaluated on have the mean and the scale of those it is trained on.

    Compared are all entries of the first floating tensor of a few calls in training with those of calls in
    evaluation mode without gradients, of examples of one shape. Standard deviations that differ more than twofold,
    or means that differ by more than two of the larger one, are a warning.

    Raises nothing of its own.
    """
    i = loop.inputs
    floating = i.deviation == i.deviation and i.evaluated_deviation == i.evaluated_deviation
    seen = Precondition(
        "both",
        floating and i.shape_alike and min(i.rows, i.evaluated_rows) >= ROWS_OF_EVALUATION,
        f"fewer than {ROWS_OF_EVALUATION} floating inputs of one shape were seen in training and in "
        f"evaluation mode.",
    )
    fine = (
        f"Inputs have a mean of {format_number(i.evaluated_mean)} and a standard deviation of "
        f"{format_number(i.evaluated_deviation)} in evaluation, {format_number(i.mean)} and "
        f"{format_number(i.deviation)} in training."
    )
    findings = list(_findings(i)) if seen.holds else []
    return judged(EvaluationInputs, loop.step, findings, fine, preconditions=(seen,))


def _findings(i: InputFacts) -> Iterator[LoopFinding]:
    ratio, shift = inputs_apart(i.mean, i.deviation, i.evaluated_mean, i.evaluated_deviation)
    if ratio > SPREAD_RATIO or shift > MEAN_SHIFT:
        yield LoopFinding(
            Level.WARNING,
            Cause.HELD_OUT_DIFFERS,
            f"Inputs are not the same in evaluation: they have a mean of {format_number(i.evaluated_mean)} and a "
            f"standard deviation of {format_number(i.evaluated_deviation)}, in training "
            f"{format_number(i.mean)} and {format_number(i.deviation)}.",
            "Prepare both in the same way, with the mean and standard deviation of the training data.",
            "The two are prepared by the same code, and their sources differ so much.",
            step=1,
            explained_by=(Cause.HELD_OUT_DIFFERS,),
            confidence=Confidence.WEAK_EMPIRICAL,
        )
