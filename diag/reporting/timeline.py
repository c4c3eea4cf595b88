"""The time axis that all of a report shares, and the curves and lanes drawn along it.

Long series are decimated by minimum and maximum, so that no spike is lost. A position on the axis is a share of
its width; step s of a run from a to b stands at (s - a + 1/2) / (b - a + 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_number
from diag.reporting.plain import clean, rounded
from diag.result import Result
from diag.run.entries import Event, Finding
from diag.snapshot.history import History, by_rows

CURVE_POINTS = 480
MOST_EVENTS_DRAWN = 40
MAX_DOTS = 60
MAX_LOGGED = 12  # curves of the user's own
LOG_SPAN = 30.0


@dataclass(frozen=True)
class Axis:
    """The steps from `first` to `last`."""

    first: int
    last: int

    @property
    def span(self) -> int:
        """The length of the axis, in steps."""
        return self.last - self.first + 1

    def position(self, step: float) -> float:
        """The share of the axis at which `step` stands, in [0, 1]."""
        return round(min(1.0, max(0.0, (step - self.first + 0.5) / self.span)), 5)

    def bins(self, steps: NDArray[numpy.int64], at_most: int) -> list[tuple[int, int, slice]]:
        """(first step, last step, rows) of at most `at_most` equal parts of the axis; a part may have no rows."""
        count = max(1, min(at_most, self.span, len(steps)))
        edges = self.first + numpy.arange(count + 1) * self.span // count
        rows = numpy.searchsorted(steps, edges)
        return [
            (int(a), int(b) - 1, slice(int(i), int(j)))
            for a, b, i, j in zip(edges[:-1], edges[1:], rows[:-1], rows[1:], strict=True)
        ]


def axis_of(history: History | None, findings: Sequence[Finding], last_step: int) -> Axis | None:
    """The axis that holds every step of the run; None where there is no time course."""
    firsts = [f.first_step for f in findings] + ([int(history.steps[0])] if history is not None else [])
    lasts = [f.last_step for f in findings] + ([int(history.steps[-1])] if history is not None else [])
    if not firsts or max(lasts) <= min(firsts):
        return None
    return Axis(min(firsts), max([*lasts, last_step]))


def timeline(
    axis: Axis,
    history: History | None,
    findings: Iterable[Finding],
    events: Sequence[Event],
    metrics: Mapping[str, Sequence[tuple[int, float]]] = MappingProxyType({}),
) -> dict[str, Any]:
    """The axis, the curves of the whole run and of what the user logged, a lane for each finding and the events."""
    curves = [] if history is None else list(_curves(axis, history))
    return {
        "first_step": axis.first,
        "last_step": axis.last,
        "ticks": step_ticks(axis),
        "curves": [*curves, *_logged(axis, metrics)],
        "once": _once(metrics),
        "lanes": [_lane(axis, finding) for finding in findings],
        "events": [_event(axis, event) for event in events[:MOST_EVENTS_DRAWN]],
        "events_left_out": max(0, len(events) - MOST_EVENTS_DRAWN),
    }


def step_ticks(axis: Axis, about: int = 6) -> list[dict[str, Any]]:
    """Round step numbers along the axis."""
    raw = axis.span / about
    unit = 10 ** math.floor(math.log10(raw)) if raw >= 1 else 1
    width = max(1, int(next(f for f in (1, 2, 5, 10) if f * unit >= raw) * unit))
    first = -(-axis.first // width) * width
    ticks = list(range(first, axis.last + 1, width))
    return [{"at": axis.position(step), "text": f"{step:,}"} for step in ticks]


def _lane(axis: Axis, finding: Finding) -> dict[str, Any]:
    chosen = finding.series[:: max(1, len(finding.series) // MAX_DOTS)]
    return {
        "audit": finding.instrument,
        "title": clean(finding.title),
        "level": str(finding.verdict.level),
        "first_step": finding.first_step,
        "last_step": finding.last_step,
        "start": axis.position(finding.first_step - 0.5),
        "end": axis.position(finding.last_step + 0.5),
        "measured": [{"at": axis.position(step), "level": _level(result)} for step, result in chosen],
    }


def _level(result: Result) -> str:
    """The level of one measurement by itself; "" where it cannot judge itself."""
    try:
        return str(result.verdict().level)
    except Exception:
        return ""


def _event(axis: Axis, event: Event) -> dict[str, Any]:
    return {
        "step": event.step,
        "at": axis.position(event.step),
        "kind": clean(event.kind),
        "text": clean(event.text),
    }


def _curves(axis: Axis, history: History) -> Iterable[dict[str, Any]]:
    steps = history.steps
    yield from _curve(axis, steps, "loss", "Training loss", history.loss, ~history.loss_finite)
    norm = by_rows(history, lambda part: whole_norm(part.gradient_norm))
    yield from _curve(axis, steps, "gradient_norm", "Gradient norm", norm, broken_steps(history))
    yield from _curve(axis, steps, "learning_rate", "Learning rate", history.learning_rate, None)


def _logged(axis: Axis, metrics: Mapping[str, Sequence[tuple[int, float]]]) -> Iterable[dict[str, Any]]:
    over_time = [(name, course) for name, course in metrics.items() if not _is_once(course)]
    for name, course in over_time[:MAX_LOGGED]:
        steps, values = numpy.array([step for step, _ in course]), numpy.array([value for _, value in course])
        order = numpy.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        yield from _curve(axis, steps, f"logged {clean(name)}", clean(name), values, ~numpy.isfinite(values))


def _is_once(course: Sequence[tuple[int, float]]) -> bool:
    return len({step for step, _ in course}) < 2


def _once(metrics: Mapping[str, Sequence[tuple[int, float]]]) -> list[dict[str, Any]]:
    """What was logged at one step only, which is no curve."""
    once = [(name, course[-1]) for name, course in metrics.items() if course and _is_once(course)]
    return [
        {"label": clean(name), "step": step, "value": format_number(float(value))}
        for name, (step, value) in once[:MAX_LOGGED]
    ]


def broken_steps(history: History) -> NDArray[numpy.bool_]:
    """(T,) the steps at which a gradient had infinite or NaN entries."""
    return by_rows(history, lambda part: ~part.gradient_finite.all(axis=1))


def whole_norm(table: Any) -> NDArray[numpy.float64]:
    """The norm of the whole network at each step: root of the sum of the layers' squares (T, L) -> (T,)."""
    table = numpy.asarray(table, numpy.float64)
    # A layer that was not observed counts for nothing, unless none was.
    total = numpy.nansum(numpy.square(table), axis=1)
    return numpy.sqrt(numpy.where(numpy.isnan(table).all(axis=1), numpy.nan, total))


