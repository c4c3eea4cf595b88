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
from numpy.typing import NDArray

from diag.display import format_number, format_share
from diag.instruments.causes import MAKES_STEPS_TOO_LARGE, Cause
from diag.instruments.graded import graded
from diag.instruments.optimization.course import (
    MOST_NORMS,
    SMALL,
    fall,
    fell,
    finite_losses,
    highest_loss,
    left_of_loss,
    median,
    moved_from_zero,
    scatter,
    travel,
    unpushed,
    update_ratios,
)
from diag.instruments.optimization.divergence import LOSS_RATIO
from diag.ranges import Threshold
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Result, Verdict, measured
from diag.snapshot.history import History, by_rows, thinned_record
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the recorded steps"
TOO_HIGH, TOO_LOW = 0.15, 2e-4
CERTAIN = 0.23  # from here on a step is too large also where the loss has not risen
MEASUREMENTS_IN_A_ROW = 5
ENOUGH_STEPS = 30
ROSE = 1.1
SCATTERS = 2.0  # standard deviations of a batch's loss, for weights that begin next to nothing
NOT_FALLEN = 0.1
TIGHT, NOTHING_LEFT = 0.05, 0.005
# With any gradient, Adam's step is about the learning rate for each entry: never below 0.1 of it for noise of one
# scale. A hundredth means that epsilon, or a second moment of long ago, stands in the denominator.
ADAM_SHARE = 0.02
HALF_OF_NORM, GROWN = 0.5, 30.0  # norm over the first norm
HALF_OF_LOSS, TENTH_OF_LOSS = 0.5, 0.1  # of the first loss
BLOWN_UP = 100.0  # times the first loss: what such steps have replaced is not what training began with
COMES_BACK = 100  # steps in which a loss that rose in the first ones may come back
ADAGRAD, RMSPROP = "Adagrad", "RMSprop"  # they divide by what began at zero: large at first at any rate
FROM_NOTHING = 0.03  # root mean square of the weights times the root of the fan-in; usual is 0.5 to 1.5
STEPS_OF_A_TRAINING = 100
# Trainings from random weights that work end several tenths of their size away, and not on a straight way.
NOWHERE, NOT_FAR = 0.05, 0.2
STRAIGHT, PUT_BACK = 0.7, 0.1
USUAL_RATE = 1e-2  # of SGD
NOT_THE_RATE = (
    Cause.LEARNING_RATE_ZERO, Cause.SCHEDULE_TOO_FAST, Cause.SCHEDULE_ENDED_EARLY, Cause.GRADIENTS_VANISH,
    Cause.UNITS_DEAD, Cause.INITIALIZATION_SCALE, Cause.UPDATES_ROUND_TO_NOTHING, Cause.INITIALIZATION_CONSTANT,
    Cause.GRADIENT_UNDERFLOW, Cause.WEIGHTS_CHANGED_OUTSIDE, Cause.SCHEDULER_NEVER_STEPPED,
    Cause.SCHEDULE_TOO_SLOW, Cause.ADAM_EPSILON_TOO_LARGE,
)  # fmt: skip
ADAPTIVE_OPTIMIZERS = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")


