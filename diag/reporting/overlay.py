"""The curves of two runs on one axis and one scale: what was recorded at every step, and what checks measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_number
from diag.reporting.evidence import Evidence
from diag.reporting.plain import clean
from diag.reporting.timeline import Axis, axis_of, broken_steps, decimate, scale, step_ticks, whole_norm

SIDES = "AB"
MAX_PANELS = 12


@dataclass(frozen=True)
class Curve:
    """A number over the steps; `broken` marks what was seen and was not finite."""

    label: str
    steps: NDArray[numpy.int64]
    values: NDArray[numpy.float64]
    broken: NDArray[numpy.bool_]


def overlay(sides: list[Evidence]) -> dict[str, Any] | None:
    """A panel a curve that either side has; None where neither has a time course."""
    axes = [axis_of(s.history, s.findings if s.kind == "run" else (), s.last_step) for s in sides]
    known = [axis for axis in axes if axis is not None]
    if not known:
        return None
    axis = Axis(min(a.first for a in known), max(a.last for a in known))
    curves = [dict(_curves(side)) for side in sides]
    names = list(dict.fromkeys(name for side in curves for name in side))[:MAX_PANELS]
    panels = [_panel(axis, name, [side.get(name) for side in curves]) for name in names]
    return {"first_step": axis.first, "last_step": axis.last, "ticks": step_ticks(axis), "panels": panels}


def _curves(side: Evidence) -> Iterable[tuple[str, Curve]]:
    """The curves of one side that have a finite value."""
    for name, curve in (*_recorded(side), *_measured(side)):
        if numpy.isfinite(curve.values).any():
            yield name, curve


def _recorded(side: Evidence) -> Iterable[tuple[str, Curve]]:
    history = side.history
    if history is None:
        return
    steps, none = numpy.asarray(history.steps), numpy.zeros(len(history), bool)
    loss, rate = (numpy.asarray(v, numpy.float64) for v in (history.loss, history.learning_rate))
    norm = whole_norm(history.gradient_norm)
    yield "loss", Curve("Training loss", steps, loss, ~numpy.asarray(history.loss_finite))
    yield "gradient_norm", Curve("Gradient norm", steps, norm, broken_steps(history))
    yield "learning_rate", Curve("Learning rate", steps, rate, none)


def _measured(side: Evidence) -> Iterable[tuple[str, Curve]]:
    """The first scalar of each check that measured more than once."""
    for finding in side.findings:
        name = next(iter(finding.series[-1][1].scalars()), None)
        if name is None or len(finding.series) < 2 or side.kind != "run":
            continue
        steps = numpy.array([step for step, _ in finding.series])
        values = numpy.array([float(r.scalars().get(name, math.nan)) for _, r in finding.series])
        label = clean(f"{finding.title}: {name.replace('_', ' ')}")
        yield f"{finding.instrument}.{name}", Curve(label, steps, values, numpy.zeros(len(steps), bool))


def _panel(axis: Axis, name: str, curves: list[Curve | None]) -> dict[str, Any]:
    present = [(letter, c) for letter, c in zip(SIDES, curves, strict=True) if c is not None]
    usable = [c.values[numpy.isfinite(c.values)] for _, c in present]
    about: Mapping[str, Any] = scale(numpy.concatenate(usable))
    lines = [
        {
            "side": letter,
            "last": format_number(float(known[-1])),
            **decimate(axis, c.steps, c.values, c.broken),
            **about,
        }
        for (letter, c), known in zip(present, usable, strict=True)
    ]
    return {"name": clean(name), "label": present[0][1].label, "lines": lines, **about}
