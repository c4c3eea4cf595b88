"""Divergence: whether the loss left for good, and what at that moment speaks for which cause."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_number
from diag.instruments.causes import LOSES_THE_LOSS, Cause
from diag.instruments.graded import graded
from diag.instruments.optimization.course import finite_losses, median
from diag.ranges import Times
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Result, Verdict, measured
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the recorded losses"
LOSS_RATIO = 5.0
RECENT_LOSSES = 5
OF_THEIR_VARIANCE = 0.25  # a loss below is far better than any constant answer
FELL, STEEPER = 1000.0, 30.0  # times the size of the first losses, and of the first gradients
UNDIMINISHED = 0.9  # fall of the last third of the losses over that of the third before
HIGH_MOMENTUM, SWUNG = 0.99, 2.0  # with such a momentum, a loss of twice its first value has been carried there
AFTER_DIVERGENCE = (
    "Lower the learning rate tenfold and warm it up; look at the batch of that step; clip the gradient."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Divergence(Result):
    """Losses as recorded; NaN: not observed."""

    first: float = measured("the first loss")
    best: float = measured("the lowest median of five consecutive losses")
    last: float = measured("the median of the last five losses", remark="infinite where they were not finite")
    peak: float = measured("the highest median of five consecutive losses")
    left_at: int = measured("the step from which the loss stayed above the limit", remark="0 where it did not")
    lost_at: int = measured("the step from which no loss was finite", remark="0 where the last one is", default=0)
    momentum: float = measured("the optimizer's momentum, or Adam's first beta")
    num_steps: int = measured("steps recorded", unit="steps")
    fell_to: float = measured(
        "the lowest loss where it fell without end, below zero", remark="else NaN", default=math.nan
    )
    spread: float = measured(
        "standard deviation of the targets of late, where it has grown manyfold",
        remark="else NaN",
        default=math.nan,
    )
    sides: int = measured("optimizers that descend losses of their own", remark="0: there is one loss", default=0)
    steeper: bool = measured("gradients are many times as large as the first", default=True)
    in_turn: int = measured("loss functions of which each step descends one", remark="0: one", default=0)
    of_policy: bool = measured("it holds a policy gradient, whose size measures nothing", default=False)
    fell_at: int = measured("the step from which it was further below zero than any loss before", default=0)
    steps: NDArray[numpy.int64] = measured("the steps shown", shape="(steps,)")
    losses: NDArray[numpy.float64] = measured("their losses", shape="(steps,)")

    def verdict(self) -> Verdict:
        if self.sides and math.isfinite(self.last):
            return self._of_a_game()
        if self.in_turn and math.isfinite(self.last):
            return self._of_losses_in_turn()
        if self.of_policy and math.isfinite(self.last):
            return self._of_policy()
        if self.fell_at:
            return self._fell()
        if not self.first > 0:
            return Verdict(
                Level.NOT_APPLICABLE,
                "The loss does not begin above zero, so that nothing can be said about its growth.",
                source=SOURCE,
            )
        limit = self.setting("times")
        if self.last < OF_THEIR_VARIANCE * self.spread**2:
            return self._of_moving_targets()
        if self.left_at or (self.peak > SWUNG * self.first and self.momentum >= HIGH_MOMENTUM):
            return self._left(limit)
        higher = self.last > self.first
        return graded(SOURCE, self.last / self.first, limit)(
            Level.UNKNOWN if higher else Level.OK,
            f"The loss began at {format_number(self.first)} and is at {format_number(self.last)}, "
            + (f"higher, but by less than {limit:g} times." if higher else "which is not higher."),
        )

    def _of_a_game(self) -> Verdict:
        """Where one side's loss rises because the other wins, there is no divergence."""
        return Verdict(
            Level.UNKNOWN,
            f"Whether the loss diverged cannot be told: {self.sides} optimizers in this loop train different "
            f"parameters, each by a loss of its own. What was recorded began at {format_number(self.first)} and is "
            f"at {format_number(self.last)}; it may rise because one side of a game wins.",
            source=SOURCE,
        )

    def _of_losses_in_turn(self) -> Verdict:
        """A loss that follows another one, as after a pretraining, has not grown out of it."""
        return Verdict(
            Level.UNKNOWN,
            f"Whether the loss diverged cannot be told: steps of this loop descend {self.in_turn} different loss "
            "functions, one each, and the last losses may be of another one than the first.",
            source=SOURCE,
        )

    def _of_policy(self) -> Verdict:
        """A critic is asked for the returns of a policy that changes; the rest says nothing of how good it is."""
        return Verdict(
            Level.UNKNOWN,
            f"Whether the training diverged cannot be told by the loss of a policy gradient: it began at "
            f"{format_number(self.first)} and is at {format_number(self.last)}, and neither is a measure of the "
            "return.",
            source=SOURCE,
        )

    def _of_moving_targets(self) -> Verdict:
        """A loss that grows with the spread of the targets that training makes is no divergence."""
        return Verdict(
            Level.UNKNOWN,
            f"The loss began at {format_number(self.first)} and is at {format_number(self.last)}, and its targets "
            f"have spread meanwhile, to a standard deviation of {format_number(self.spread)}: it is small beside "
            "them, and its course alone tells nothing.",
            source=SOURCE,
        )

    def _fell(self) -> Verdict:
        first, lowest = format_number(self.first), format_number(self.fell_to)
        return Verdict(
            Level.ALARM,
            f"The loss falls without end: it began at {first}, has been below zero by more than {FELL:,g} times "
            f"the first losses since step {self.fell_at:,} and reached {lowest}, "
            f"{'with gradients that grow' if self.steeper else 'and falls as fast as before'}. "
            "Something in it has no lower bound: a term that is subtracted, or a target out of the loss's range.",
            advice="Write down each term of the loss with its sign: what is to become small is added, and what is "
            "subtracted must be bounded.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="A number that the loss cannot fall below.",
            value=self.fell_to,
            threshold=-FELL * abs(self.first),
            cause=Cause.LOSS_ASCENDED,
            explained_by=(Cause.TARGETS_OUT_OF_RANGE, Cause.LOGITS_INTO_PROBABILITY_LOSS, Cause.LOSS_UNBOUNDED),
            step=1,
        )

    def _left(self, limit: float) -> Verdict:
        by_momentum = self.momentum >= HIGH_MOMENTUM
        course = self._course(limit)
        why = (
            f" The momentum is {self.momentum:g}, which adds up a hundred steps and more in one direction."
            if by_momentum
            else ""
        )
        return graded(SOURCE, self.last / self.first, limit)(
            Level.ALARM,
            f"The loss diverged: it began at {format_number(self.first)}, {course}.{why}",
            advice="Lower the momentum to 0.9." if by_momentum else AFTER_DIVERGENCE,
            confidence=Confidence.WEAK_EMPIRICAL if by_momentum else Confidence.ARITHMETIC,
            refutation="The loss of the same batches, with the weights before that step, is as high.",
            cause=Cause.MOMENTUM_TOO_HIGH if by_momentum else Cause.TRAINING_DIVERGED,
            explained_by=(*LOSES_THE_LOSS, Cause.ACCUMULATION_NOT_DIVIDED, Cause.BATCHES_POISONED,
                          Cause.TARGETS_NOT_NORMALIZED, Cause.WARMUP_MISSING, Cause.NOT_FINITE,
                          Cause.GRADIENT_UNDERFLOW, Cause.SECOND_MOMENT_STALE, Cause.INITIALIZATION_CONSTANT,
                          Cause.INPUTS_TOO_SMALL, Cause.INPUTS_CONSTANT, Cause.NORMALIZATION_STATISTICS_BAD),
            step=self.left_at or None,
        )  # fmt: skip

    def _course(self, limit: float) -> str:
        above = f"has been above {limit:g} times that since step {self.left_at:,} and "
        if not self.left_at:
            return f"rose to {format_number(self.peak)} in between"
        if math.isfinite(self.last):
            return f"{above}has reached {format_number(self.last)}"
        if not self.lost_at:
            return f"{above}has been infinite or NaN again and again"
        return f"{above if self.left_at < self.lost_at else ''}is no finite number since step {self.lost_at:,}"

    def plot(self, ax: Any = None) -> Any:
        """The loss over the steps, with its first value."""
        ax.semilogy(self.steps, numpy.where(self.losses > 0, self.losses, numpy.nan))
        ax.axhline(self.first, color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="step", ylabel="loss")


