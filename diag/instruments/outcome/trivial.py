"""The trivial predictor: whether the network does better than answering with the class frequencies.

A network that learns anything from its inputs beats the entropy of the labels, which is the loss of one that knows
the class frequencies and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.instruments.data.label_order import in_order
from diag.linalg.student import error_of_mean
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "arithmetic: the entropy of the labels is the loss of the class frequencies"
STEPS_BEFORE_TRIVIAL = 100  # steps
ERRORS_BELOW_ENTROPY = 2.0
LOSS_STILL_FALLING = 0.8  # of the loss at the look before: a network that is worse yet is on its way
CROSS_ENTROPY_WITHIN = 1e-2
# What a network that learns nothing may be the consequence of: whatever was found is a better answer than this.
EXPLAINED_BY = tuple(
    c
    for c in Cause
    if c not in (Cause.WORSE_THAN_TRIVIAL, Cause.OVERFITTING, Cause.SOFTMAX_ROUNDING, Cause.VECTOR_UNTRAINED)
)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrivialPredictor(Result):
    """In nats; of the examples measured."""

    loss: float = measured("mean cross-entropy of the network", unit="nats")
    loss_standard_error: float = measured("standard error of that mean", unit="nats")
    entropy: float = measured("entropy of the labels: the loss of the class frequencies", unit="nats")
    classes: int = measured("classes that occur")
    examples: int = measured("examples")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        return Verdict(
            Level.UNKNOWN if self._no_better() else Level.OK,
            f"The loss is {format_number(self.loss)} nats; answering with the class frequencies gives "
            f"{format_number(self.entropy)}.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            value=self.loss,
            threshold=self.entropy,
        )

    def _no_better(self) -> bool:
        return self.loss >= self.entropy - ERRORS_BELOW_ENTROPY * self.loss_standard_error

    def _worse(self) -> bool:
        return self.loss > self.entropy + ERRORS_BELOW_ENTROPY * self.loss_standard_error

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """A warning where a hundred steps and more have not brought the loss below that of the class
        frequencies."""
        step, last = series[-1]
        if last.unmet() is not None or step < STEPS_BEFORE_TRIVIAL or not all(r._no_better() for _, r in series):
            return last.verdict()
        if len(series) > 1 and last._worse() and last.loss < LOSS_STILL_FALLING * series[-2][1].loss:
            return last.verdict()
        return Verdict(
            Level.WARNING,
            f"After {step:,} steps the network does not do measurably better than an answer with how often each "
            f"class occurs: its loss is {format_number(last.loss)} nats, with a standard error of "
            f"{format_number(last.loss_standard_error, 2)}, and class frequencies give "
            f"{format_number(last.entropy)}.",
            advice="Try to overfit one batch: if that fails, look at the loss and the network; if it works, "
            "look at ten examples with their labels as the loop sees them.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="A loss below that of the class frequencies on the same examples.",
            value=last.loss,
            threshold=last.entropy,
            threshold_source="the entropy of the labels, less two standard errors",
            cause=Cause.WORSE_THAN_TRIVIAL,
            # A network that is as good as class frequencies has unlearned what it was sure of at the start.
            explained_by=tuple(c for c in EXPLAINED_BY if last._worse() or c is not Cause.INITIAL_LOSS_HIGH),
            step=step,
        )

    def plot(self, ax: Any = None) -> Any:
        """The network's loss beside that of the class frequencies."""
        ax.bar(["network", "class frequencies"], [self.loss, self.entropy])
        ax.set(xlabel="predictor", ylabel="loss (nats)")


@instrument(
    source=SOURCE,
    title="Trivial predictor",
    kind=Kind.CHECK,
    why="A network that is no better than always answering with the class frequencies has not learned to "
    "use its input.",
)
def trivial_predictor(logits: Tensor, labels: Tensor, losses: Tensor) -> TrivialPredictor:
    """Whether the network does better than answering with the class frequencies.

    logits (n, K), labels (n,), losses (n,): where the loss is the cross-entropy of the logits. Compared is the mean
    loss with the entropy of the labels' frequencies in the same examples, in nats. A warning in a training of a
    hundred steps and more that never did better, unless it is worse and has a loss below four fifths of that at the
    look before; it follows from whatever else was found. Raises nothing of its own.
    """
    own = F.cross_entropy(logits.double(), labels, reduction="none")
    mean = float(losses.double().mean())
    counts = torch.bincount(labels).double()
    shares = counts[counts > 0] / len(labels)
    enough = len(labels) >= 10 * len(shares) and len(shares) > 1
    is_cross_entropy = len(losses) == len(own) and abs(mean - float(own.mean())) <= CROSS_ENTROPY_WITHIN * max(
        abs(mean), 1.0
    )
    return TrivialPredictor(
        loss=mean,
        loss_standard_error=error_of_mean(losses),
        entropy=float(-(shares * shares.log()).sum()),
        classes=len(shares),
        examples=len(labels),
        preconditions=(
            Precondition("cross-entropy", is_cross_entropy, "the loss is not the cross-entropy of the logits."),
            Precondition("random order", not in_order(labels), "the labels come one class after the other."),
            Precondition("examples", enough, "there are fewer than ten examples of a class, or one class only."),
        ),
    )
