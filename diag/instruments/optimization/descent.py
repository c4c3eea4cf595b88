"""Descent: whether the steps go down the loss or up, by the gradient that each was taken on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.instruments.optimization.course import finite_losses, thirds
from diag.ranges import Share
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the steps and their gradients"
UPWARDS = 0.05  # mean cosine
NEARLY_ALL = 0.9  # of the steps that were measured
MEASURED_STEPS, LOSSES_NEEDED = 10, 20
RISEN_BY = 4.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Descent(Result):
    """Of the last steps that were measured, at most 64."""

    cosine: float = measured(
        "cosine between a step and its gradient, their mean", remark="below zero: it goes down"
    )
    upwards: float = measured("steps along the gradient", unit="share")
    first_loss: float = measured("mean loss of the first third of the steps")
    last_loss: float = measured("mean loss of the last third")
    loss_rose: bool = measured("the last is above the first by more than four standard errors")
    cosines: NDArray[numpy.float64] = measured("the cosine of each step", shape="(steps,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = self.setting("alarm_above")
        verdict = graded(SOURCE, self.cosine, limit)
        cosine_text = f"(mean cosine {format_number(self.cosine)})"
        if not (self.cosine > limit and self.upwards >= NEARLY_ALL and self.loss_rose):
            return verdict(
                Level.OK,
                f"At {format_share(1 - self.upwards)} of the steps measured the weights move down their gradient "
                f"{cosine_text}.",
            )
        return verdict(
            Level.ALARM,
            f"Training goes up the loss: at {round(self.upwards * len(self.cosines)):,} of {len(self.cosines):,} "
            f"steps measured the optimizer moved the weights along the gradient and not against it "
            f"{cosine_text}, and "
            f"the loss rose from {format_number(self.first_loss)} to {format_number(self.last_loss)}.",
            advice="Look at the signs in the optimizer's step and at what changes the gradients before it.",
            confidence=Confidence.ARITHMETIC,
            refutation="What backward() is called on is meant to become large.",
            cause=Cause.LOSS_ASCENDED,
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """The cosine of each step."""
        ax.plot(self.cosines, marker="o", markersize=3, linewidth=0)
        ax.axhline(0, color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="step measured", ylabel="cosine with the gradient", ylim=(-1, 1))


@instrument(
    source=SOURCE,
    title="Descent",
    kind=Kind.CHECK,
    why="A step along the gradient makes the loss larger: no learning rate helps where a sign is wrong.",
    formula="cos(w' - w, g), both without their part along w",
)
def descent(history: History, loop: Loop, *, alarm_above: Share = UPWARDS) -> Descent:
    """Whether the optimizer's steps go down the loss that it is given the gradient of.

    history: the record of a watched run; loop: the facts of its loop, with the cosine between step and gradient at
    the steps at which the weights are compared. What happens along the weights themselves, as by decay, is left
    out. An alarm where nine tenths of at least ten steps go along the gradient, with a mean cosine above
    `alarm_above`, and the loss rose. Momentum carries single steps up. Raises nothing of its own.
    """
    cosines = numpy.array([c for c in loop.directions if math.isfinite(c)])
    losses, _ = finite_losses(history)
    enough = len(cosines) >= MEASURED_STEPS and len(losses) >= LOSSES_NEEDED
    first, last, error = thirds(losses) if enough else (math.nan,) * 3
    return Descent(
        cosine=float(cosines.mean()) if len(cosines) else math.nan,
        upwards=float((cosines > 0).mean()) if len(cosines) else 0.0,
        first_loss=first,
        last_loss=last,
        loss_rose=last - first > RISEN_BY * error,
        cosines=cosines,
        preconditions=(
            Precondition(
                "steps", enough, f"fewer than {MEASURED_STEPS} steps were measured, or {LOSSES_NEEDED} losses."
            ),
        ),
    )
