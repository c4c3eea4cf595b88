"""Weight decay: whether it shrinks the weights faster than gradients rebuild them.

Decoupled decay multiplies the weights by 1 - lr * decay at every step, coupled decay does so through the gradient.
In balance the norms settle; a norm that keeps falling while the loss does not is decay that has won.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.instruments.optimization.course import SMALL, finite_losses, median, unpushed
from diag.ranges import Share
from diag.registry import Kind, instrument
from diag.result import Level, Result, Verdict, measured
from diag.snapshot.history import History, by_rows

SOURCE = "arithmetic of the recorded norms"
SHRUNK, NEARLY_GONE = 0.5, 0.1
LOST = 0.1
# Decay that is a part of the gradient pulls towards a minimum of loss and penalty together. A penalty that is a
# small part of the loss does not outweigh it; in Adam it moves the weights all the same where their own gradient
# is none.
PENALTY = 0.2
SCALED_WITH_THE_LOSS = ("Adam", "NAdam", "RAdam", "Adagrad", "Adadelta", "Adamax", "RMSprop", "Rprop", "ASGD")


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightDecay(Result):
    """Norms are of tensors with at least 64 entries; NaN: not observed."""

    decay: float = measured("the optimizer's weight decay, the largest of its groups")
    kept: float = measured("norm of the weights at the end over that at the start, the median tensor", unit="share")
    loss_lost: float = measured("how much of its fall the loss has given back since its best tenth", unit="share")
    loss_fall: float = measured("best median loss of a tenth of the record, as a fall from the first", unit="share")
    penalty: float = measured(
        "half the decay times the squared norm of the weights at the start, over the first loss",
        remark="NaN: not a part of the gradient",
    )
    pushed: bool = measured("the gradient of a typical tensor was not zero at a typical step")
    num_steps: int = measured("steps recorded", unit="steps")
    steps: NDArray[numpy.int64] = measured("the steps measured", shape="(steps,)")
    norms: NDArray[numpy.float64] = measured("norm over that at the start, the median tensor", shape="(steps,)")

    def verdict(self) -> Verdict:
        if not self.decay > 0 or not math.isfinite(self.kept):
            return Verdict(Level.NOT_APPLICABLE, "The optimizer has no weight decay.", source=SOURCE)
        shrunk = self.kept < self.setting("shrunk")
        if shrunk and not self.pushed:
            return self._alone("the gradient of a typical layer is zero")
        if shrunk and self.penalty < PENALTY:
            share = format_share(self.penalty)
            return self._alone(f"its penalty was {share} of the first loss, and gradients were smaller still")
        unlearned = self.loss_lost > LOST or self.loss_fall < LOST
        if shrunk and (unlearned or self.kept < NEARLY_GONE):
            return self._won()
        return self._graded(
            Level.OK,
            f"Weight decay leaves the weights at {format_share(self.kept)} of the norm that they began with.",
        )

    @property
    def _graded(self) -> partial[Verdict]:
        return graded(SOURCE, self.kept, self.setting("shrunk"))

    def _alone(self, why: str) -> Verdict:
        """Decay moves the weights because nothing else does: the checks of the gradients find what is wrong."""
        return self._graded(
            Level.DESCRIPTION,
            f"Weight decay has brought a typical layer to {format_share(self.kept)} of the norm that it began "
            f"with, and that is not the decay's strength: {why}.",
        )

    def _won(self) -> Verdict:
        course = (
            f"the loss has given back {format_share(min(self.loss_lost, 1.0))} of what it had gained"
            if self.loss_lost > LOST
            else f"the loss has fallen by {format_share(max(self.loss_fall, 0.0))} at best"
            if math.isfinite(self.loss_fall)
            else "the loss is not known to have gained by it"
        )
        return self._graded(
            Level.ALARM if self.kept < NEARLY_GONE else Level.WARNING,
            f"Weight decay ({format_number(self.decay)}) is shrinking the weights: a typical layer has "
            f"{format_share(self.kept)} of the norm that it began with, and {course}.",
            advice="Lower the weight decay tenfold; leave biases, norms and embeddings out of it.",
            refutation="Without weight decay the norms fall as far.",
            cause=Cause.WEIGHT_DECAY_TOO_STRONG,
            explained_by=(Cause.LOSS_TERM_DOMINATES, Cause.GRADIENT_UNDERFLOW),
        )

    def plot(self, ax: Any = None) -> Any:
        """The norm of the median tensor over the steps."""
        ax.semilogx(self.steps, self.norms, marker="o", markersize=3)
        ax.set(xlabel="step", ylabel="norm over the start's", ylim=(0, None))


@instrument(
    source=SOURCE,
    title="Weight decay",
    kind=Kind.CHECK,
    before_training="with optimizer",
    why="Where decay shrinks the weights faster than gradients rebuild them, the network forgets while it learns.",
    formula="|W(T)| / |W(1)| of a tensor; the median over tensors",
)
def weight_decay(history: History, *, shrunk: Share = SHRUNK) -> WeightDecay:
    """Whether weight decay shrinks the weights faster than gradients rebuild them.

    history: the record of a watched run. It alarms where the median tensor (of at least 64 entries) has less than
    `shrunk` of its first norm and the loss shows it: it has not fallen, or has given back a tenth of its fall.
    Weights that shrink while the loss keeps falling are regularised, as in a long training with decay; where
    gradients are zero, or an adaptive optimizer scales up a penalty that is a small part of the loss, decay only
    moves what nothing else does, and no cause is named. Raises nothing of its own.
    """
    large = numpy.asarray(history.sizes) >= SMALL
    rows = by_rows(history, lambda part: numpy.isfinite(part.parameter_norm[:, large]).any(1))
    medians = _over_first(history, large, int(rows.argmax()))[rows] if rows.any() else numpy.zeros(0)
    losses, _ = finite_losses(history)
    fell, lost = _fall_and_loss(losses)
    groups = history.optimizer.get("groups", ())
    return WeightDecay(
        decay=max([float(g.get("weight_decay") or 0.0) for g in groups], default=math.nan),
        kept=float(medians[-1]) if len(medians) > 1 else math.nan,
        loss_lost=lost,
        loss_fall=fell,
        penalty=_penalty(history, losses, groups),
        pushed=not unpushed(history),
        num_steps=int(history.total_steps),
        steps=numpy.asarray(history.steps[rows])[-512:],
        norms=medians[-512:],
    )


def _over_first(history: History, large: NDArray[Any], row: int) -> NDArray[numpy.float64]:
    """The median over the tensors of each row's norms over those of the given row."""
    first = numpy.asarray(history.parameter_norm[row, large], float)

    def medians(part: History) -> NDArray[numpy.float64]:
        with numpy.errstate(divide="ignore", invalid="ignore"):
            course = part.parameter_norm[:, large] / first
        course[~numpy.isfinite(course)] = numpy.nan
        return numpy.asarray(median(course, axis=1))

    return by_rows(history, medians)


