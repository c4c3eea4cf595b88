"""The map of layer by step: a gradient norm or an update ratio a cell, decimated without losing an extreme."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.reporting.plain import rounded
from diag.reporting.timeline import Axis
from diag.snapshot.history import CELLS, History, taken, unmap

MAX_CELLS = 12_000
FEWEST_HEAT_COLUMNS, MOST_HEAT_COLUMNS = 40, 160
FAR = 1.0  # in log10

Table = NDArray[numpy.float64]


def heatmaps(axis: Axis, history: History, chosen: list[int]) -> list[dict[str, Any]]:
    """The maps of the layers `chosen`, over equal parts of the step axis.

    A cell shows the median of its steps or, where one of them lies more than a factor of ten from it, the
    farthest: neither a spike nor a collapse is averaged away, and noise does not flicker.
    """
    bins = axis.bins(
        history.steps, max(FEWEST_HEAT_COLUMNS, min(MOST_HEAT_COLUMNS, MAX_CELLS // max(1, len(chosen))))
    )
    columns = [rows for _, _, rows in bins]

    def gradient(rows: Any) -> Table:
        return _part(history.gradient_norm, rows, chosen)

    def update_ratio(rows: Any) -> Table:
        return ratio(_part(history.update_norm, rows, chosen), _part(history.parameter_norm, rows, chosen))

    broken = [
        [int(layer), column]
        for column, rows in enumerate(columns)
        for layer in numpy.flatnonzero((_part(history.gradient_finite, rows, chosen) == 0).any(axis=0))
    ]
    made = [
        _map("gradient_norm", "Gradient norm", gradient, columns),
        _map("update_ratio", "Update / parameter norm", update_ratio, columns),
    ]
    about = {"starts": [a for a, _, _ in bins], "ends": [b for _, b, _ in bins], "nonfinite": broken}
    return [m | about for m in made if m is not None]


def _part(table: Any, rows: slice, chosen: list[int]) -> Table:
    """Some rows of the chosen columns; what was read of a mapped file does not stay in memory."""
    part = numpy.asarray(table[rows][:, chosen], numpy.float64)
    unmap(table)
    return part


def _map(name: str, label: str, read: Callable[[Any], Table], columns: list[slice]) -> dict[str, Any] | None:
    """One map with the range of its colours; None where nothing positive was observed."""
    values = numpy.stack([_telling(read(rows)) for rows in columns], axis=1)
    logs = log10(values[values > 0])
    if not len(logs):
        return None
    low, high = (float(v) for v in numpy.percentile(logs, [0.5, 99.5]))
    pad = 0.5 if high - low < 1e-6 else 0.0
    rounded_rows = [rounded(row, 3) for row in values]
    return {"name": name, "label": label, "low": low - pad, "high": high + pad, "values": rounded_rows}


def _telling(part: Table) -> Table:
    """Of each layer's values (T, L): their median, or the farthest from it if that is far: (L,), NaN for none."""
    part = numpy.where(numpy.isfinite(part), part, numpy.nan)
    if not len(part):
        return numpy.full(part.shape[1], numpy.nan)
    centre = median_by_layer(part)
    low, high = numpy.fmin.reduce(part, axis=0), numpy.fmax.reduce(part, axis=0)
    above = _distance(high, centre) >= _distance(low, centre)
    farthest = numpy.asarray(numpy.where(above, high, low), numpy.float64)
    return numpy.asarray(numpy.where(_distance(farthest, centre) > FAR, farthest, centre), numpy.float64)


def _distance(values: Table, centre: Table) -> Any:
    with numpy.errstate(invalid="ignore"):
        return numpy.nan_to_num(numpy.abs(log10(values) - log10(centre)), nan=0.0, posinf=numpy.inf)


def ratio(update: Table, size: Table) -> Table:
    """Update norm over parameter norm; NaN where the parameters are zero or nothing was observed."""
    with numpy.errstate(divide="ignore", invalid="ignore"):
        return numpy.where(size > 0, update / size, numpy.nan)


def median_by_layer(table: Any, over: Any = None) -> Table:
    """The median of each layer's finite values (T, L) -> (L,), or of their ratio to `over`; NaN for a layer never
    observed."""
    width = max(1, CELLS // max(1, len(table)))
    found = []
    for some in (slice(i, i + width) for i in range(0, table.shape[1], width)):
        part = numpy.asarray(table[:, some], numpy.float64)
        found.append(_median(part if over is None else ratio(part, numpy.asarray(over[:, some], numpy.float64))))
    return numpy.concatenate(found) if found else numpy.empty(0)


def _median(table: Table) -> Table:
    usable = numpy.isfinite(table)
    if usable.all():
        return numpy.asarray(numpy.median(table, axis=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return numpy.asarray(numpy.nanmedian(numpy.where(usable, table, numpy.nan), axis=0))


def log10(values: Any) -> Any:
    """log10, with -inf for zero and NaN for what is not finite."""
    with numpy.errstate(divide="ignore", invalid="ignore"):
        return numpy.log10(values)


def evenly(history: History, at_most: int) -> History:
    """The record itself, or `at_most` rows of it spread evenly."""
    if len(history) <= at_most:
        return history
    return taken(history, numpy.unique(numpy.linspace(0, len(history) - 1, at_most).round().astype(int)))
