"""What the record of a run says as a whole: growth of the distance, change over the depth, idle layers."""

from __future__ import annotations

import math
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.linalg.growth import Fit, fit_growth, log_spaced
from diag.snapshot.history import History, by_rows, parts

FIRST_STEP = 10  # the laws of growth are fitted from here on, after what a warm-up or the first steps do
DECADES = 2.0  # and only over this many decades of steps at one learning rate
FIT_POINTS = 200
FEWEST_READ = 10  # steps at which a gradient was zero, from which on it is said to be so all along


def growth_of_distance(
    history: History, distance: NDArray[numpy.float64]
) -> tuple[dict[str, Fit] | None, int, int]:
    """The fitted laws and the first and last step they cover; (None, 0, 0) where two decades are not there."""
    usable = (history.steps >= FIRST_STEP) & (distance > 0) & numpy.isfinite(distance)
    chosen = _longest_phase(history.steps, history.learning_rate, usable)
    t, d = history.steps[chosen].astype(float), distance[chosen]
    if len(t) < 3 or math.log10(t[-1] / t[0]) < DECADES:
        return None, 0, 0
    points = log_spaced(history.steps[chosen], FIT_POINTS)
    return fit_growth(t[points], d[points]), int(t[0]), int(t[-1])


def _longest_phase(steps: NDArray[Any], rate: NDArray[Any], usable: NDArray[Any]) -> NDArray[numpy.int64]:
    """The rows of the longest stretch, in log t, of usable steps at one learning rate."""
    rows = numpy.flatnonzero(usable)
    if not len(rows):
        return rows
    same = (rate[rows[1:]] == rate[rows[:-1]]) | (numpy.isnan(rate[rows[1:]]) & numpy.isnan(rate[rows[:-1]]))
    phases = numpy.split(rows, numpy.flatnonzero(~same) + 1)
    return max(phases, key=lambda phase: steps[phase[-1]] / steps[phase[0]])


def normalisation_layers(history: History) -> NDArray[numpy.bool_]:
    """Which tensors are the scale or shift of a normalisation layer: weight and bias of one size.

    A linear layer's weight is larger than its bias unless it has a single input.
    """
    sizes = dict(zip(history.layers, history.sizes, strict=True))
    modules = [name.rpartition(".")[0] for name in history.layers]
    twins = {m for m in modules if sizes.get(f"{m}.weight", -1) == sizes.get(f"{m}.bias", -2)}
    return numpy.array([module in twins for module in modules], bool)


def factor_over_depth(history: History) -> float:
    """exp of the log-linear fit's change from the last layer to the first in the first step's bias gradients."""
    biases = numpy.array([name.endswith("bias") for name in history.layers], bool) & ~normalisation_layers(history)
    norms = history.gradient_norm[0, biases].astype(float)
    if len(norms) < 3 or not (numpy.isfinite(norms) & (norms > 0)).all():
        return math.nan
    depth = numpy.arange(len(norms))
    slope = float(numpy.polyfit(depth, numpy.log(norms), 1)[0])
    return math.exp(-slope * depth[-1])


def norm_at_start(history: History, weights: NDArray[numpy.bool_]) -> float:
    """The parameters' norm at the first step at which it was observed; NaN where it never was."""
    norms = by_rows(history, lambda h: numpy.sqrt((h.parameter_norm[:, weights].astype(float) ** 2).sum(1)))
    known = norms[numpy.isfinite(norms)]
    return float(known[0]) if len(known) else math.nan


def idle_layers(history: History) -> tuple[str, ...]:
    """The layers whose gradient was zero at every step at which it was read, of `FEWEST_READ` or all; a single
    number is none: the bias of one output cancels in a loss of differences, as of a critic or a ranking."""
    norms = [part.gradient_norm for part in parts(history)]
    read = numpy.sum([(~numpy.isnan(n)).sum(0) for n in norms], 0)
    zero = numpy.sum([(n == 0).sum(0) for n in norms], 0)
    finite = numpy.logical_and.reduce([part.gradient_finite.all(0) for part in parts(history)])
    idle = finite & (zero == read) & (read >= min(FEWEST_READ, max(len(history), 1)))
    several = numpy.asarray(history.sizes) > 1
    return tuple(name for name, always in zip(history.layers, idle & several, strict=True) if always)


def unseen_layers(history: History) -> tuple[str, ...]:
    """The tensors that had no gradient at any step."""
    unseen = [(numpy.isnan(part.gradient_norm) & part.gradient_finite).all(0) for part in parts(history)]
    return tuple(n for n, none in zip(history.layers, numpy.logical_and.reduce(unseen), strict=True) if none)


def never_moved(history: History, at_least: int) -> bool:
    """Whether the weights were looked at after so many steps that were taken, and stood where they began."""
    looked, moved = 0, False
    for part in parts(history):
        seen = ~numpy.isnan(part.distance).all(1) & ~part.skipped
        looked += int(seen.sum())
        moved = moved or bool((numpy.nan_to_num(part.distance[seen]) > 0).any())
    return looked >= at_least and not moved


def most_often(history: History, counts: NDArray[numpy.int64]) -> tuple[str, ...]:
    """The layers with a count, the largest first."""
    order = numpy.argsort(-counts, kind="stable")
    return tuple(history.layers[i] for i in order if counts[i])
