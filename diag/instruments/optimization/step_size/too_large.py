"""Steps that are too large, where the loss tells of it, or they are larger than any loss could excuse."""

from __future__ import annotations

import math

from diag.display import format_number, format_share
from diag.instruments.causes import MAKES_STEPS_TOO_LARGE, Cause
from diag.instruments.graded import graded
from diag.instruments.optimization.divergence import LOSS_RATIO
from diag.instruments.optimization.step_size.fields import ENOUGH_STEPS, ROSE, SOURCE, MeasuredSteps
from diag.result import Level, Verdict

CERTAIN = 0.23  # from here on a step is too large also where the loss has not risen
HALF_OF_LOSS, TENTH_OF_LOSS = 0.5, 0.1  # of the first loss
BLOWN_UP = 100.0  # times the first loss: what such steps have replaced is not what training began with
GROWN = 30.0  # norm over the first norm
# Learning rates up to which an optimizer's steps are what they are in most trainings that work with it.
USUAL_RATES = {"Adam": 3e-3, "AdamW": 3e-3, "NAdam": 3e-3, "RAdam": 3e-3, "RMSprop": 3e-3, "SGD": 0.1}
OUTGROWN, NOTHING_FALLEN = 3.0, 0.02  # the same, and share of the loss: bounded ones need not rise
COMES_BACK = 100  # steps in which a loss that rose in the first ones may come back
ADAGRAD, RMSPROP = "Adagrad", "RMSprop"  # they divide by what began at zero: large at first at any rate

# Axes that are taken for one another send a gradient to the wrong places: it is large at a usual rate, too.
OF_THE_LAYOUT = (Cause.AXES_MIXED, Cause.EXAMPLES_MIXED, Cause.WRONG_CLASS_AXIS)


def too_large(steps: MeasuredSteps) -> Verdict | None:
    """The verdict on steps of more than `too_high` of the weights; None where they are not, or did no harm."""
    limit = steps.setting("too_high")
    if not steps.largest_ratio > limit or not (steps.loss_rose or _certain(steps)) or _recovered(steps):
        return None
    return graded(SOURCE, steps.largest_ratio, limit)(
        Level.WARNING if _may_recover(steps) else Level.ALARM,
        f"The steps are too large: one step moves the weights of a typical layer by "
        f"{format_share(steps.largest_ratio)} of their size (around step {steps.largest_at:,}); in "
        f"most trainings that work it is below {format_share(limit)}.{_course(steps)}",
        advice="Lower the learning rate about tenfold, or warm it up; if it must stay, clip the gradient.",
        refutation="The same training at a tenth of the learning rate ends with a loss that is not lower.",
        cause=Cause.LEARNING_RATE_TOO_HIGH,
        explained_by=(*MAKES_STEPS_TOO_LARGE, Cause.ACCUMULATION_NOT_DIVIDED, Cause.GRADIENTS_STILL_SCALED,
                      Cause.TARGETS_NOT_NORMALIZED, Cause.DATA_NOT_FINITE, Cause.INITIALIZATION_CONSTANT,
                      Cause.INPUTS_TOO_SMALL, Cause.INPUTS_CONSTANT, Cause.LABELS_SHUFFLED,
                      Cause.CLASS_WEIGHTS_WRONG, Cause.LEARNING_RATE_ZERO, Cause.NORMALIZATION_STATISTICS_BAD,
                      Cause.TARGETS_OUT_OF_RANGE, *([Cause.WEIGHT_DECAY_TOO_STRONG] if steps.shrunk else []),
                      *(OF_THE_LAYOUT if steps.rate <= USUAL_RATES.get(steps.optimizer, 0.0) else [])),
        step=steps.began_at or steps.largest_at,
    )  # fmt: skip


def _course(steps: MeasuredSteps) -> str:
    """What the loss did meanwhile, where it has a course that a ratio describes."""
    if steps.below_zero or not steps.loss_rose or not math.isfinite(steps.loss_peak_ratio):
        return ""
    if steps.lost:
        now = " and is no number now"
    else:
        now = f" and is at {format_number(steps.now)} times that value now" if math.isfinite(steps.now) else ""
    return f" The loss rose to {format_number(steps.loss_peak_ratio)} times its first value{now}."


def _certain(steps: MeasuredSteps) -> bool:
    """Whether steps are so large that it is enough that some loss was higher than the first, that they stay so
    large, or that they have made the weights manyfold as large and the loss has not fallen at all in a while.

    Layers that start near zero take steps of their own size until they have grown, and the first steps of
    Adagrad and RMSprop are large at any usual rate: there the loss must tell.
    """
    limit = steps.setting("too_high")
    large = steps.largest_ratio > max(limit, CERTAIN) and steps.tensors > 1
    enough = steps.num_steps >= ENOUGH_STEPS
    large = large and not steps.shrunk and not steps.from_nothing and steps.optimizer != ADAGRAD
    large = large and (enough or steps.optimizer != RMSPROP)
    if steps.below_zero:  # a policy's loss: its size says nothing
        return large and enough and not steps.loss_fell
    late = steps.num_steps >= COMES_BACK
    outgrown = late and steps.growth > OUTGROWN and steps.loss_fall < NOTHING_FALLEN and not steps.loss_fell
    return large and (steps.loss_peak_ratio > ROSE or (enough and steps.ratio > limit) or outgrown)


def _may_recover(steps: MeasuredSteps) -> bool:
    """Whether it cannot be said that the loss will not come back from large first steps: it is too early, or it
    has come down to half of the first one already."""
    early = steps.num_steps < (ENOUGH_STEPS if steps.now > LOSS_RATIO else COMES_BACK)
    return (early or steps.now <= HALF_OF_LOSS) and not steps.lost


def _recovered(steps: MeasuredSteps) -> bool:
    """Whether large first steps did no lasting harm: steps are as usual since, and half of the loss is gone, or
    nine tenths where it rose far. A loss that was a hundred times the first one has replaced what training
    began with.

    The first steps of Adagrad are large at any usual rate, so there the loss need not fall.
    """
    if steps.below_zero or steps.peak_then >= BLOWN_UP:
        return False
    usual = steps.num_steps >= ENOUGH_STEPS and steps.ratio <= steps.setting("too_high")
    far = not steps.loss_peak_ratio < LOSS_RATIO
    fell = steps.now <= (TENTH_OF_LOSS if far else HALF_OF_LOSS) or (steps.optimizer == ADAGRAD and not far)
    # Weights that large steps have made many times as large take steps that are small beside them.
    return usual and fell and not steps.lost and not steps.growth > GROWN
