"""What the record of the steps says of a training's course, for the checks of this folder.

Losses are compared by medians, so that a single bad batch decides nothing. Tensors of fewer than `SMALL`
entries are left out where sizes are compared: biases start at zero and scales at one, so a ratio to their norm
says little.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.snapshot.history import History, by_rows, parts, thinned_record

SMALL = 64
FROM_ZERO = 1e-3  # of a tensor's norm: rounding, and the rest of what it began with
OF_SECOND_DIFFERENCES = 1.4826 / math.sqrt(6.0)  # of their median size, for normal noise
LAST_LOSSES = 5
MOST_ON_THE_WAY = 256  # steps of which the way is put together
MOST_NORMS = 1 << 20  # steps times tensors over which a median is taken
Floats = NDArray[numpy.float64]


def finite_losses(history: History) -> tuple[Floats, NDArray[Any]]:
    """The losses that were seen and finite, and the steps that they led to."""
    seen = numpy.isfinite(history.loss)
    return numpy.asarray(history.loss[seen], float), numpy.asarray(history.steps[seen])


def left_of_loss(history: History) -> float:
    """The median of the last tenth of the losses, and of `LAST_LOSSES` at least, over the first one; NaN where
    losses are negative or that is zero."""
    losses, _ = finite_losses(history)
    if not len(losses) or not losses[0] > 0 or losses.min() < 0:
        return math.nan
    return float(median(losses[-max(LAST_LOSSES, len(losses) // 10) :]) / losses[0])


def highest_loss(history: History) -> float:
    """The largest loss over the first one; NaN where that is not positive."""
    losses, _ = finite_losses(history)
    return float(losses.max() / losses[0]) if len(losses) and losses[0] > 0 else math.nan


def median(values: Any, axis: int | None = None) -> Any:
    """The median over what is not NaN; NaN where there is nothing."""
    # numpy.nanmedian goes by masked arrays where there are few values, which takes ten times as long.
    x = numpy.asarray(values, float)
    if axis is None or x.ndim == 1:
        values_seen = numpy.sort(x[~numpy.isnan(x)])  # of one dimension
        between = values_seen[(len(values_seen) - 1) // 2 : len(values_seen) // 2 + 1]
        with numpy.errstate(invalid="ignore", over="ignore"):
            return between.mean() if len(between) else numpy.float64(numpy.nan)
    x = numpy.sort(numpy.moveaxis(x, axis, -1), axis=-1)  # NaNs come last
    if not x.shape[-1]:
        return numpy.full(x.shape[:-1], numpy.nan)[()]
    seen = numpy.count_nonzero(~numpy.isnan(x), axis=-1, keepdims=True)
    places = (numpy.maximum(seen - 1, 0) // 2, numpy.minimum(seen // 2, x.shape[-1] - 1))
    middle = [numpy.take_along_axis(x, place, -1) for place in places]
    with numpy.errstate(invalid="ignore", over="ignore"):
        return numpy.mean(middle, axis=0)[..., 0][()]


def update_ratios(history: History, names: Collection[str] = ()) -> tuple[Floats, NDArray[Any], int]:
    """||step|| / ||weights|| over the large tensors, at the steps at which both were taken.

    Returns its median over the tensors at each of these steps (T,), the steps (T,), and how many tensors there are.
    names: of the tensors that count; empty: all. The weights are those after the step. Tensors that did not move at
    any of these steps are left out, and those that began at zero, where there are others.
    """
    counts = numpy.array([not names or name in names for name in history.layers], bool)
    large = numpy.flatnonzero((numpy.asarray(history.sizes) >= SMALL) & counts)
    moved = numpy.zeros(len(large), bool)

    def seen(part: History) -> NDArray[Any]:
        ratios = _ratios(part, large)
        rows = numpy.isfinite(ratios).any(1) & ~part.skipped
        numpy.logical_or(moved, (numpy.nan_to_num(ratios[rows]) > 0).any(0), out=moved)
        return rows

    rows = by_rows(history, seen)
    usual = moved & ~began_at_zero(history)[large]
    chosen = large[usual if usual.any() else moved]
    medians = by_rows(history, lambda part: median(_ratios(part, chosen), axis=1))
    return medians[rows], numpy.asarray(history.steps[rows]), len(chosen)


def largest_update_ratio(history: History) -> float:
    """The largest of ||step|| / ||weights|| over the large tensors and all steps; 0 where none was taken. Tensors
    that began at zero, as biases do, are left out: their first step is all that they are."""
    large = _of_usual_start(history)
    found = (numpy.nan_to_num(_ratios(part, large)[~part.skipped]).max(initial=0.0) for part in parts(history))
    return float(max(found))


def farthest(history: History) -> float:
    """How far the large tensors are from where they began, over their norm: the farthest at the last step at which
    it was measured; 0 where it was not. Those that began at zero are left out."""
    large = _of_usual_start(history)
    rows = numpy.flatnonzero(by_rows(history, lambda h: numpy.isfinite(h.distance[:, large]).any(1)))
    if not len(rows) or not len(large):
        return 0.0
    return float(numpy.nan_to_num(_away(history, int(rows[-1]), large)).max())


def travel(history: History) -> tuple[float, float]:
    """Of the median large tensor, of those that did not begin at zero: how far the last record of it is from the
    start, over its norm; and over the length of the way that its steps went. NaN where distances were not measured.

    Steps between two that were measured are taken to be as long as a straight line between these two lengths."""
    large = _of_usual_start(history)
    measured = by_rows(
        history,
        lambda h: numpy.isfinite(h.update_norm[:, large]).any(1) & numpy.isfinite(h.distance[:, large]).any(1),
    )
    rows = numpy.flatnonzero(measured & ~history.skipped) if len(large) else numpy.zeros(0, int)
    if len(rows) < 2:
        return math.nan, math.nan
    rows = rows[numpy.unique(numpy.linspace(0, len(rows) - 1, MOST_ON_THE_WAY).astype(int))]
    steps = history.steps[rows].astype(float)
    lengths = numpy.asarray(history.update_norm[rows][:, large], float)
    way = lengths[0] + (0.5 * (lengths[1:] + lengths[:-1]) * numpy.diff(steps)[:, None]).sum(0)
    distance = numpy.asarray(history.distance[rows[-1]][large], float)
    return float(median(_away(history, int(rows[-1]), large))), float(median(_quotient(distance, way)))


def _of_usual_start(history: History) -> NDArray[Any]:
    """The numbers of the large tensors that did not begin at zero."""
    return numpy.flatnonzero((numpy.asarray(history.sizes) >= SMALL) & ~began_at_zero(history))


def _away(history: History, row: int, tensors: NDArray[Any]) -> Floats:
    """How far these tensors are from where they began, over their norm, at one row of the record."""
    return _quotient(history.distance[row][tensors], history.parameter_norm[row][tensors])


def began_at_zero(history: History) -> NDArray[numpy.bool_]:
    """Which tensors were zero at the start: where they were measured first, they are as large as they are far from
    there."""
    rows = numpy.flatnonzero(by_rows(history, lambda h: numpy.isfinite(h.distance).any(1)))
    if not len(rows):
        return numpy.zeros(len(history.sizes), bool)
    size, distance = (numpy.asarray(x[rows[0]], float) for x in (history.parameter_norm, history.distance))
    found: NDArray[numpy.bool_] = (size > 0) & (numpy.abs(distance - size) <= FROM_ZERO * size)
    return found


def moved_from_zero(history: History) -> bool:
    """Whether all large tensors that moved began at zero: a step over their norm is their first growth."""
    large = numpy.asarray(history.sizes) >= SMALL
    moved = large & numpy.logical_or.reduce([(numpy.nan_to_num(p.update_norm) > 0).any(0) for p in parts(history)])
    return bool(moved.any() and began_at_zero(history)[moved].all())


def _ratios(history: History, tensors: NDArray[Any]) -> Floats:
    return _quotient(history.update_norm[:, tensors], history.parameter_norm[:, tensors])


def _quotient(above: Any, below: Any) -> Floats:
    """One over the other in float64; NaN where that is not finite."""
    with numpy.errstate(divide="ignore", invalid="ignore"):
        found: Floats = numpy.asarray(above, float) / below
    found[~numpy.isfinite(found)] = numpy.nan
    return found


def unpushed(history: History) -> bool:
    """Whether the gradient of a typical large tensor is exactly zero at a typical step (medians): not a small one,
    but none, as nothing reaches it or it is zeroed before the step."""
    history = thinned_record(history, MOST_NORMS)
    large = numpy.asarray(history.sizes) >= SMALL
    sizes = median(history.gradient_norm[:, large], axis=1) if large.any() else numpy.zeros(0)
    return bool(numpy.isfinite(sizes).any() and median(sizes) == 0)


def growth(history: History, at: int) -> float:
    """How many times its first norm the median large tensor has at step `at`; NaN where norms were not recorded."""
    large = numpy.asarray(history.sizes) >= SMALL
    seen = by_rows(history, lambda h: numpy.isfinite(h.parameter_norm[:, large]).any(1))
    before = numpy.flatnonzero(seen & (history.steps <= at))
    if not len(before):
        return math.nan
    first, last = numpy.asarray(history.parameter_norm[before[[0, -1]]][:, large], float)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        return float(median(last / first))


def scatter(values: Floats) -> float:
    """The standard deviation of these values around their course, by their second differences, which have six times
    the variance of white noise around a straight line; NaN of fewer than three."""
    if len(values) < 3:
        return math.nan
    return float(OF_SECOND_DIFFERENCES * numpy.median(numpy.abs(numpy.diff(values, 2))))


def fell(losses: Floats) -> bool:
    """Whether the mean loss of the last third is below that of the first by two standard errors or more: for losses
    that are negative, or change their sign, of which a share says nothing."""
    if len(losses) < 6:
        return True
    first, last, error = thirds(losses)
    return first - last > 2 * error


def thirds(losses: Floats) -> tuple[float, float, float]:
    """The mean loss of the first third and of the last, and the standard error of their difference; of six losses
    or more."""
    third = len(losses) // 3
    first, last = losses[:third], losses[-third:]
    error = numpy.hypot(first.std(ddof=1), last.std(ddof=1)) / numpy.sqrt(third)
    return float(first.mean()), float(last.mean()), float(error)


def fall(losses: Floats) -> float:
    """How far the median loss has fallen from the first tenth of the record to the last, as a share of the first
    tenth's; negative where it rose, NaN where there are fewer than ten losses or they begin at zero or below."""
    tenth = len(losses) // 10
    if tenth < 1:
        return float("nan")
    first, last = median(losses[: max(tenth, 3)]), median(losses[-max(tenth, 3) :])
    return float((first - last) / first) if first > 0 else float("nan")
