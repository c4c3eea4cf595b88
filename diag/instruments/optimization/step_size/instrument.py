"""Step size: how far each step moves the weights, compared with their size.

The ratio ||step|| / ||weights|| of a layer has no unit and is much alike over architectures and optimizers: in
most trainings that work it lies between 1e-3 and 1e-1 after the first steps. Much above, a few steps replace the
weights; far below, they do not move in the time given. Where steps are too small it is looked whether clipping or
Adam's epsilon makes them so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy

from diag.display import format_number
from diag.instruments.optimization.course import (
    fall,
    fell,
    finite_losses,
    growth,
    highest_loss,
    left_of_loss,
    travel,
    unpushed,
)
from diag.instruments.optimization.divergence import LOSS_RATIO
from diag.instruments.optimization.step_size import measuring
from diag.instruments.optimization.step_size.fields import MEASUREMENTS_IN_A_ROW, SOURCE, MeasuredSteps
from diag.instruments.optimization.step_size.slow_side import of_the_slow_side, slow_side
from diag.instruments.optimization.step_size.too_large import too_large
from diag.instruments.optimization.step_size.too_small import too_small
from diag.ranges import Threshold
from diag.registry import Kind, instrument
from diag.result import Level, Verdict
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop

TOO_HIGH, TOO_LOW = 0.15, 2e-4
SCATTERS = 2.0  # standard deviations of a batch's loss, for weights that begin next to nothing
HALF_OF_NORM = 0.5  # norm over the first norm


@dataclass(frozen=True, kw_only=True, eq=False)
class StepSize(MeasuredSteps):
    """How far steps move the weights, as a share of their size."""

    def verdict(self) -> Verdict:
        return next(v for v in self._verdicts() if v is not None)

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """The last result's verdict, of the largest steps that any result has seen where the loss rose far: a long
        record is thinned, and no longer holds the first steps one by one."""
        last = series[-1][1]
        seen = [r for _, r in series if r.num_steps >= MEASUREMENTS_IN_A_ROW and math.isfinite(r.largest_ratio)]
        then = max(seen, key=lambda r: r.largest_ratio, default=last)
        if last.below_zero or not then.loss_peak_ratio >= LOSS_RATIO:
            return last.verdict()
        return replace(
            last,
            largest_ratio=then.largest_ratio,
            largest_at=then.largest_at,
            began_at=then.began_at,
            loss_rose=then.loss_rose,
            shrunk=then.shrunk,
            from_nothing=then.from_nothing,
            peak_then=then.loss_peak_ratio,
        ).verdict()

    def _verdicts(self) -> Iterator[Verdict | None]:
        yield too_large(self)
        yield too_small(self)
        yield of_the_slow_side(self)
        if self.unpushed:
            nothing = "The gradient of a typical layer is zero: its steps say nothing of the learning rate."
            yield Verdict(Level.NOT_APPLICABLE, nothing, source=SOURCE)
        if not math.isfinite(self.ratio):
            yield Verdict(Level.NOT_APPLICABLE, "No step of the weights was measured.", source=SOURCE)
        usual = self.setting("too_low") <= self.ratio <= self.setting("too_high")
        yield Verdict(
            Level.OK,
            f"A step moves a layer's weights by {format_number(self.ratio)} of their size (the median)"
            + (", as in most trainings that work." if usual else "."),
            source=SOURCE,
            value=self.ratio,
        )

    def plot(self, ax: Any = None) -> Any:
        """The median ratio over the steps, with the range of most trainings that work."""
        ax.loglog(self.steps, self.ratios, marker="o", markersize=3)
        for limit in (self.setting("too_high"), self.setting("too_low")):
            ax.axhline(limit, color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="step", ylabel="step over weights")


@instrument(
    source=SOURCE,
    title="Step size",
    kind=Kind.CHECK,
    before_training="with optimizer",
    why="Steps that are too large destroy what was learned, and steps that are too small do not learn in "
    "the time that there is.",
    formula="|W(t + 1) - W(t)| / |W(t)| of a tensor; the median over tensors",
)
def step_size(
    history: History, loop: Loop | None = None, *, too_high: Threshold = TOO_HIGH, too_low: Threshold = TOO_LOW
) -> StepSize:
    """How far each step moves the weights, as a share of their size, and what makes it too far or too little.

    history: the record of a watched run; loop: for what the weights began with, and for optimizers that descend
    losses of their own, of which the one with the largest steps is judged; where steps descend different loss
    functions, the course of the losses counts for nothing. The ratio of a step is the median over tensors of at
    least 64 entries; `too_high` is compared with the median of five consecutive measurements,
    `too_low` with the median of all. Where the loss is lost sooner, fewer measurements do, but not for SGD whose
    gradient was longer than the weights and whose loss took the logarithm of zero, or the like, of finite
    outputs: there the gradient was too large, and not the rate. Where the ratio is too low, the verdict looks at
    clipping (how much of the gradient is left) and at Adam's epsilon (how large its step per entry is beside the
    learning rate) before it names the learning rate. A training of a hundred steps or more that is over is told,
    too, where it began with weights as drawn and has hardly left them, or where its steps all went one way and
    not far, with a loss that has hardly fallen; and one of several sides with losses of their own, as a generator,
    whose steps are a hundredth of the other's and would not move a layer by a hundredth of its size if all went
    one way. Raises nothing of its own.
    """
    (medians, steps, tensors), (largest, at, began) = measuring.of_the_fastest(history, loop, too_high)
    from_nothing = measuring.from_nothing(history, loop)
    travelled, straightness = travel(history)
    first, below, fallen, peak, now = _course(history, loop)
    over = loop is not None and loop.ended and not loop.sides and bool(history.loss_finite.all())
    return StepSize(
        travelled=travelled,
        straightness=straightness,
        over=over,
        from_scratch=over and loop is not None and loop.from_scratch,
        first_loss=first,
        largest_ratio=largest,
        largest_at=at,
        began_at=began,
        ratio=measuring.ratio_before_decay(history, medians, steps),
        tensors=tensors,
        num_steps=int(history.total_steps),
        loss_fall=fallen,
        loss_peak_ratio=peak,
        now=now,
        lost=bool(len(history)) and not history.loss_finite[-MEASUREMENTS_IN_A_ROW:].all(),
        below_zero=below,
        loss_fell=fell(finite_losses(history)[0]),
        clip_factor=measuring.clip_factor(history),
        gradient_size=measuring.gradient_size(history),
        adam_share=measuring.adam_share(history),
        loss_rose=_rose(history, loop, at, from_nothing or below),
        shrunk=growth(history, at) < HALF_OF_NORM,
        growth=growth(history, int(history.total_steps)),
        from_nothing=from_nothing,
        unpushed=unpushed(history),
        steps=steps[-512:],
        ratios=medians[-512:],
        **vars(slow_side(history, loop)),
        **_of_the_optimizer(history),
    )


def _of_the_optimizer(history: History) -> dict[str, Any]:
    """Its kind, Adam's epsilon and the highest learning rate, as the result names them."""
    return {
        "optimizer": str(history.optimizer.get("kind", "")),
        "epsilon": float(history.optimizer.get("eps", math.nan)),
        "rate": float(numpy.nan_to_num(history.learning_rate).max(initial=0.0)),
    }


def _course(history: History, loop: Loop | None) -> tuple[float, bool, float, float, float]:
    """The first loss, and whether any is below zero; of a training that descends one loss besides how far it fell,
    how high it rose and what is left of it, else NaN."""
    losses, _ = finite_losses(history)
    first, below = float(losses[0]) if len(losses) else math.nan, bool((losses < 0).any())
    if loop is not None and loop.losses_in_turn:
        return first, below, math.nan, math.nan, math.nan
    return first, below, fall(losses), highest_loss(history), left_of_loss(history)


def _rose(history: History, loop: Loop | None, step: int, uneven: bool) -> bool:
    """Whether the one loss that is descended rose after this step; uneven: by more than it scatters."""
    in_turn = loop is not None and loop.losses_in_turn
    return not in_turn and measuring.rose(history, loop, step, SCATTERS if uneven else 0.0)
