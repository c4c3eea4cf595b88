"""What the record of the steps says of their size, and of what makes them large or small."""

from __future__ import annotations

import math
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.instruments.optimization.course import (
    MOST_NORMS,
    SMALL,
    finite_losses,
    highest_loss,
    left_of_loss,
    median,
    moved_from_zero,
    scatter,
    update_ratios,
)
from diag.instruments.optimization.divergence import LOSS_RATIO
from diag.instruments.optimization.step_size.fields import ADAPTIVE_OPTIMIZERS, MEASUREMENTS_IN_A_ROW, ROSE
from diag.snapshot.history import History, by_rows, thinned_record
from diag.snapshot.loop.facts import Loop

FROM_NOTHING = 0.03  # root mean square of the weights times the root of the fan-in; usual is 0.5 to 1.5


def of_the_fastest(history: History, loop: Loop | None, limit: float) -> tuple[Any, tuple[float, int, int]]:
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


def ratio_before_decay(history: History, medians: NDArray[numpy.float64], steps: NDArray[Any]) -> float:
    """The median ratio where the schedule had not yet lowered the learning rate: late in a schedule steps are
    meant to be small."""
    rates = numpy.asarray(history.learning_rate, float)[numpy.isin(history.steps, steps)]
    rates = numpy.nan_to_num(rates, nan=numpy.inf)
    high = rates >= rates.max() / 2 if len(rates) else numpy.zeros(0, bool)
    return float(median(medians[high])) if high.any() else math.nan


def clip_factor(history: History) -> float:
    """The norm of the gradient as applied over that before clipping: the median step; NaN where not recorded."""
    total = by_rows(history, lambda h: numpy.sqrt(numpy.nansum(numpy.square(h.gradient_norm, dtype=float), axis=1)))
    with numpy.errstate(divide="ignore", invalid="ignore"):
        factors = history.applied_gradient_norm / total
    factors = factors[numpy.isfinite(factors)]
    return float(numpy.median(factors)) if len(factors) else math.nan


def gradient_size(history: History) -> float:
    """The root mean square of the gradient's entries: the median over large tensors and steps."""
    history = thinned_record(history, MOST_NORMS)
    sizes = numpy.asarray(history.sizes, float)
    large = sizes >= SMALL
    each = numpy.asarray(history.gradient_norm[:, large], float) / numpy.sqrt(sizes[large])
    return float(median(numpy.where(numpy.isfinite(each) & (each > 0), each, numpy.nan)))


def adam_share(history: History) -> float:
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


def rose(history: History, loop: Loop | None, at: int, scatters: float) -> bool:
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


def from_nothing(history: History, loop: Loop | None) -> bool:
    """Whether the median layer's weights began next to zero or all alike: it takes steps of its own size until it
    has grown, whatever the learning rate is. So do weights of which most began at zero, unless the loss left at
    once."""
    start = () if loop is None else loop.start
    alike = len(start) > 0 and bool(numpy.median([0.0 if w.constant else w.gain for w in start]) < FROM_NOTHING)
    return alike or (moved_from_zero(history) and not _left_at_once(history))