@instrument(
    source=SOURCE,
    title="Divergence",
    kind=Kind.CHECK,
    before_training="with optimizer",
    why="After a divergence the weights are worse than at the start and rarely recover; the steps that "
    "follow are wasted.",
    formula="median of the last five losses / first loss",
)
def divergence(history: History, loop: Loop | None = None, *, times: Times = LOSS_RATIO) -> Divergence:
    """Whether the loss left for good: it stays above `times` its first value, or is no longer finite.

    history: the record of a watched run; loop: whether several optimizers descend losses of their own (the two
    sides of a game), steps different loss functions, or the loss a policy gradient, where only a loss that is not
    finite is judged; and whether the targets spread in the course of training, as values do that it learns itself,
    where a loss far below their variance is not judged. Judged on
    the median of the last five losses, so that a single bad batch is not called divergence; a loss that begins at
    zero or below is not judged. A loss that falls to a thousand times its first size below zero has no lower bound
    where the gradient grows thirtyfold, or where one optimizer alone lowers it as fast as before: that is an alarm
    of its own. A momentum of 0.99 or more is named as the cause. Raises nothing of its own.
    """
    losses = numpy.where(history.loss_finite, numpy.asarray(history.loss, float), math.inf)
    seen = ~numpy.isnan(losses)
    losses, steps = losses[seen], numpy.asarray(history.steps[seen])
    known, _ = finite_losses(history)
    first = float(known[0]) if len(known) else math.nan
    smooth = _medians_of_five(losses)
    steeper = _steeper(history)
    fell_at, fell_to = _fell(history, known, steeper, loop)
    thin = slice(None, None, max(1, len(losses) // 512))
    return Divergence(
        first=first,
        best=float(smooth.min()) if len(smooth) else math.nan,
        last=float(smooth[-1]) if len(smooth) else math.nan,
        peak=float(smooth.max()) if len(smooth) else math.nan,
        left_at=_left_at(smooth, steps[len(losses) - len(smooth) :], times * first) if first > 0 else 0,
        lost_at=_left_at(losses, steps, float(numpy.finfo(float).max)),
        momentum=_momentum(history),
        num_steps=int(history.total_steps),
        spread=spread_of_moving_targets(loop),
        sides=0 if loop is None else len(loop.sides),
        in_turn=0 if loop is None else loop.losses_in_turn,
        of_policy=loop is not None and bool(loop.policy.looks),
        fell_at=fell_at,
        steeper=steeper,
        fell_to=fell_to,
        steps=steps[thin],
        losses=losses[thin],
    )


def spread_of_moving_targets(loop: Loop | None) -> float:
    """The spread of targets that came to lie much farther apart in the course of training; NaN of others."""
    asked = () if loop is None else loop.asked
    return max((f.spread_last for f in asked if f.moving), default=math.nan)


def _fell(history: History, losses: NDArray[numpy.float64], steeper: bool, loop: Loop | None) -> tuple[int, float]:
    """Where the loss went below zero for good, by `FELL` times its first size, with ever larger gradients or at an
    even pace: the step and the lowest loss; 0 and NaN where it did not."""
    _, steps = finite_losses(history)
    if len(losses) <= 2 * RECENT_LOSSES:
        return 0, math.nan
    limit = -FELL * float(numpy.abs(losses[:RECENT_LOSSES]).max())
    smooth = _medians_of_five(losses)
    begins = _left_at(-smooth, steps[len(losses) - len(smooth) :], -limit)
    # A critic that tells two sides apart by more and more falls as fast as before, too: then there are two
    # optimizers.
    alone = loop is not None and len(loop.optimizers) == 1 and not loop.optimizers[0].foreign
    endless = begins and limit < 0 and (steeper or (alone and _as_fast_as_before(losses)))
    return (begins, float(losses.min())) if endless else (0, math.nan)


def _as_fast_as_before(losses: NDArray[numpy.float64]) -> bool:
    """Whether the loss fell in the last third of the steps as far as in the third before: what has a lower bound
    comes to it, a likelihood slows down."""
    third = len(losses) // 3
    one, two, three = (float(median(losses[at - RECENT_LOSSES : at])) for at in (third, 2 * third, len(losses)))
    return third > RECENT_LOSSES and two < one and two - three > UNDIMINISHED * (one - two)


def _steeper(history: History) -> bool:
    """Whether the last finite gradients are many times as large as the first."""
    with numpy.errstate(over="ignore", invalid="ignore"):
        norms = numpy.sqrt(numpy.square(numpy.asarray(history.gradient_norm, float)).sum(1))
    norms = norms[numpy.isfinite(norms)]
    enough = len(norms) > 2 * RECENT_LOSSES
    return enough and bool(median(norms[-RECENT_LOSSES:]) > STEEPER * median(norms[:RECENT_LOSSES]))


def _medians_of_five(losses: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """The median of each loss and the four before it; of all of them where there are fewer."""
    if len(losses) <= RECENT_LOSSES:
        return numpy.atleast_1d(median(losses)) if len(losses) else losses
    return numpy.asarray(numpy.median(numpy.lib.stride_tricks.sliding_window_view(losses, RECENT_LOSSES), axis=1))


def _left_at(smooth: NDArray[numpy.float64], steps: NDArray[Any], limit: float) -> int:
    """The first step of the stretch above the limit that lasts to the end; 0 where the last is not above it."""
    below = numpy.flatnonzero(smooth <= limit)
    start = int(below[-1]) + 1 if len(below) else 0
    return int(steps[start]) if start < len(smooth) else 0


def _momentum(history: History) -> float:
    group = history.optimizer
    betas = group.get("betas")
    return float(betas[0] if betas else group.get("momentum") or 0.0)