def _fall_and_loss(losses: NDArray[numpy.float64]) -> tuple[float, float]:
    """The best tenth's median loss as a fall from the first tenth's, and how much of that fall was given back."""
    if len(losses) < 20:
        return math.nan, math.nan
    tenths = [float(median(part)) for part in numpy.array_split(losses, 10)]
    first, best, last = tenths[0], min(tenths), tenths[-1]
    first = max(first, float(losses[0]))
    fell = (first - best) / abs(first) if first else math.nan
    return fell, (last - best) / (first - best) if first > best else math.nan


def _penalty(history: History, losses: NDArray[numpy.float64], groups: Any) -> float:
    """The penalty of the first recorded weights over the first loss, where the optimizer scales its gradient as it
    does the loss's; NaN for others."""
    decays = {float(g.get("weight_decay") or 0.0) for g in groups}
    if (
        history.optimizer.get("kind") not in SCALED_WITH_THE_LOSS
        or len(decays) != 1
        or not len(losses)
        or not losses[0] > 0
    ):
        return math.nan
    squares = by_rows(history, lambda part: numpy.nansum(numpy.square(part.parameter_norm, dtype=float), axis=1))
    seen = numpy.flatnonzero(squares > 0)
    return float(decays.pop() / 2 * squares[seen[0]] / losses[0]) if len(seen) else math.nan
