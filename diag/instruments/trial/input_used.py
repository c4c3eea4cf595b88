"""Whether the answers depend on the input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.external.trial import Trial

SOURCE = "Karpathy, A Recipe for Training Neural Networks (2019): input-independent baseline"
SAME_OUTPUTS_WITHIN = 1e-6  # of the outputs' size: what float32 rounds


@dataclass(frozen=True, kw_only=True, eq=False)
class InputUsed(Result):
    """How far the outputs move with the inputs."""

    change: float = measured("largest change of an output when inputs are exchanged, over their size: before")
    fitted_change: float = measured("the same after one batch was fitted")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        most = max(self.change, self.fitted_change)
        verdict = graded(SOURCE, most, SAME_OUTPUTS_WITHIN, confidence=Confidence.ARITHMETIC)
        if most > SAME_OUTPUTS_WITHIN:
            return verdict(
                Level.OK,
                f"The outputs depend on the input: with another example's input they move by {format_number(most)} "
                "of their size.",
            )
        return verdict(
            Level.ALARM,
            f"The network ignores its input: with the input of another example the outputs move by "
            f"{format_number(most)} of their size, before training and after one batch was fitted.",
            advice="Look for an input that is overwritten, zeroed or constant, and for layers whose output is "
            "multiplied by zero.",
            refutation="Two different inputs that give clearly different outputs.",
            cause=Cause.INPUT_IGNORED,
            explained_by=(
                Cause.INPUTS_CONSTANT, Cause.UNITS_DEAD, Cause.INITIALIZATION_CONSTANT, Cause.NOT_FINITE,
                Cause.GRADIENTS_VANISH, Cause.INITIALIZATION_SCALE, Cause.UNITS_SATURATED, Cause.INPUTS_TOO_SMALL,
                Cause.INPUTS_NOT_NORMALIZED, Cause.OUTPUT_CONSTANT,
            ),
        )  # fmt: skip

    def plot(self, ax: Any = None) -> Any:
        """The change of the outputs, before and after fitting."""
        ax.bar(["before", "after fitting"], [self.change, self.fitted_change])
        ax.set(xlabel="one batch", ylabel="change of the outputs over their size")


@instrument(
    source=SOURCE,
    title="Use of the input",
    kind=Kind.CHECK,
    why="A network whose answer does not change with its input can only learn the average.",
)
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
