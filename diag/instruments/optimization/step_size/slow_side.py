"""One of several optimizers whose steps are next to nothing beside those of the others, as of a generator's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy

from diag.display import format_number, format_share
from diag.errors import named
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.instruments.optimization.course import update_ratios
from diag.instruments.optimization.step_size.fields import SOURCE, MeasuredSteps
from diag.instruments.optimization.step_size.too_small import NOT_THE_RATE
from diag.result import Level, Verdict
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop

FARTHEST_MOVED, OF_THE_OTHER = 0.01, 0.01  # of the weights, by all steps together; times the other side's steps
STEPS_OF_SIDES = 100  # of a training that is over


@dataclass(frozen=True)
class SlowSide:
    """The side of a training with several losses whose steps are the smallest, where they are next to nothing.

    Named as in the result. slow_layers: its tensors; slow_ratio: step over weights, the median over tensors and
    steps, `slow_other` that of the fastest side. slow_farthest: how far all steps together can have moved a layer,
    over its size.
    """

    slow_layers: tuple[str, ...] = ()
    slow_ratio: float = math.nan
    slow_other: float = math.nan
    slow_farthest: float = math.nan


def slow_side(history: History, loop: Loop | None) -> SlowSide:
    """The one whose steps, all in one direction, would not have moved a layer by a hundredth of its size, while
    another's are a hundred times as large; of a training that is over."""
    if loop is None or not loop.ended or history.total_steps < STEPS_OF_SIDES:
        return SlowSide()
    sides = [tuple(sorted(side & set(history.layers))) for side in loop.sides]
    found = [(side, *update_ratios(history, side)) for side in sides if side]
    typical = [(float(numpy.median(r)), side) for side, r, _, tensors in found if tensors and len(r)]
    if len(typical) < 2:
        return SlowSide()
    (ratio, side), (other, _) = min(typical), max(typical)
    farthest = ratio * int(history.total_steps)
    slow = farthest < FARTHEST_MOVED and ratio < OF_THE_OTHER * other
    return SlowSide(side, ratio, other, farthest) if slow else SlowSide()


def of_the_slow_side(steps: MeasuredSteps) -> Verdict | None:
    """The verdict on it; None where there is none."""
    if not steps.slow_layers:
        return None
    at_most = (
        f"even all in one direction, {steps.num_steps:,} of them move it by {format_share(steps.slow_farthest)}"
    )
    return graded(SOURCE, steps.slow_farthest, FARTHEST_MOVED)(
        Level.WARNING,
        f"One of the optimizers hardly moves what it holds ({named(steps.slow_layers, 3)}): a step changes a "
        f"typical layer there by {format_number(steps.slow_ratio)} of its size ({at_most}), and one of "
        f"the other side by {format_number(steps.slow_other)}.",
        advice="Raise this optimizer's learning rate; look at its schedule, and at what its loss is multiplied by.",
        refutation="At a learning rate like that of the other side it learns no more.",
        cause=Cause.LEARNING_RATE_TOO_LOW,
        explained_by=NOT_THE_RATE,
        step=1,
    )
