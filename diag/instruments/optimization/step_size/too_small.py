"""Steps that are too small, and what makes them so: clipping, Adam's epsilon, or else the learning rate."""

from __future__ import annotations

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.instruments.optimization.step_size.fields import (
    ADAPTIVE_OPTIMIZERS,
    ENOUGH_STEPS,
    MEASUREMENTS_IN_A_ROW,
    SOURCE,
    MeasuredSteps,
)
from diag.result import Confidence, Level, Verdict

NOT_FALLEN = 0.1
TIGHT, NOTHING_LEFT = 0.05, 0.005
# With any gradient, Adam's step is about the learning rate for each entry: never below 0.1 of it for noise of one
# scale. A hundredth means that epsilon, or a second moment of long ago, stands in the denominator.
ADAM_SHARE = 0.02
STEPS_OF_A_TRAINING = 100
# Trainings from random weights that work end several tenths of their size away, and not on a straight way.
NOWHERE, NOT_FAR = 0.05, 0.2
STRAIGHT, PUT_BACK = 0.7, 0.1
USUAL_RATE = 1e-2  # of SGD
NOT_THE_RATE = (
    Cause.LEARNING_RATE_ZERO, Cause.SCHEDULE_TOO_FAST, Cause.SCHEDULE_ENDED_EARLY, Cause.GRADIENTS_VANISH,
    Cause.UNITS_DEAD, Cause.INITIALIZATION_SCALE, Cause.UPDATES_ROUND_TO_NOTHING, Cause.INITIALIZATION_CONSTANT,
    Cause.GRADIENT_UNDERFLOW, Cause.WEIGHTS_CHANGED_OUTSIDE, Cause.SCHEDULER_NEVER_STEPPED,
    Cause.SCHEDULE_TOO_SLOW, Cause.ADAM_EPSILON_TOO_LARGE, Cause.TARGETS_BROADCAST, Cause.EXAMPLES_MIXED,
    Cause.INPUTS_CONSTANT,
)  # fmt: skip


def too_small(steps: MeasuredSteps) -> Verdict | None:
    """The verdict on steps too small to learn in the time, by what makes them small; None where they are not."""
    limit = steps.setting("too_low")
    if steps.adam_share < ADAM_SHARE and steps.num_steps >= MEASUREMENTS_IN_A_ROW:
        if steps.epsilon > steps.gradient_size:
            return _by_epsilon(steps)
        clipped = steps.clip_factor < TIGHT and steps.num_steps >= ENOUGH_STEPS
        if clipped and steps.epsilon > steps.gradient_size * steps.clip_factor:
            return _by_clipping(steps)
    if (
        steps.clip_factor < NOTHING_LEFT
        and steps.num_steps >= ENOUGH_STEPS
        and steps.optimizer not in ADAPTIVE_OPTIMIZERS
    ):
        return _by_clipping(steps)
    if (stood := _stood_still(steps)) is not None:
        return stood
    small = steps.ratio < limit and steps.num_steps >= ENOUGH_STEPS and not steps.unpushed
    stands = not steps.loss_fell if steps.below_zero else steps.loss_fall < NOT_FALLEN
    if not small or not stands:
        return None
    if steps.clip_factor < TIGHT and steps.optimizer not in ADAPTIVE_OPTIMIZERS:
        return _by_clipping(steps)
    return graded(SOURCE, steps.ratio, limit)(
        Level.WARNING,
        f"Steps are small and the loss hardly falls: one step moves the weights of a typical layer by "
        f"{format_number(steps.ratio)} of their size, and in {steps.num_steps:,} steps the loss has "
        f"{steps.fallen}.",
        advice="Raise the learning rate ten- to a hundredfold; check that the schedule's warm-up is over.",
        refutation="The loss does not fall faster at ten times the learning rate.",
        cause=Cause.LEARNING_RATE_TOO_LOW,
        explained_by=NOT_THE_RATE,
    )


def _stood_still(steps: MeasuredSteps) -> Verdict | None:
    """Of a training that is over: it hardly left its random weights, or all its steps went one way."""
    if not steps.over or steps.num_steps < STEPS_OF_A_TRAINING or steps.unpushed or steps.below_zero:
        return None
    if not steps.travelled > 0 or not steps.loss_fall < NOT_FALLEN:
        return None
    # Weights that are put back again and again go a long way and are near their start.
    still = steps.from_scratch and steps.travelled < NOWHERE and steps.straightness > PUT_BACK
    one_way = steps.straightness > STRAIGHT and steps.travelled < NOT_FAR
    if not (still or one_way) or steps.clip_factor < TIGHT:
        return None
    where = f"{steps.num_steps:,} steps moved a typical layer by {format_share(steps.travelled)} of its size"
    how = f", {format_share(min(steps.straightness, 1.0))} of their way in one direction" if one_way else ""
    divided = steps.rate >= USUAL_RATE and steps.optimizer == "SGD"
    first = format_number(steps.first_loss)
    small = f" The learning rate ({steps.rate:g}) is not small, but the gradients are: the first loss was {first}."
    look = "Look whether the loss is divided once too often (by the batch size after a mean), or raise"
    return graded(SOURCE, steps.travelled, NOWHERE if still else NOT_FAR)(
        Level.WARNING,
        f"The weights hardly left their start: {where}{how}, and the loss has {steps.fallen}."
        + (small if divided else ""),
        advice=f"{look if divided else 'Raise'} the learning rate ten- to a hundredfold; check that the "
        "schedule's warm-up is over.",
        refutation="The loss does not fall faster at ten times the learning rate.",
        cause=Cause.LEARNING_RATE_TOO_LOW,
        explained_by=NOT_THE_RATE,
    )


def _by_epsilon(steps: MeasuredSteps) -> Verdict:
    return Verdict(
        Level.WARNING,
        f"Adam's steps are {format_share(steps.adam_share)} of the learning rate, where gradients of any size "
        f"should give about its whole: its epsilon ({steps.epsilon:g}) is larger than they are.",
        advice="Set eps to 1e-8 (1e-15 for very small gradients), or scale the loss so that gradients are larger.",
        source="Kingma, Ba 2015, arXiv:1412.6980 (the step's size); Wortsman et al. 2023, arXiv:2309.14322",
        confidence=Confidence.STRONG_EMPIRICAL,
        refutation="The steps keep their size when eps is set to 1e-15.",
        value=steps.adam_share,
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


def _by_clipping(steps: MeasuredSteps) -> Verdict:
    return graded(SOURCE, steps.clip_factor, TIGHT)(
        Level.WARNING,
        f"Clipping cuts the gradient to {format_share(steps.clip_factor)} of its length at a typical "
        f"step{_below_epsilon(steps)}, and the loss has {steps.fallen} in {steps.num_steps:,} steps.",
        advice="Raise the clipping threshold to about the median norm of the gradient, or the learning rate.",
        confidence=Confidence.ARITHMETIC,
        refutation="The loss falls no faster without clipping.",
        cause=Cause.CLIPPING_TOO_TIGHT,
        explained_by=(Cause.CLIPPING_BEFORE_UNSCALING,),
        step=1,
    )


def _below_epsilon(steps: MeasuredSteps) -> str:
    if steps.optimizer not in ADAPTIVE_OPTIMIZERS:
        return ""
    return (
        f", to entries far below Adam's epsilon ({steps.epsilon:g}), so that its steps are "
        f"{format_share(steps.adam_share)} of the learning rate"
    )
