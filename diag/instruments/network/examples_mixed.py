"""Examples of a batch that see each other: an axis that was taken for another one mixes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Result, Verdict, measured
from diag.snapshot.inside.apart import OtherExamples

SOURCE = "Karpathy, A Recipe for Training Neural Networks (2019): use backprop to chart dependencies"
MOVED = 1e-2  # of the outputs' size; a softmax or a matrix product of another shape rounds far below


@dataclass(frozen=True, kw_only=True, eq=False)
class ExamplesMixed(Result):
    """In evaluation mode."""

    mixing: float = measured("largest change of an answer when the other examples are replaced, over its size")
    examples: int = measured("examples tried together")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        if not self.mixing > MOVED:
            return Verdict(
                Level.OK,
                "The answer to an example does not depend on the others of its batch.",
                source=SOURCE,
                confidence=Confidence.ARITHMETIC,
                value=self.mixing,
                threshold=MOVED,
                threshold_source=OUR_CHOICE,
            )
        return Verdict(
            Level.WARNING,
            "The answer to an example depends on the others of its batch, in evaluation mode, too: it moves by "
            f"{format_number(self.mixing)} of its size when they are replaced.",
            advice="Look for a reshape, a transpose, a softmax or a mean over the batch axis, and for a recurrent "
            "layer without batch_first=True; where examples are meant to see each other, leave it.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="The same example alone and in a batch gives the same answer.",
            value=self.mixing,
            threshold=MOVED,
            threshold_source=OUR_CHOICE,
            cause=Cause.EXAMPLES_MIXED,
            step=1,
        )

    def plot(self, ax: Any) -> None:
        """How far the answers move."""
        ax.bar(["the others replaced"], [self.mixing])
        ax.set(xlabel="a few examples", ylabel="change of an answer over its size")


@instrument(source=SOURCE, title="Examples mixed", kind=Kind.CHECK)
def examples_mixed(other_examples: OtherExamples) -> ExamplesMixed:
    """Whether the answer to an example depends, in evaluation mode, on the other examples of its batch.

    other_examples: what became of the answers to the first and the last of a few examples when all others were
    replaced by it (`diag.snapshot.inside.apart`). Above 1e-2 of the outputs' size it is a warning: networks that
    compare the examples of a batch by design exist. Raises nothing of its own.
    """
    return ExamplesMixed(mixing=other_examples.mixing, examples=other_examples.examples)