def _curve(axis: Axis, steps: Any, name: str, label: str, values: Any, broken: Any) -> Iterable[dict[str, Any]]:
    """One curve, or none where nothing was observed."""
    values = numpy.asarray(values, numpy.float64)
    usable = values[numpy.isfinite(values)]
    if not len(usable):
        return
    # A learning rate that was observed but never changes needs no curve.
    if name == "learning_rate" and usable.min() == usable.max():
        return
    series = decimate(axis, steps, values, broken)
    yield {
        "name": name,
        "label": label,
        "last": format_number(float(usable[-1])),
        "lowest": format_number(float(usable.min())),
        "highest": format_number(float(usable.max())),
        **scale(usable),
        **series,
    }


def decimate(
    axis: Axis, steps: Any, values: NDArray[numpy.float64], broken: Any = None, at_most: int = CURVE_POINTS
) -> dict[str, Any]:
    """A series as at most `at_most` points: per point its position, and the least, middle and greatest value.

    `broken` (a mask) marks values that were seen and were not finite: the positions of these are kept. A point
    without any finite value is None.
    """
    steps = numpy.asarray(steps)
    marked = numpy.zeros(len(steps), bool) if broken is None else numpy.asarray(broken)
    at: list[float] = []
    low: list[float] = []
    middle: list[float] = []
    high: list[float] = []
    not_finite: list[float] = []
    whole = len(steps) <= at_most
    parts = [slice(i, i + 1) for i in range(len(steps))] if whole else [b[2] for b in axis.bins(steps, at_most)]
    for rows in parts:
        part = values[rows]
        if not len(part):
            continue
        usable = part[numpy.isfinite(part)]
        at.append(axis.position(float(steps[rows].mean())))
        if marked[rows].any():
            not_finite.append(at[-1])
        low.append(float(usable.min()) if len(usable) else math.nan)
        middle.append(float(numpy.median(usable)) if len(usable) else math.nan)
        high.append(float(usable.max()) if len(usable) else math.nan)
    bounds = {} if whole else {"low": rounded(low), "high": rounded(high)}
    return {"at": at, "middle": rounded(middle), "broken": not_finite, **bounds}


def scale(usable: NDArray[numpy.float64], highest: float = math.inf) -> dict[str, Any]:
    """Linear, or logarithmic where positive values span more than a factor of 30; with three or four ticks, none of
    them above `highest`."""
    low, high = float(usable.min()), float(usable.max())
    positive = low > 0 and high / low > LOG_SPAN
    low, high = (math.log10(low), math.log10(high)) if positive else (low, high)
    # A span of the size of rounding is empty.
    span = high - low if high - low > 1e-6 * max(abs(low), abs(high)) else 0.0
    pad = 0.04 * span or 0.1 * abs(high) or 1.0
    low, high = low - pad, high + pad
    marks = _log_marks(low, high) if positive else _linear_marks(low, high)
    limit = math.log10(highest) if positive else highest
    ticks = [{"at": round((m - low) / (high - low), 4), "text": text} for m, text in marks if m <= limit]
    return {"log": positive, "low_end": low, "high_end": high, "ticks": ticks}


def _log_marks(low: float, high: float) -> list[tuple[float, str]]:
    every = max(1, math.ceil((high - low) / 4))
    whole = range(math.ceil(low), math.floor(high) + 1, every)
    return [(float(e), format_number(10.0**e, 1)) for e in whole]


def _linear_marks(low: float, high: float) -> list[tuple[float, str]]:
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    width = next(f for f in (1, 2, 5, 10) if f * unit >= raw) * unit
    first = math.ceil(low / width)
    marks = [i * width for i in range(first, math.floor(high / width) + 1)]
    # As many digits as tell two marks apart.
    largest = max(map(abs, marks), default=0.0)
    digits = max(3, math.ceil(math.log10(largest / width)) + 1) if largest > 0 else 3
    return [(mark, re.sub(r"\.?0+(?=e)", "", format_number(mark, digits))) for mark in marks]
