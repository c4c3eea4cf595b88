"""What a reader asks first: the loss and the accuracy, on training and on held-out data, over the steps.

They are found by the names of the fields that measure them (`held_out_loss` and its like), in whichever check
measured them at most steps, and among the numbers that the user logged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from diag.display import format_number
from diag.reporting.evidence import Evidence
from diag.reporting.plain import clean
from diag.reporting.timeline import Axis, decimate, scale
from diag.run.entries import Finding

HELD_OUT_NAMES = ("held_out", "val", "valid", "validation", "eval", "test", "dev")
PANELS = (("loss", "Loss"), ("accuracy", "Accuracy"))


@dataclass(frozen=True)
class Course:
    """A number over the steps; `role` is training or held-out, `share` whether it is read in per cent."""

    role: str
    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def is_held_out(self) -> bool:
        """Whether it was measured on held-out data."""
        return self.role == "held_out"


def measured_course(findings: Iterable[Finding], field: str, beside: str = "") -> list[tuple[int, float]]:
    """(step, value) of the scalar `field`, by the check that measured it at most steps; one that measures `beside`,
    too, comes first, so that the numbers on a page are of the same examples."""
    best: list[tuple[int, float]] = []
    kept = False
    for finding in findings:
        found = [(step, float(r.scalars()[field])) for step, r in finding.series if field in r.scalars()]
        found = [(step, value) for step, value in found if math.isfinite(value)]
        has_both = bool(found) and beside in finding.series[-1][1].scalars()
        if (has_both, len(found)) > (kept, len(best)):
            best, kept = found, has_both
    return best


def outcome_courses(evidence: Evidence) -> dict[str, list[Course]]:
    """The courses by panel: "loss" and "accuracy", training first."""
    made: dict[str, list[Course]] = {"loss": [], "accuracy": []}
    history, logged = evidence.history, list(_of_the_user(evidence.metrics))
    if history is not None and numpy.isfinite(history.loss).any():
        steps, loss = numpy.asarray(history.steps), numpy.asarray(history.loss, float)
        made["loss"].append(Course("training", "training", tuple(steps.tolist()), tuple(loss.tolist())))
    for panel, role, field in (
        ("loss", "held_out", "held_out_loss"),
        ("accuracy", "training", "accuracy"),
        ("accuracy", "held_out", "held_out_accuracy"),
    ):
        found = measured_course(evidence.findings, field, "held_out_loss")
        if found and not _was_logged(found, [c for p, c in logged if (p, c.role) == (panel, role)]):
            label = "held-out" if role == "held_out" else "training examples"
            made[panel].append(Course(role, label, *zip(*found, strict=True)))
    for panel, course in logged:
        made[panel].append(course)
    return made


def _was_logged(found: Sequence[tuple[int, float]], logged: Iterable[Course]) -> bool:
    """Whether a check measured at logged steps only: then it judged the log, which is drawn as it is."""
    return any({step for step, _ in found} <= set(course.steps) for course in logged)


def _of_the_user(metrics: Mapping[str, Sequence[tuple[int, float]]]) -> Iterable[tuple[str, Course]]:
    for name, pairs in metrics.items():
        words = name.lower().replace("/", "_").replace("-", "_").split("_")
        panel = "loss" if "loss" in words else "accuracy" if {"acc", "accuracy"} & set(words) else ""
        finite = sorted((s, v) for s, v in pairs if math.isfinite(v))
        if panel and finite:
            role = "held_out" if any(w in words or w in name.lower() for w in HELD_OUT_NAMES) else "training"
            yield panel, Course(role, clean(name), *zip(*finite, strict=True))


def best_step(courses: Mapping[str, Sequence[Course]]) -> dict[str, Any] | None:
    """The best measurement on held-out data, by accuracy where there is one, else by loss; None without either."""
    for panel, _ in reversed(PANELS):
        held_out = [c for c in courses[panel] if c.is_held_out]
        if held_out:
            course = max(held_out, key=lambda c: len(c.steps))
            pick = max if panel == "accuracy" else min
            step, value = pick(zip(course.steps, course.values, strict=True), key=lambda item: item[1])
            last = course.values[-1]
            return {
                "step": step,
                "what": panel,
                "label": course.label,
                "number": value,
                "value": shown_value(panel, value),
                "last": shown_value(panel, last),
                "last_step": course.steps[-1],
                "is_last": step == course.steps[-1] or last == value,
            }
    return None


def shown_value(panel: str, value: float) -> str:
    """A loss as a number; an accuracy that is a share in per cent."""
    if panel == "accuracy" and 0 <= value <= 1:
        return f"{format_number(100 * value)} %"
    return format_number(value)


def outcome(axis: Axis | None, evidence: Evidence) -> dict[str, Any] | None:
    """The two panels of the first screen, with the best step; None where nothing of it was recorded over time."""
    if axis is None:
        return None
    courses = outcome_courses(evidence)
    over_time = {name: [c for c in of if len(c.steps) > 1] for name, of in courses.items()}
    panels = [_panel(axis, name, title, over_time[name]) for name, title in PANELS if over_time[name]]
    best = best_step(courses)
    if best is not None:
        best["at"] = axis.position(best["step"])
    return {"panels": panels, "best": best} if panels else None


def _panel(axis: Axis, name: str, title: str, courses: Sequence[Course]) -> dict[str, Any]:
    arrays = [numpy.array(c.values, float) for c in courses]
    together = numpy.concatenate([a[numpy.isfinite(a)] for a in arrays])
    is_share = name == "accuracy" and together.max() <= 1
    about = scale(together, highest=1.0 if is_share else math.inf)
    lines = [
        {
            "role": c.role,
            "label": c.label,
            "last": shown_value(name, next(v for v in reversed(c.values) if math.isfinite(v))),
            "last_step": c.steps[-1],
            "dots": len(c.steps) <= 60,
            **decimate(axis, c.steps, a, at_most=240),
            **about,
        }
        for c, a in zip(courses, arrays, strict=True)
    ]
    return {"name": name, "label": title, "lines": lines, **about}