@dataclass(frozen=True, kw_only=True, eq=False)
class StepSize(Result):
    """Ratios are medians over the large tensors; NaN: not observed."""

    largest_ratio: float = measured("step over weights: the largest median of five consecutive measurements")
    largest_at: int = measured("the step at which these five measurements ended", remark="0 where there are fewer")
    began_at: int = measured("the first that was too high of the first five whose median was", remark="0: none")
    ratio: float = measured("step over weights: the median while the learning rate was above half of its largest")
    tensors: int = measured("tensors with at least 64 entries that moved")
    num_steps: int = measured("steps recorded", unit="steps")
    loss_fall: float = measured("fall of the loss from the first tenth of the steps to the last", unit="share")
    loss_peak_ratio: float = measured(
        "the largest recorded loss over the first one", remark="NaN where the first is not positive"
    )
    now: float = measured("the median of the last losses over the first one", default=math.nan)
    lost: bool = measured("the last losses were not finite", default=False)
    below_zero: bool = measured("some losses are negative, so that a share says nothing", default=False)
    loss_fell: bool = measured(
        "the loss of the last third of the steps is below that of the first, beyond noise", default=True
    )
    clip_factor: float = measured("norm of the applied over that of the true gradient, the median", unit="share")
    gradient_size: float = measured("root mean square of the gradient's entries, the median tensor and step")
    adam_share: float = measured("size of Adam's step per entry over the learning rate, the median", unit="share")
    loss_rose: bool = measured("the loss of these steps, or of the five after them, was well above the first one")
    shrunk: bool = measured("the weights had less than half of their first norm then: decay or a penalty took it")
    growth: float = measured("norm of a typical layer's weights at the end over the first one", default=math.nan)
    from_nothing: bool = measured("a typical layer of weights began next to zero, or all alike")
    unpushed: bool = measured("the gradient of a typical tensor was zero at a typical step")
    travelled: float = measured(
        "distance from the start at the end, over the norm: the median tensor", default=math.nan
    )
    straightness: float = measured(
        "that distance over the length of the way there, the median tensor", default=math.nan
    )
    from_scratch: bool = measured("training has ended, and had begun with weights as drawn", default=False)
    over: bool = measured("training has ended", default=False)
    rate: float = measured("the largest learning rate", default=math.nan)
    first_loss: float = measured("the first loss", default=math.nan)
    optimizer: str = measured("the optimizer's kind")
    epsilon: float = measured("Adam's epsilon")
    peak_then: float = measured(
        "the largest loss over the first one, when the largest ratio was first seen", default=math.nan
    )
    steps: NDArray[numpy.int64] = measured("the steps measured", shape="(steps,)")
    ratios: NDArray[numpy.float64] = measured("the median ratio at each", shape="(steps,)")

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
        yield self._too_high()
        yield self._too_small()
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

    def _too_high(self) -> Verdict | None:
        limit = self.setting("too_high")
        if not self.largest_ratio > limit or not (self.loss_rose or self._certain) or self._recovered:
            return None
        return graded(SOURCE, self.largest_ratio, limit)(
            Level.WARNING if self._may_recover else Level.ALARM,
            f"The steps are too large: one step moves the weights of a typical layer by "
            f"{format_share(self.largest_ratio)} of their size (around step {self.largest_at:,}); in "
            f"most trainings that work it is below {format_share(limit)}.{self._course}",
            advice="Lower the learning rate about tenfold, or warm it up; if it must stay, clip the gradient.",
            refutation="The same training at a tenth of the learning rate ends with a loss that is not lower.",
            cause=Cause.LEARNING_RATE_TOO_HIGH,
            explained_by=(*MAKES_STEPS_TOO_LARGE, Cause.ACCUMULATION_NOT_DIVIDED, Cause.GRADIENTS_STILL_SCALED,
                          Cause.TARGETS_NOT_NORMALIZED, Cause.DATA_NOT_FINITE, Cause.INITIALIZATION_CONSTANT,
                          Cause.INPUTS_TOO_SMALL, Cause.INPUTS_CONSTANT, Cause.LABELS_SHUFFLED,
                          Cause.CLASS_WEIGHTS_WRONG, Cause.LEARNING_RATE_ZERO, Cause.NORMALIZATION_STATISTICS_BAD,
                          Cause.TARGETS_OUT_OF_RANGE, *([Cause.WEIGHT_DECAY_TOO_STRONG] if self.shrunk else [])),
            step=self.began_at or self.largest_at,
        )  # fmt: skip

    @property
    def _course(self) -> str:
        """What the loss did meanwhile, where it has a course that a ratio describes."""
        if self.below_zero or not self.loss_rose or not math.isfinite(self.loss_peak_ratio):
            return ""
        if self.lost:
            now = " and is no number now"
        else:
            now = f" and is at {format_number(self.now)} times that value now" if math.isfinite(self.now) else ""
        return f" The loss rose to {format_number(self.loss_peak_ratio)} times its first value{now}."

    @property
    def _certain(self) -> bool:
        """Whether steps are so large that it is enough that some loss was higher than the first, or that they stay
        so large.

        Layers that start near zero take steps of their own size until they have grown, and the first steps of
        Adagrad and RMSprop are large at any usual rate: there the loss must tell.
        """
        limit = self.setting("too_high")
        large = self.largest_ratio > max(limit, CERTAIN) and self.tensors > 1
        enough = self.num_steps >= ENOUGH_STEPS
        large = large and not self.shrunk and not self.from_nothing and self.optimizer != ADAGRAD
        large = large and (enough or self.optimizer != RMSPROP)
        if self.below_zero:  # a policy's loss: its size says nothing
            return large and enough and not self.loss_fell
        return large and (self.loss_peak_ratio > ROSE or (enough and self.ratio > limit))

    @property
    def _may_recover(self) -> bool:
        """Whether it cannot be said that the loss will not come back from large first steps: it is too early, or it
        has come down to half of the first one already."""
        early = self.num_steps < (ENOUGH_STEPS if self.now > LOSS_RATIO else COMES_BACK)
        return (early or self.now <= HALF_OF_LOSS) and not self.lost

    @property
    def _recovered(self) -> bool:
        """Whether large first steps did no lasting harm: steps are as usual since, and half of the loss is gone, or
        nine tenths where it rose far. A loss that was a hundred times the first one has replaced what training
        began with.

        The first steps of Adagrad are large at any usual rate, so there the loss need not fall.
        """
        if self.below_zero or self.peak_then >= BLOWN_UP:
            return False
        usual = self.num_steps >= ENOUGH_STEPS and self.ratio <= self.setting("too_high")
        far = not self.loss_peak_ratio < LOSS_RATIO
        fell = self.now <= (TENTH_OF_LOSS if far else HALF_OF_LOSS) or (self.optimizer == ADAGRAD and not far)
        # Weights that large steps have made many times as large take steps that are small beside them.
        return usual and fell and not self.lost and not self.growth > GROWN

    def _too_small(self) -> Verdict | None:
        limit = self.setting("too_low")
        if self.adam_share < ADAM_SHARE and self.num_steps >= MEASUREMENTS_IN_A_ROW:
            if self.epsilon > self.gradient_size:
                return self._by_epsilon()
            clipped = self.clip_factor < TIGHT and self.num_steps >= ENOUGH_STEPS
            if clipped and self.epsilon > self.gradient_size * self.clip_factor:
                return self._by_clipping()
        if (
            self.clip_factor < NOTHING_LEFT
            and self.num_steps >= ENOUGH_STEPS
            and self.optimizer not in ADAPTIVE_OPTIMIZERS
        ):
            return self._by_clipping()
        if (stood := self._stood_still()) is not None:
            return stood
        small = self.ratio < limit and self.num_steps >= ENOUGH_STEPS and not self.unpushed
        stands = not self.loss_fell if self.below_zero else self.loss_fall < NOT_FALLEN
        if not small or not stands:
            return None
        if self.clip_factor < TIGHT and self.optimizer not in ADAPTIVE_OPTIMIZERS:
            return self._by_clipping()
        return graded(SOURCE, self.ratio, limit)(
            Level.WARNING,
            f"Steps are small and the loss hardly falls: one step moves the weights of a typical layer by "
            f"{format_number(self.ratio)} of their size, and in {self.num_steps:,} steps the loss has "
            f"{self._fallen}.",
            advice="Raise the learning rate ten- to a hundredfold; check that the schedule's warm-up is over.",
            refutation="The loss does not fall faster at ten times the learning rate.",
            cause=Cause.LEARNING_RATE_TOO_LOW,
            explained_by=NOT_THE_RATE,
        )

    @property
    def _fallen(self) -> str:
        """What the loss has done, in words that hold for one below zero, or one that is not known, too."""
        if self.below_zero:
            return "fallen" if self.loss_fell else "not fallen by more than it scatters"
        known = math.isfinite(self.loss_fall)
        return f"fallen by {format_share(max(self.loss_fall, 0.0))}" if known else "a course that is not known"

    def _stood_still(self) -> Verdict | None:
        """Of a training that is over: it hardly left its random weights, or all its steps went one way."""
        if not self.over or self.num_steps < STEPS_OF_A_TRAINING or self.unpushed or self.below_zero:
            return None
        if not self.travelled > 0 or not self.loss_fall < NOT_FALLEN:
            return None
        # Weights that are put back again and again go a long way and are near their start.
        still = self.from_scratch and self.travelled < NOWHERE and self.straightness > PUT_BACK
        one_way = self.straightness > STRAIGHT and self.travelled < NOT_FAR
        if not (still or one_way) or self.clip_factor < TIGHT:
            return None
        where = f"{self.num_steps:,} steps moved a typical layer by {format_share(self.travelled)} of its size"
        how = f", {format_share(min(self.straightness, 1.0))} of their way in one direction" if one_way else ""
        divided = self.rate >= USUAL_RATE and self.optimizer == "SGD"
        first = format_number(self.first_loss)
        small = (
            f" The learning rate ({self.rate:g}) is not small, but the gradients are: the first loss was {first}."
        )
        look = "Look whether the loss is divided once too often (by the batch size after a mean), or raise"
        return graded(SOURCE, self.travelled, NOWHERE if still else NOT_FAR)(
            Level.WARNING,
            f"The weights hardly left their start: {where}{how}, and the loss has {self._fallen}."
            + (small if divided else ""),
            advice=f"{look if divided else 'Raise'} the learning rate ten- to a hundredfold; check that the "
            "schedule's warm-up is over.",
            refutation="The loss does not fall faster at ten times the learning rate.",
            cause=Cause.LEARNING_RATE_TOO_LOW,
            explained_by=NOT_THE_RATE,
        )

    def _by_epsilon(self) -> Verdict:
        return Verdict(
            Level.WARNING,
            f"Adam's steps are {format_share(self.adam_share)} of the learning rate, where gradients of any size "
            f"should give about its whole: its epsilon ({self.epsilon:g}) is larger than they are.",
            advice="Set eps to 1e-8 (1e-15 for very small gradients), or scale the loss so that gradients "
            "are larger.",
            source="Kingma, Ba 2015, arXiv:1412.6980 (the step's size); Wortsman et al. 2023, arXiv:2309.14322",
            confidence=Confidence.STRONG_EMPIRICAL,
            refutation="The steps keep their size when eps is set to 1e-15.",
            value=self.adam_share,
            threshold=ADAM_SHARE,
            threshold_source="noise alone gives 0.1 to 0.3",
            cause=Cause.ADAM_EPSILON_TOO_LARGE,
            explained_by=(
                Cause.GRADIENTS_VANISH,
                Cause.UNITS_DEAD,
                Cause.INITIALIZATION_CONSTANT,
                Cause.GRADIENT_UNDERFLOW,
            ),
        )

    def _by_clipping(self) -> Verdict:
        return graded(SOURCE, self.clip_factor, TIGHT)(
            Level.WARNING,
            f"Clipping cuts the gradient to {format_share(self.clip_factor)} of its length at a typical "
            f"step{self._below_epsilon}, and the loss has {self._fallen} in {self.num_steps:,} steps.",
            advice="Raise the clipping threshold to about the median norm of the gradient, or the learning rate.",
            confidence=Confidence.ARITHMETIC,
            refutation="The loss falls no faster without clipping.",
            cause=Cause.CLIPPING_TOO_TIGHT,
            explained_by=(Cause.CLIPPING_BEFORE_UNSCALING,),
            step=1,
        )

    @property
    def _below_epsilon(self) -> str:
        if self.optimizer not in ADAPTIVE_OPTIMIZERS:
            return ""
        return (
            f", to entries far below Adam's epsilon ({self.epsilon:g}), so that its steps are "
            f"{format_share(self.adam_share)} of the learning rate"
        )

    def plot(self, ax: Any = None) -> None:
        """The median ratio over the steps, with the range of most trainings that work."""
        ax.loglog(self.steps, self.ratios, marker="o", markersize=3)
        for limit in (
            self.setting("too_high"),
            self.setting("too_low"),
        ):
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
    losses of their own, of which the one with the largest steps is judged. The ratio of a step is the median over
    tensors of at least 64 entries; `too_high` is compared with the median of five consecutive measurements,
    `too_low` with the median of all. Where the loss is lost sooner, fewer measurements do, but not for SGD whose
    gradient was longer than the weights and whose loss took the logarithm of zero, or the like, of finite
    outputs: there the gradient was too large, and not the rate. Where the ratio is too low, the verdict looks at
    clipping (how much of the gradient is left) and at Adam's epsilon (how large its step per entry is beside the
    learning rate) before it names the learning rate. A training of a hundred steps or more that is over is told,
    too, where it began with weights as drawn and has hardly left them, or where its steps all went one way and
    not far, with a loss that has hardly fallen. Raises nothing of its own.
    """
    (medians, steps, tensors), (largest, at, began) = _of_the_fastest(history, loop, too_high)
    losses, _ = finite_losses(history)
    from_nothing = _from_nothing(loop) or (moved_from_zero(history) and not _left_at_once(history))
    travelled, straightness = travel(history)
    over = loop is not None and loop.ended and not loop.sides and bool(history.loss_finite.all())
    return StepSize(
        travelled=travelled,
        straightness=straightness,
        over=over,
        from_scratch=over and loop is not None and loop.from_scratch,
        rate=float(numpy.nan_to_num(history.learning_rate).max(initial=0.0)),
        first_loss=float(losses[0]) if len(losses) else math.nan,
        largest_ratio=largest,
        largest_at=at,
        began_at=began,
        ratio=_ratio_before_decay(history, medians, steps),
        tensors=tensors,
        num_steps=int(history.total_steps),
        loss_fall=fall(losses),
        loss_peak_ratio=highest_loss(history),
        now=left_of_loss(history),
        lost=bool(len(history)) and not history.loss_finite[-MEASUREMENTS_IN_A_ROW:].all(),
        below_zero=bool((losses < 0).any()),
        loss_fell=fell(losses),
        clip_factor=_clip_factor(history),
        gradient_size=_gradient_size(history),
        adam_share=_adam_share(history),
        loss_rose=_rose(history, loop, at, SCATTERS if from_nothing or (losses < 0).any() else 0.0),
        shrunk=_growth(history, at) < HALF_OF_NORM,
        growth=_growth(history, int(history.total_steps)),
        from_nothing=from_nothing,
        unpushed=unpushed(history),
        optimizer=str(history.optimizer.get("kind", "")),
        epsilon=float(history.optimizer.get("eps", math.nan)),
        steps=steps[-512:],
        ratios=medians[-512:],
    )


def _of_the_fastest(history: History, loop: Loop | None, limit: float) -> tuple[Any, tuple[float, int, int]]:
    """Ratios and their largest five (see `update_ratios`, `_largest_of_five`): of all tensors, or where optimizers
    descend losses of their own, of those of the one with the largest steps."""
    sides = () if loop is None else loop.sides
    ratios = [update_ratios(history, side) for side in filter(None, sides)] or [update_ratios(history)]
    lost = _left_at_once(history)
    few = [lost and not _lost_in_the_loss(history, loop, found[0]) for found in ratios]
    each = [(found, _largest_of_five(*found[:2], limit, do)) for found, do in zip(ratios, few, strict=True)]
    return max(each, key=lambda e: numpy.nan_to_num(e[1][0]))


def _left_at_once(history: History) -> bool:
    """Whether losses are no numbers any more, or the last is many times the first: then fewer measurements than
    five must do."""
    lost = bool(len(history)) and not bool(history.loss_finite[-1])
    return lost or left_of_loss(history) > LOSS_RATIO


def _lost_in_the_loss(history: History, loop: Loop | None, medians: NDArray[numpy.float64]) -> bool:
    """Whether the loss was lost in its own computation, as by the logarithm of zero, of outputs that were finite,
    after a gradient that was longer than the weights, and had not risen manyfold before: that it is lost then does
    not tell against the rate.

    medians: step over weights, at each step. The first step of SGD is the rate times the gradient."""
    origin = None if loop is None else loop.origin
    if origin is None or not (origin.outputs_finite and origin.operation) or history.optimizer.get("kind") != "SGD":
        return False
    rate = float(numpy.nan_to_num(history.learning_rate).max(initial=0.0))
    return len(medians) > 0 and 0 < rate <= medians[0] and not highest_loss(history) >= LOSS_RATIO


def _largest_of_five(
    medians: NDArray[numpy.float64], steps: NDArray[Any], limit: float, few: bool = False
) -> tuple[float, int, int]:
    """The largest median of five consecutive measurements, the step at which these ended, and the first that is
    above the limit of the first five whose median is. few: where there are fewer, of these."""
    number = min(len(medians), MEASUREMENTS_IN_A_ROW) if few else MEASUREMENTS_IN_A_ROW
    if len(medians) < max(number, 1):
        return math.nan, 0, 0
    windows = median(numpy.lib.stride_tricks.sliding_window_view(medians, number), axis=1)
    best = int(numpy.nanargmax(windows)) if numpy.isfinite(windows).any() else 0
    above = numpy.flatnonzero(numpy.nan_to_num(windows) > limit)
    began = int(steps[above[0] + int((medians[above[0] :] > limit).argmax())]) if len(above) else 0
    return float(windows[best]), int(steps[best + number - 1]), began


def _ratio_before_decay(history: History, medians: NDArray[numpy.float64], steps: NDArray[Any]) -> float:
    """The median ratio where the schedule had not yet lowered the learning rate: late in a schedule steps are
    meant to be small."""
    rates = numpy.asarray(history.learning_rate, float)[numpy.isin(history.steps, steps)]
    rates = numpy.nan_to_num(rates, nan=numpy.inf)
    high = rates >= rates.max() / 2 if len(rates) else numpy.zeros(0, bool)
    return float(median(medians[high])) if high.any() else math.nan


def _clip_factor(history: History) -> float:
    total = by_rows(history, lambda h: numpy.sqrt(numpy.nansum(numpy.square(h.gradient_norm, dtype=float), axis=1)))
    with numpy.errstate(divide="ignore", invalid="ignore"):
        factors = history.applied_gradient_norm / total
    factors = factors[numpy.isfinite(factors)]
    return float(numpy.median(factors)) if len(factors) else math.nan


def _gradient_size(history: History) -> float:
    history = thinned_record(history, MOST_NORMS)
    sizes = numpy.asarray(history.sizes, float)
    large = sizes >= SMALL
    each = numpy.asarray(history.gradient_norm[:, large], float) / numpy.sqrt(sizes[large])
    return float(median(numpy.where(numpy.isfinite(each) & (each > 0), each, numpy.nan)))


def _adam_share(history: History) -> float:
    """The median over steps and tensors of (root mean square of the step's entries) / (learning rate); NaN for
    other optimizers, and where weight decay or several groups with rates of their own would be part of it."""
    about = history.optimizer
    groups = {g.get("lr") for g in about.get("groups", ())}
    if about.get("kind") not in ADAPTIVE_OPTIMIZERS or len(groups) > 1:
        return math.nan
    history = thinned_record(history, MOST_NORMS)
    sizes = numpy.asarray(history.sizes, float)
    large = (sizes >= 64) & (numpy.nan_to_num(history.gradient_norm) > 0).any(0)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        rates = numpy.asarray(history.learning_rate, float)
        high = rates >= numpy.nan_to_num(rates).max(initial=0.0) / 2  # late in a schedule, rounding shows
        size = numpy.asarray(history.update_norm[high][:, large], float) / numpy.sqrt(sizes[large])
        shares = size / rates[high][:, None]
    # What is frozen for a while, or gets no gradient, takes no step whatever epsilon is.
    pushed = numpy.nan_to_num(history.gradient_norm[high][:, large]) > 0
    shares = shares[numpy.isfinite(shares) & (shares > 0) & pushed]
    return float(numpy.median(shares)) if len(shares) else math.nan


def _rose(history: History, loop: Loop | None, at: int, scatters: float) -> bool:
    """Whether the median loss of the five steps that the measurements up to `at` led to, or of the five after, lies
    well above the first: by a tenth, and so many times what losses scatter. Of two sides of a game one's loss rises
    because the other wins: that counts for nothing."""
    if loop is not None and loop.sides:
        return False
    losses, steps = finite_losses(history)
    limit = ROSE * losses[0] if len(losses) > 1 else math.inf
    if scatters:
        limit = max(limit, losses[0] + scatters * scatter(losses)) if len(losses) > 2 else math.inf
    courses = (
        losses[(steps > at - MEASUREMENTS_IN_A_ROW + shift) & (steps <= at + shift)]
        for shift in (1, MEASUREMENTS_IN_A_ROW)
    )
    return any(len(course) and numpy.median(course) > limit and losses[0] > 0 for course in courses)


def _growth(history: History, at: int) -> float:
    """How many times its first norm the median large tensor has at step `at`; NaN where norms were not recorded."""
    large = numpy.asarray(history.sizes) >= SMALL
    seen = by_rows(history, lambda h: numpy.isfinite(h.parameter_norm[:, large]).any(1))
    before = numpy.flatnonzero(seen & (history.steps <= at))
    if not len(before):
        return math.nan
    first, last = numpy.asarray(history.parameter_norm[before[[0, -1]]][:, large], float)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        return float(median(last / first))


def _from_nothing(loop: Loop | None) -> bool:
    """Whether the median layer's weights began next to zero or all alike: it takes steps of its own size until it
    has grown, whatever the learning rate is."""
    start = () if loop is None else loop.start
    return len(start) > 0 and bool(numpy.median([0.0 if w.constant else w.gain for w in start]) < FROM_NOTHING)
