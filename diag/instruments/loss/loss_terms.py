"""Terms of the loss: whether a penalty on the weights outweighs the loss, so that training only shrinks them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.instruments.optimization.course import SMALL, median
from diag.ranges import Threshold
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic: what is descended, less the loss function's value"
PENALTY_OVER_LOSS = 3.0
NORM_KEPT = 0.5  # of the norm of the weights at the start
FIRST_LOOKS = 3  # looks


@dataclass(frozen=True, kw_only=True, eq=False)
class LossTerms(Result):
    """The penalty is the sum of the terms that depend on weights and on none of the model's outputs."""

    penalty: float = measured("the penalty in the first backward passes looked at, their median")
    loss: float = measured("the loss function's value beside it")
    last_penalty: float = measured("the penalty at the last look")
    last_loss: float = measured("the loss function's value at the last look")
    kept: float = measured("norm of the weights over that at the start, the median tensor", unit="share")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = self.setting("times") * abs(self.loss)
        verdict = graded(SOURCE, self.penalty, limit)
        if not (self.penalty > limit and self.kept < NORM_KEPT):
            return verdict(
                Level.OK,
                f"The penalty on the weights ({format_number(self.penalty)} beside a loss of "
                f"{format_number(self.loss)}) leaves them at {format_share(self.kept)} of their norm.",
            )
        return verdict(
            Level.ALARM,
            f"A penalty on the weights outweighs the loss: it was {format_number(self.penalty)} where the loss was "
            f"{format_number(self.loss)}, and the weights have shrunk to {format_share(self.kept)} of their first "
            "norm.",
            advice="Lower the penalty's factor a hundred- to a thousandfold, and look at whether a mean or "
            "a sum over the weights is meant; or use the optimizer's weight decay.",
            confidence=Confidence.ARITHMETIC,
            refutation="Without the penalty the weights shrink as far.",
            cause=Cause.LOSS_TERM_DOMINATES,
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """The two parts of what is descended, first and last."""
        ax.bar(["penalty", "loss"], [self.penalty, self.loss], alpha=0.5, label="first")
        ax.bar(["penalty", "loss"], [self.last_penalty, self.last_loss], width=0.4, label="last")
        ax.set(xlabel="part of what is descended", ylabel="value")
        ax.legend(fontsize=7, frameon=False)


@instrument(
    source=SOURCE,
    title="Terms of the loss",
    kind=Kind.CHECK,
    why="Where a penalty outweighs the loss, the training mostly shrinks weights and hardly learns the task.",
)
def loss_terms(history: History, loop: Loop, *, times: Threshold = PENALTY_OVER_LOSS) -> LossTerms:
    """Whether a penalty on the weights outweighs the loss.

    history: the record of a watched run. loop: the facts of its loop, with the value of the terms that depend on
    the weights and not on the model's outputs. An alarm where in the first backward passes they were above `times`
    the loss function's value, and the median tensor (of at least 64 entries) has since lost half of its
    norm. A large penalty that leaves the weights their size is none. Raises nothing of its own.
    """
    facts = loop.penalty
    seen = len(facts.steps) > 0
    return LossTerms(
        penalty=float(numpy.median(facts.penalties[:FIRST_LOOKS])) if seen else math.nan,
        loss=float(numpy.median(facts.losses[:FIRST_LOOKS])) if seen else math.nan,
        last_penalty=facts.penalties[-1] if seen else math.nan,
        last_loss=facts.losses[-1] if seen else math.nan,
        kept=_kept(history),
        preconditions=(Precondition("a penalty", seen, "no term on the weights alone was seen beside the loss."),),
    )


def _kept(history: History) -> float:
    """The norm at the last step at which it was taken over that at the first, the median of the large tensors."""
    norms = numpy.asarray(history.parameter_norm[:, numpy.asarray(history.sizes) >= SMALL], float)
    rows = numpy.flatnonzero(numpy.isfinite(norms).any(1)) if norms.size else numpy.zeros(0, int)
    if len(rows) < 2:
        return math.nan
    with numpy.errstate(divide="ignore", invalid="ignore"):
        course = norms[rows[-1]] / norms[rows[0]]
    return float(median(numpy.where(numpy.isfinite(course), course, numpy.nan)))
