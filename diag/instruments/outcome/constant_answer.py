"""The best constant answer: whether training does better than saying the same whatever the input.

What the loss of the best constant answer is follows from the targets alone: the entropy of the class frequencies
for cross-entropy, that of the share of ones for binary targets, the variance for squared errors. It needs no pass
of the model and holds for tokens, pixels and regressions as for classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.linalg.student import error_of_mean
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History
from diag.snapshot.loop.asked import AskedFacts
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic: the loss of the best constant answer follows from the targets"
STEPS_BEFORE_CONSTANT_ANSWER, WHILE_TRAINING = 100, 300  # steps: once training has ended, and before
CALLS_OF_TARGETS_NEEDED, TARGETS_NEEDED = 6, 64
ERRORS_APART = 2.0
AS_GOOD = 0.02  # of the constant answer's loss: a difference that does not count
SHARP_ENOUGH = 0.1  # of the constant answer's loss, that two standard errors may be
STANDS_FOR = {
    "cross_entropy": "the class frequencies",
    "nll_loss": "the class frequencies",
    "binary_cross_entropy": "the share of ones",
    "binary_cross_entropy_with_logits": "the share of ones",
    "mse_loss": "the mean of the targets",
    "l1_loss": "the median of the targets",
}
NOT_BEHIND_IT = (Cause.LABELS_WRONG, Cause.OVERFITTING, Cause.SOFTMAX_ROUNDING, Cause.VECTOR_UNTRAINED)


@dataclass(frozen=True, kw_only=True, eq=False)
class ConstantAnswer(Result):
    """Of the second half of the recorded steps."""

    loss: float = measured("mean of the recorded training losses")
    loss_standard_error: float = measured("standard error of that mean, steps taken as independent")
    fallen: float = measured("by how much the mean of the last quarter of the steps is below the quarter before")
    fallen_standard_error: float = measured("standard error of that difference")
    constant_loss: float = measured("loss of the best answer that is the same for every input")
    constant_error: float = measured("standard error of it, from the targets that were read")
    steps_recorded: int = measured("steps recorded")
    answer: str = measured("what the best constant answer is")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return Verdict(Level.NOT_APPLICABLE, f"No verdict: {unmet.detail}", source=SOURCE)
        compared = f"{format_number(self.loss)}; one answer for all inputs ({self.answer}) has "
        compared += f"{format_number(self.constant_loss)}"
        if not (self._no_better() and self._sharp() and self._stands()):
            return Verdict(
                Level.OK,
                f"The training loss is {compared}.",
                source=SOURCE,
                confidence=Confidence.ARITHMETIC,
                value=self.loss,
                threshold=self.constant_loss,
            )
        worse = self.loss - self._error() > self.constant_loss
        than = "worse than" if worse else "hardly better than"
        return Verdict(
            Level.WARNING,
            f"After {self.steps_recorded:,} steps the training loss is {than} without looking at the "
            f"inputs, and it hardly falls any more: it is {compared}.",
            advice="Fit a single batch first (diag.preflight does): if that fails the network or the optimizer is "
            "at fault, if it works look at ten inputs with their targets as the loop sees them.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            refutation="The loss falls below that of the constant answer when training goes on.",
            value=self.loss,
            threshold=self.constant_loss,
            threshold_source="the loss of the best constant answer, less 2 %",
            cause=Cause.WORSE_THAN_TRIVIAL,
            # A network that is as good as a constant has unlearned what it was sure of at the start.
            explained_by=tuple(
                c for c in Cause if c not in NOT_BEHIND_IT and (worse or c is not Cause.INITIAL_LOSS_HIGH)
            ),
            step=self.steps_recorded,
        )

    def _error(self) -> float:
        return ERRORS_APART * math.hypot(self.loss_standard_error, self.constant_error)

    def _no_better(self) -> bool:
        return self.loss >= (1 - AS_GOOD) * self.constant_loss

    def _sharp(self) -> bool:
        surely = self.loss - self._error() >= (1 - AS_GOOD) * self.constant_loss
        return surely or self._error() <= SHARP_ENOUGH * self.constant_loss

    def _stands(self) -> bool:
        return self.fallen <= max(ERRORS_APART * self.fallen_standard_error, AS_GOOD / 4 * self.constant_loss)

    def plot(self, ax: Any = None) -> Any:
        """The training loss beside that of the constant answer."""
        ax.bar(["training", self.answer or "constant answer"], [self.loss, self.constant_loss])
        ax.set(xlabel="answer", ylabel="loss")


@instrument(
    source=SOURCE,
    title="Constant answer",
    kind=Kind.CHECK,
    why="A loss that is no better than one fixed answer means that nothing of the input has been used yet, "
    "although it may have fallen a lot.",
)
def constant_answer(history: History, loop: Loop) -> ConstantAnswer:
    """Whether the training loss is below that of the best answer that is the same for every input.

    Compared are the recorded losses of the second half of the steps with the loss of the class frequencies (entropy
    of the labels, nats), of the share of ones, or of the targets' mean (their variance), from the targets of the
    batches that were looked at. A warning after a hundred steps (three hundred while training lasts) where it is
    not below by two per cent, two standard errors are at most ten, and the loss hardly falls any more. Judged for
    a loss of torch that is the mean of one call and all that backward() is called on, unweighted (or the loop's own
    mean of squared or absolute differences between outputs and targets), and where one optimizer steps (of two
    networks against each other neither need win). Raises nothing of its own.
    """
    known, needed = targets_of_the_loss(loop), STEPS_BEFORE_CONSTANT_ANSWER if loop.ended else WHILE_TRAINING
    losses = history.loss[numpy.isfinite(history.loss)]
    half = losses[len(losses) // 2 :]
    quarters = half[: len(half) // 2], half[len(half) // 2 :]
    errors = [error_of_mean(torch.from_numpy(q)) if len(q) > 1 else math.nan for q in (half, *quarters)]
    return ConstantAnswer(
        loss=float(half.mean()) if len(half) else math.nan,
        loss_standard_error=errors[0],
        fallen=float(quarters[0].mean() - quarters[1].mean()) if len(quarters[0]) else math.nan,
        fallen_standard_error=math.hypot(*errors[1:]),
        constant_loss=known.constant_loss if known else math.nan,
        constant_error=known.constant_error if known else math.nan,
        steps_recorded=len(losses),
        answer=_stands_for(known.function, loop) if known else "",
        preconditions=(
            Precondition(
                "a loss whose constant answer is known",
                known is not None,
                "the loss is not one plain mean of torch, or its targets were not read.",
            ),
            Precondition(
                "steps",
                len(losses) >= needed,
                f"fewer than {needed} losses.",
            ),
        ),
    )


def _stands_for(function: str, loop: Loop) -> str:
    """What the best constant answer is; where a row's own partner is asked for, there are no classes."""
    return "no preference among the candidates" if loop.contrast.looks else STANDS_FOR.get(function, "")


def targets_of_the_loss(loop: Loop) -> AskedFacts | None:
    """The targets of the one loss that training descends, with the loss of the best constant answer to them; None
    where there are several losses, or that is not known."""
    descended = [f for f in loop.losses if (f.root and f.factor == 1) or f.like]
    stepping = [o for o in loop.optimizers if o.steps and not o.nested]
    one = len(descended) == len(loop.training) == len(loop.losses) == len(stepping) == 1
    if not one or any(o.passes > 1 or o.foreign for o in loop.training):
        return None
    asked = [f for f in loop.asked if f.function == (descended[0].like or descended[0].function)]
    fit = [
        f for f in asked if f.looked >= CALLS_OF_TARGETS_NEEDED and f.targets >= TARGETS_NEEDED and not f.weighted
    ]
    return next((f for f in fit if f.constant_loss > 0), None)
