"""Examples of a batch that see each other: an axis that was taken for another one mixes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diag.display import format_share
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Result, Verdict, measured
from diag.snapshot.inside.apart import OtherExamples

SOURCE = "Karpathy, A Recipe for Training Neural Networks (2019): use backprop to chart dependencies"
MOVED = 1e-3  # of the outputs' size; what is compared are calls of one shape, so that rounding is far below


@dataclass(frozen=True, kw_only=True, eq=False)
class ExamplesMixed(Result):
    """In evaluation mode."""

    mixing: float = measured("largest change of an answer when the other examples are replaced, over its size")
    examples: int = measured("examples tried together")
    order: float = measured(
        "largest change of an answer when the examples come in another order",
        remark="NaN: not tried",
        default=math.nan,
    )

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        most = self.mixing if math.isnan(self.order) else max(self.mixing, self.order)
        judged = graded(SOURCE, most, MOVED, confidence=Confidence.ARITHMETIC)
        if not most > MOVED:
            return judged(Level.OK, "The answer to an example does not depend on the others of its batch.")
        others, moved = "on the others of its batch", "they are replaced"
        advice = (
            "Look for a reshape, a transpose, a softmax or a mean over the batch axis, a recurrent layer "
            "without batch_first=True, or a normalisation that keeps no running statistics"
        )
        if not self.mixing > MOVED:
            others, moved = "on its place in the batch", "the examples come in another order"
            advice = (
                "Look for positions that are added along the batch axis (pe[: x.size(0)] where the batch is "
                "first), and for rows that are sorted and not brought back in order"
            )
        return judged(
            Level.WARNING,
            f"The answer to an example depends {others}, in evaluation mode, too: it changes by "
            f"{format_share(most)} of its size when {moved}.",
            advice=f"{advice}; where examples are meant to see each other, leave it.",
            refutation="The same example alone and in a batch gives the same answer.",
            cause=Cause.EXAMPLES_MIXED,
            explained_by=(Cause.AXES_MIXED, Cause.WRONG_CLASS_AXIS),
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """How far the answers move."""
        ax.bar(["the others replaced", "another order"], [self.mixing, self.order])
        ax.set(xlabel="a few examples", ylabel="change of an answer over its size")


@instrument(
    source=SOURCE,
    title="Examples mixed",
    kind=Kind.CHECK,
    before_training="always",
    why="Where an answer depends on who else is in the batch, the numbers of an evaluation change with its "
    "batch size and its order, and single predictions cannot be trusted.",
)
def examples_mixed(other_examples: OtherExamples) -> ExamplesMixed:
    """Whether the answer to an example depends, in evaluation mode, on the other examples of its batch.

    other_examples: what became of the answers to the first and the last of a few examples when all others were
    replaced by it, and of all answers when the examples came in another order (`diag.snapshot.inside.apart`). Above
    1e-3 of the outputs' size it is a warning: networks that compare the examples of a batch by design exist. Raises
    nothing of its own.
    """
    return ExamplesMixed(mixing=other_examples.mixing, examples=other_examples.examples, order=other_examples.order)
