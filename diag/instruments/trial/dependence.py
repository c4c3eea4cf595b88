"""What the answers depend on: they should change with the input, and not with the other examples of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.given.trial import Trial

SOURCE = "Karpathy, A Recipe for Training Neural Networks (2019): input-independent baseline, batch dependencies"
SAME_OUTPUTS_WITHIN = 1e-6  # of the outputs' size: what float32 rounds
MIXED = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class InputUsed(Result):
    """How far the outputs move with the inputs."""

    change: float = measured("largest change of an output when inputs are exchanged, over their size: before")
    fitted_change: float = measured("the same after one batch was fitted")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        most = max(self.change, self.fitted_change)
        if most > SAME_OUTPUTS_WITHIN:
            return Verdict(
                Level.OK,
                f"The outputs depend on the input: with another example's input they move by {format_number(most)} "
                "of their size.",
                source=SOURCE,
                confidence=Confidence.ARITHMETIC,
                value=most,
                threshold=SAME_OUTPUTS_WITHIN,
                threshold_source=OUR_CHOICE,
            )
        return Verdict(
            Level.ALARM,
            f"The network ignores its input: with the input of another example the outputs move by "
            f"{format_number(most)} of their size, before training and after one batch was fitted.",
            advice="Look for an input that is overwritten, zeroed or constant, and for layers whose output is "
            "multiplied by zero.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="Two different inputs that give clearly different outputs.",
            value=most,
            threshold=SAME_OUTPUTS_WITHIN,
            threshold_source=OUR_CHOICE,
            cause=Cause.INPUT_IGNORED,
            explained_by=(Cause.INPUTS_CONSTANT, Cause.UNITS_DEAD, Cause.INITIALIZATION_CONSTANT, Cause.NOT_FINITE),
        )

    def plot(self, ax: Any) -> None:
        """The change of the outputs, before and after fitting."""
        ax.bar(["before", "after fitting"], [self.change, self.fitted_change])
        ax.set(xlabel="one batch", ylabel="change of the outputs over their size")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExamplesApart(Result):
    """How far the answers to an example move with the others of its batch."""

    mixing: float = measured("largest change when the others are replaced, over the outputs' size")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        if self.mixing <= MIXED:
            return Verdict(
                Level.OK,
                "In evaluation mode the answer to an example does not depend on the others of its batch.",
                source=SOURCE,
                confidence=Confidence.ARITHMETIC,
                value=self.mixing,
                threshold=MIXED,
                threshold_source=OUR_CHOICE,
            )
        return Verdict(
            Level.WARNING,
            f"In evaluation mode, too, the answer to an example depends on the others of its batch: it moves by "
            f"{format_number(self.mixing)} of its size when they are replaced.",
            advice="Look for a reshape, a transpose, a softmax or a mean over the batch axis (or a "
            "normalisation that "
            "keeps no running statistics); where examples are meant to see each other, leave it.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="The same example alone and in a batch gives the same answer.",
            value=self.mixing,
            threshold=MIXED,
            threshold_source=OUR_CHOICE,
            cause=Cause.EXAMPLES_MIXED,
        )

    def plot(self, ax: Any) -> None:
        """How far the answers move."""
        ax.bar(["the others replaced"], [self.mixing])
        ax.set(xlabel="one batch", ylabel="change of an answer over its size")


@instrument(source=SOURCE, title="Use of the input", kind=Kind.CHECK)
def input_used(trial: Trial) -> InputUsed:
    """Whether the outputs change with the input, before training and after one batch was fitted.

    trial: what `diag.preflight` tried. Inputs of the batch's examples are exchanged in evaluation mode. Below 1e-6
    of the outputs' size both times it is an alarm. Raises nothing of its own.
    """
    known = not (math.isnan(trial.input_change) or math.isnan(trial.fitted_input_change))
    why = trial.unsure.get("input_change", "the network gives no number for each example")
    several = trial.examples > 1
    return InputUsed(
        change=trial.input_change,
        fitted_change=trial.fitted_input_change,
        preconditions=(
            Precondition("two examples", several, "the batch holds one example."),
            Precondition("an output for each example", known, f"{why}."),
        ),
    )


@instrument(source=SOURCE, title="Examples apart", kind=Kind.CHECK)
def examples_apart(trial: Trial) -> ExamplesApart:
    """Whether the answer to an example depends, in evaluation mode, on the other examples of its batch.

    trial: what `diag.preflight` tried. Judged only where every input has one row for each example. Above 1e-3 of
    the outputs' size it is a warning. Raises nothing of its own.
    """
    known = not math.isnan(trial.mixing)
    why = trial.unsure.get(
        "mixing", "inputs or outputs do not belong to single examples, so they may see each other"
    )
    return ExamplesApart(mixing=trial.mixing, preconditions=(Precondition("rows", known, f"{why}."),))
