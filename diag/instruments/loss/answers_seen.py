"""Answers seen: whether a model that is asked for the next token can look at it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diag.display import format_share
from diag.instruments.causes import Cause
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.inside.later import LaterTokens
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of two forward passes, and of the targets beside the inputs"
ROUNDING_OF_OUTPUTS = 1e-2  # of the outputs' spread; half precision may round two batches differently
NEXT_POSITION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswersSeen(Result):
    """On at most eight rows of the probe set."""

    change: float = measured("change of the outputs by later tokens, over the outputs' spread", unit="share")
    positions: int = measured("length of the sequences")
    compared: int = measured("batches whose targets were all the next token")
    in_training: float = measured(
        "the same change in training mode",
        remark="NaN where that was not tried or chance changes the outputs",
        unit="share",
    )

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        if not self.change > ROUNDING_OF_OUTPUTS and self.in_training > ROUNDING_OF_OUTPUTS:
            return self._in_training_alone()
        if not self.change > ROUNDING_OF_OUTPUTS:
            return Verdict(
                Level.OK,
                "What the model says of a position does not depend on later tokens.",
                source=SOURCE,
                confidence=Confidence.ARITHMETIC,
                value=self.change,
                threshold=ROUNDING_OF_OUTPUTS,
            )
        return Verdict(
            Level.ALARM,
            "The model can look at what it is asked for: each target is the next token of the input, and what the "
            f"model says of a position changes with later tokens (by {format_share(self.change)} of its spread).",
            advice="Mask what comes later in every attention (is_causal=True, or tgt_mask), and look for "
            "pooling or normalisation over positions.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="Outputs before a position that stay the same when the tokens from it on are others.",
            value=self.change,
            threshold=ROUNDING_OF_OUTPUTS,
            cause=Cause.ANSWER_IN_INPUT,
            step=1,
        )

    def _in_training_alone(self) -> Verdict:
        return Verdict(
            Level.ALARM,
            "The model can look at what it is asked for, in training alone: each target is the next token of the "
            "input, and what the model says of a position changes with later tokens in training mode (by "
            f"{format_share(self.in_training)} of its spread) and not in evaluation mode.",
            advice="Make the causal mask whatever the mode is: look for self.training, or a flag that evaluation "
            "sets, where the mask is made.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="Outputs before a position that stay the same in training mode when the tokens from it on "
            "are others.",
            value=self.in_training,
            threshold=ROUNDING_OF_OUTPUTS,
            cause=Cause.ANSWER_IN_INPUT,
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """The change by later tokens."""
        ax.bar(["change"], [self.change])
        ax.set(xlabel="outputs, when later tokens are others", ylabel="change over their spread")


@instrument(
    source=SOURCE,
    title="Answers seen",
    kind=Kind.CHECK,
    why="A model that can read the answer learns to copy it: its training loss looks excellent, and it can "
    "do nothing where the answer is not there.",
)
def answers_seen(later_tokens: LaterTokens, loop: Loop) -> AnswersSeen:
    """Whether a model that is asked for the next token can look at it.

    later_tokens: what becomes of the outputs of the first half of a sequence when the tokens of the second half are
    others (`diag.snapshot.inside.later`). loop: the facts of the loop, which say that the targets are the next
    tokens of the input. Where both hold it is an alarm, also where it is so in training mode alone. Raises nothing
    of its own.
    """
    compared = loop.targets.shifts.get(NEXT_POSITION, 0)
    asked = compared > 0 and compared == max(loop.targets.shifts.values())
    return AnswersSeen(
        change=later_tokens.change,
        in_training=math.nan if loop.modes.root else later_tokens.in_training,
        positions=later_tokens.positions,
        compared=compared,
        preconditions=(
            Precondition("next tokens", asked, "the targets were not seen to be the next tokens of the input."),
        ),
    )
