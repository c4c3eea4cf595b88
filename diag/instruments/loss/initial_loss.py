"""The first loss: whether the network begins as unsure as it should be.

A classifier that knows nothing has the loss log K of K classes. One that begins far above is sure and wrong, and
its first steps go into unlearning that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.instruments.optimization.course import LAST_LOSSES, finite_losses, median
from diag.ranges import Threshold
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic: the loss of K equally likely classes is log K"
TIMES_GUESSING, NATS_ABOVE_GUESSING = 2.0, 1.0
SAME_LOSS_WITHIN = 1e-2
# In which a new head on trained layers comes below the loss of guessing, where nothing is wrong.
STEPS_TO_UNLEARN = 30


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialLoss(Result):
    """The first losses beside those of guesses, in nats."""

    first: float = measured("the first recorded loss", unit="nats")
    even: float = measured("log K, the loss of K equally likely classes", unit="nats")
    classes: int = measured("classes that the network can answer with")
    first_step: int = measured("the step of the first recorded loss")
    on_trained: bool = measured("layers that were trained before are a part of the network", default=False)
    last: float = measured("the median of the last losses", unit="nats", default=math.nan)
    num_steps: int = measured("steps recorded", unit="steps", default=0)

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = max(self.setting("times") * self.even, self.even + NATS_ABOVE_GUESSING)
        verdict = graded(SOURCE, self.first, limit)
        if self.first <= limit:
            return verdict(
                Level.OK,
                f"The first loss was {format_number(self.first)} nats; guessing evenly among {self.classes:,} "
                f"classes gives {format_number(self.even)}.",
            )
        if self.on_trained and (self.num_steps < STEPS_TO_UNLEARN or self.last < self.even):
            return self._of_a_new_head()
        return verdict(
            Level.WARNING,
            f"The network begins sure and wrong: its first loss is {format_number(self.first)} nats, where "
            f"guessing evenly among {self.classes:,} classes gives {format_number(self.even)}.",
            advice="Start the last layer's weights smaller (or at zero); check that inputs are normalised and that "
            "labels run from 0 to K - 1.",
            confidence=Confidence.ARITHMETIC,
            refutation="With a last layer that starts at zero the training goes no better.",
            cause=Cause.INITIAL_LOSS_HIGH,
            explained_by=(Cause.INPUTS_NOT_NORMALIZED, Cause.MISSING_VALUES_FILLED, Cause.INITIALIZATION_SCALE,
                          Cause.LOSS_SUMMED, Cause.TARGETS_SHIFTED, Cause.LOSS_TERM_DOMINATES, Cause.UNDERFITTING),
            step=self.first_step,
        )  # fmt: skip

    def _of_a_new_head(self) -> Verdict:
        """Features of trained layers are large, so that an ordinary new head is sure and wrong for some steps."""
        below = self.last < self.even
        return Verdict(
            Level.OK if below else Level.UNKNOWN,
            f"The first loss was {format_number(self.first)} nats, above that of guessing evenly among "
            f"{self.classes:,} classes ({format_number(self.even)}), as new layers on trained ones begin; "
            + (
                f"it is {format_number(self.last)} now."
                if below
                else "whether that is soon unlearned is not known."
            ),
            source=SOURCE,
        )

    def plot(self, ax: Any = None) -> Any:
        """The first loss beside that of guessing evenly."""
        ax.bar(["first loss", "log K"], [self.first, self.even])
        ax.set(xlabel="the run, and a network that knows nothing", ylabel="loss (nats)")


@instrument(
    source=SOURCE,
    title="First loss",
    kind=Kind.CHECK,
    before_training="always",
    why="A first loss far above that of guessing means that the network starts sure and wrong: the first "
    "steps go into unlearning, or something before the loss is broken.",
)
def initial_loss(
    history: History,
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    loop: Loop | None = None,
    *,
    times: Threshold = TIMES_GUESSING,
) -> InitialLoss:
    """Whether the first loss is that of a network which knows nothing.

    history: the record of a watched run from its start. logits (n, K), labels (n,), losses (m,): to see that the
    loss is the cross-entropy of K classes. loop: to see that it is a mean, as the sum over a batch begins far above
    log K however unsure the network is, and whether layers were trained before: of a new head on these, the
    warning waits for thirty steps and is not given where the loss has come below log K. A first loss above `times`
    log K (and one nat above it) is a warning. Raises nothing of its own.
    """
    own = float(F.cross_entropy(logits.double(), labels))
    mean = float(losses.double().mean())
    known, steps = finite_losses(history)
    began = len(known) > 0 and int(steps[0]) <= 3
    return InitialLoss(
        first=float(known[0]) if len(known) else math.nan,
        even=math.log(logits.shape[1]),
        classes=logits.shape[1],
        first_step=int(steps[0]) if len(known) else 0,
        on_trained=_on_trained_layers(loop),
        last=float(median(known[-LAST_LOSSES:])),
        num_steps=int(history.total_steps),
        preconditions=(
            Precondition(
                "cross-entropy",
                abs(mean - own) <= SAME_LOSS_WITHIN * max(abs(mean), 1.0),
                "the loss is not the cross-entropy of the logits.",
            ),
            Precondition("a mean", _is_mean(loop), "the recorded loss is not a mean over the examples."),
            Precondition("from the start", began, "the record does not begin with the training."),
        ),
    )


def _on_trained_layers(loop: Loop | None) -> bool:
    """Whether weights are frozen, or began with other numbers than an initialisation draws."""
    return loop is not None and any(w.fresh is False or not w.trainable for w in loop.start)


def _is_mean(loop: Loop | None) -> bool:
    """Whether no loss of the loop is known to be a sum, over examples or over the backward passes of a step, or to
    be multiplied (other than by a gradient scaler)."""
    if loop is None:
        return True
    multiplied = any(f.factor is not None and f.factor > 1 for f in loop.losses)
    divided = any(f.factor is not None and f.factor < 1 for f in loop.losses)
    summed = any(f.reduction == "sum" for f in loop.losses)
    summed |= not divided and any(o.passes > 1 for o in loop.training)
    return not summed and not (multiplied and not loop.scaling.scaled_losses)
