"""What the record of the steps says of a training's course, for the checks of this folder.

Losses are compared by medians, so that a single bad batch decides nothing. Tensors of fewer than `SMALL` entries
are left out where sizes are compared: biases start at zero and scales at one, so a ratio to their norm says little.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.snapshot.history import History

SMALL = 64
Floats = NDArray[numpy.float64]


def finite_losses(history: History) -> tuple[Floats, NDArray[Any]]:
    """The losses that were seen and finite, and the steps that they led to."""
    seen = numpy.isfinite(history.loss)
    return numpy.asarray(history.loss[seen], float), numpy.asarray(history.steps[seen])


def median(values: Any, axis: int | None = None) -> Any:
    """The median over what is not NaN; NaN where there is nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return numpy.nanmedian(numpy.asarray(values, float), axis=axis)


def update_ratios(history: History) -> tuple[Floats, NDArray[Any]]:
    """||step|| / ||weights|| of each large tensor at the steps at which both were taken: (steps, tensors), steps.

    The weights are those after the step. Tensors that did not move at any of these steps are left out.
    """
    large = numpy.asarray(history.sizes) >= SMALL
    with numpy.errstate(divide="ignore", invalid="ignore"):
        ratios = numpy.asarray(history.update_norm[:, large], float) / history.parameter_norm[:, large]
    ratios[~numpy.isfinite(ratios)] = numpy.nan
    rows = numpy.isfinite(ratios).any(1) & ~history.skipped
    ratios = ratios[rows]
    moved = (numpy.nan_to_num(ratios) > 0).any(0) if len(ratios) else numpy.zeros(ratios.shape[1], bool)
    return ratios[:, moved], numpy.asarray(history.steps[rows])


def fall(losses: Floats) -> float:
    """How far the median loss has fallen from the first tenth of the record to the last, as a share of the first
    tenth's; negative where it rose, NaN where there are fewer than ten losses or they begin at zero or below."""
    tenth = len(losses) // 10
    if tenth < 1:
        return float("nan")
    first, last = median(losses[: max(tenth, 3)]), median(losses[-max(tenth, 3) :])
    return float((first - last) / first) if first > 0 else float("nan")
