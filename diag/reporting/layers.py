"""The layers of a run: one row of a table a layer, and a map of layer by step (`heatmap`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.reporting.heatmap import evenly, heatmaps, log10, median_by_layer
from diag.reporting.plain import clean, rounded
from diag.reporting.timeline import Axis
from diag.run.entries import Finding
from diag.snapshot.history import CELLS, History, parts

MAX_LAYERS = 300
MEDIAN_ROWS = 2_000

LAYER_COLUMNS = (
    ("size", "Elements", ""),
    ("gradient_median", "Gradient norm, median", "2-norm before clipping"),
    ("gradient_lowest", "Lowest", "of the finite gradient norms"),
    ("gradient_highest", "Highest", "of the finite gradient norms"),
    ("ratio_median", "Update / parameter, median", "norm of a step's update over the parameter norm"),
    ("parameter_last", "Parameter norm, last", "2-norm after the last recorded step"),
    ("distance_last", "Distance from start, last", "2-norm of the change since the first step"),
    ("nonfinite", "Non-finite steps", "steps whose gradient has an infinite or NaN entry"),
)


def layer_map(axis: Axis | None, history: History, findings: Iterable[Finding]) -> dict[str, Any] | None:
    """Map and table of the layers; of very many, those that stand out (`left_out` says how many do not). None where
    the record has none, as that of an imported log."""
    if not history.layers:
        return None
    named = _named(history, findings)
    columns = _columns(history)
    chosen = _conspicuous(history, columns, named)
    rows = [
        {
            "name": clean(history.layers[i]),
            "findings": named.get(history.layers[i], []),
            **{key: _cell(float(columns[key][i])) for key, _, _ in LAYER_COLUMNS},
        }
        for i in chosen
    ]
    return {
        "columns": [{"key": key, "title": title, "description": text} for key, title, text in LAYER_COLUMNS],
        "rows": rows,
        "left_out": len(history.layers) - len(chosen),
        "median_of": min(len(history), _median_rows(history)),
        "maps": [] if axis is None else heatmaps(axis, history, chosen),
    }


def _cell(value: float) -> float | int | None:
    return int(value) if value.is_integer() and abs(value) < 1e7 else rounded([value])[0]


def _named(history: History, findings: Iterable[Finding]) -> dict[str, list[str]]:
    """The instruments whose verdict names a layer or the module it belongs to."""
    found: dict[str, list[str]] = {}
    for finding in findings:
        if finding.verdict.level.severity > 1:
            continue
        for layer in history.layers:
            if any(layer == name or layer.startswith(f"{name}.") for name in finding.verdict.layers):
                found.setdefault(layer, []).append(finding.instrument)
    return found


def _columns(history: History) -> dict[str, NDArray[numpy.float64]]:
    """A value a layer for each column of the table, (L,) each."""
    sample = evenly(history, _median_rows(history))
    low, high, broken = _extremes(history)
    return {
        "size": numpy.asarray(history.sizes, numpy.float64),
        "gradient_median": median_by_layer(sample.gradient_norm),
        "gradient_lowest": low,
        "gradient_highest": high,
        "ratio_median": median_by_layer(sample.update_norm, sample.parameter_norm),
        "parameter_last": _last(history.parameter_norm),
        "distance_last": _last(history.distance),
        "nonfinite": broken,
    }


def _median_rows(history: History) -> int:
    """Of how many rows the medians are taken: fewer where there are very many layers."""
    return max(MEDIAN_ROWS // 10, min(MEDIAN_ROWS, CELLS // max(1, len(history.layers))))


def _extremes(history: History) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Least and greatest finite gradient norm of each layer, and the number of steps where it was not finite."""
    width = len(history.layers)
    low, high, broken = numpy.full(width, numpy.nan), numpy.full(width, numpy.nan), numpy.zeros(width)
    for rows in parts(history):
        if not len(rows):
            break
        part = numpy.asarray(rows.gradient_norm, numpy.float64)
        part = numpy.where(numpy.isfinite(part), part, numpy.nan)
        low = numpy.fmin(low, numpy.fmin.reduce(part, axis=0))
        high = numpy.fmax(high, numpy.fmax.reduce(part, axis=0))
        broken += (~rows.gradient_finite).sum(axis=0)
    return low, high, broken


def _last(table: Any) -> NDArray[numpy.float64]:
    """The last observed value of each layer."""
    tail = numpy.asarray(table[-256:], numpy.float64)
    observed = ~numpy.isnan(tail)
    last = len(tail) - 1 - observed[::-1].argmax(axis=0)
    return tail[last, numpy.arange(tail.shape[1])]


def _conspicuous(history: History, columns: Mapping[str, Any], named: Mapping[str, Any]) -> list[int]:
    """The layers to show, in the network's order: those named, broken, or far from the others."""
    count = len(history.layers)
    if count <= MAX_LAYERS:
        return list(range(count))
    scales = log10(columns["gradient_median"])
    centre = numpy.nanmedian(scales) if numpy.isfinite(scales).any() else 0.0
    far = numpy.nan_to_num(numpy.abs(scales - centre), nan=0.0, posinf=1e9, neginf=1e9)
    order = sorted(
        range(count), key=lambda i: (history.layers[i] not in named, -columns["nonfinite"][i], -far[i], i)
    )
    return sorted(order[:MAX_LAYERS])
