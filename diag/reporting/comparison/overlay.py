"""The curves of several runs on one axis and one scale: what was recorded at every step, and what checks measured.

Healthy runs are drawn as one band: at each part of the axis from the least to the greatest of their values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_number
from diag.reporting.evidence import Evidence
from diag.reporting.outcome import outcome_courses
from diag.reporting.plain import clean
from diag.reporting.timeline import (
    CURVE_POINTS,
    Axis,
    axis_of,
    broken_steps,
    decimate,
    scale,
    step_ticks,
    whole_norm,
)
from diag.snapshot.history import by_rows

MAX_PANELS = 12
MANY_PANELS = 5  # where there are many runs
MANY_RUNS = 6
POINTS_IN_ALL = 3_000  # a panel
MAX_DRAWN = 60


@dataclass(frozen=True)
class Curve:
    """A number over the steps; `broken` marks what was seen and was not finite."""

    label: str
    steps: NDArray[numpy.int64]
    values: NDArray[numpy.float64]
    broken: NDArray[numpy.bool_]


def overlay(
    sides: Sequence[Evidence], keys: Sequence[str], healthy: Sequence[Evidence] = ()
) -> dict[str, Any] | None:
    """A panel a curve that any side has; None where none has a time course."""
    sides, keys = sides[:MAX_DRAWN], keys[:MAX_DRAWN]
    known = [axis for axis in map(_axis, [*sides, *healthy]) if axis is not None]
    if not known:
        return None
    axis = Axis(min(a.first for a in known), max(a.last for a in known))
    curves = [dict(_curves(side)) for side in sides]
    accepted = [dict(_curves(side)) for side in healthy]
    names = [name for name in dict.fromkeys(n for side in curves for n in side) if _moves(_of(curves, name))]
    chosen = names[: MAX_PANELS if len(sides) <= MANY_RUNS else MANY_PANELS]
    panels = [
        _panel(axis, name, dict(zip(keys, (c.get(name) for c in curves), strict=True)), _of(accepted, name))
        for name in chosen
    ]
    return {"first_step": axis.first, "last_step": axis.last, "ticks": step_ticks(axis), "panels": panels}


def _moves(curves: Sequence[Curve]) -> bool:
    """Whether the panel shows anything: not where every run has one and the same value throughout."""
    values = numpy.concatenate([_finite(c.values) for c in curves])
    return len(values) == 1 or bool(values.min() < values.max())


def _axis(side: Evidence) -> Axis | None:
    return axis_of(side.history, side.findings if side.kind == "run" else (), side.last_step)


def _of(curves: Iterable[Mapping[str, Curve]], name: str) -> list[Curve]:
    return [side[name] for side in curves if name in side]


def _curves(side: Evidence) -> Iterable[tuple[str, Curve]]:
    """The curves of one side that have a finite value."""
    for name, curve in (*_recorded(side), *_outcome(side), *_measured(side)):
        if numpy.isfinite(curve.values).any():
            yield name, curve


def _recorded(side: Evidence) -> Iterable[tuple[str, Curve]]:
    history = side.history
    if history is None:
        return
    steps, none = numpy.asarray(history.steps), numpy.zeros(len(history), bool)
    loss, rate = (numpy.asarray(v, numpy.float64) for v in (history.loss, history.learning_rate))
    norm = by_rows(history, lambda part: whole_norm(part.gradient_norm))
    yield "loss", Curve("Training loss", steps, loss, ~numpy.asarray(history.loss_finite))
    yield "gradient_norm", Curve("Gradient norm", steps, norm, broken_steps(history))
    yield "learning_rate", Curve("Learning rate", steps, rate, none)


def _outcome(side: Evidence) -> Iterable[tuple[str, Curve]]:
    """Held-out loss and accuracy, and what the user logged of these."""
    if side.kind != "run":
        return
    for panel, courses in outcome_courses(side).items():
        for course in courses:
            name = f"{course.label} {panel}" if course.is_held_out else ""
            if name and len(course.steps) > 1:
                steps, values = numpy.array(course.steps), numpy.array(course.values, float)
                label = name[0].upper() + name[1:] if course.label == "held-out" else course.label
                yield name, Curve(clean(label), steps, values, numpy.zeros(len(steps), bool))


def _measured(side: Evidence) -> Iterable[tuple[str, Curve]]:
    """The first scalar of each check that measured more than once; how many were measured is none."""
    for finding in side.findings:
        name = next((n for n in finding.series[-1][1].scalars() if not n.startswith("num_")), None)
        if name is None or len(finding.series) < 2 or side.kind != "run":
            continue
        steps = numpy.array([step for step, _ in finding.series])
        values = numpy.array([float(r.scalars().get(name, math.nan)) for _, r in finding.series])
        label = clean(f"{finding.title}: {name.replace('_', ' ')}")
        yield f"{finding.instrument}.{name}", Curve(label, steps, values, numpy.zeros(len(steps), bool))


def _panel(axis: Axis, name: str, curves: Mapping[str, Curve | None], healthy: Sequence[Curve]) -> dict[str, Any]:
    present = [(key, c) for key, c in curves.items() if c is not None]
    usable = [c.values[numpy.isfinite(c.values)] for _, c in present]
    about: Mapping[str, Any] = scale(numpy.concatenate([*usable, *(_finite(c.values) for c in healthy)]))
    points = max(40, min(CURVE_POINTS, POINTS_IN_ALL // max(1, len(present))))
    lines = [
        {
            "side": key,
            "last": format_number(float(known[-1])),
            **decimate(axis, c.steps, c.values, c.broken, at_most=points),
            **about,
        }
        for (key, c), known in zip(present, usable, strict=True)
    ]
    band = {**_band(axis, healthy), **about} if healthy else None
    return {"name": clean(name), "label": present[0][1].label, "lines": lines, "band": band, **about}


def _finite(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    return values[numpy.isfinite(values)]


def _band(axis: Axis, healthy: Sequence[Curve]) -> dict[str, Any]:
    """All values of the healthy runs, from the least to the greatest in each part of the axis."""
    steps = numpy.concatenate([c.steps for c in healthy])
    order = numpy.argsort(steps, kind="stable")
    values = numpy.concatenate([c.values for c in healthy])[order]
    most = min(CURVE_POINTS // 4, max(2, len(order) // len(healthy)), len(order) - 1)
    made = decimate(axis, steps[order], values, at_most=max(1, most))
    return {"low": made["middle"], "high": made["middle"], **made}
