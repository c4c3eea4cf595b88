"""One entry of the report for each check: what was claimed, with which number, on what evidence."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from diag.registry import instruments
from diag.reporting.evidence import is_old
from diag.reporting.examples import examples
from diag.reporting.plain import as_text, clean, count_in_words, number
from diag.reporting.words import cause_in_words
from diag.result import OUR_CHOICE, Failed, Level, Result, Skipped
from diag.run.entries import Finding

# The title of a check flips with what it found.
TITLES = {
    "alarm": "{}: alarm",
    "warning": "{}: warning",
    "unknown": "{}: cannot tell",
    "ok": "{}: passed",
    "description": "{}",
    "not_applicable": "{}: does not apply",
    "skipped": "{}: skipped",
    "failed": "{}: failed",
}
CONFIDENCE = {
    "arithmetic": "arithmetic: it follows from the numbers",
    "theorem": "a theorem, under its assumptions",
    "calibrated": "calibrated on programs that chose no threshold",
    "strong_empirical": "strong empirical support",
    "weak_empirical": "weak empirical support",
    "contested": "contested in the literature",
}

MAX_DETAILS = 80
MAX_GAPS = 6

Outcomes = Sequence[tuple[int, Skipped | Failed]]


def judged_entry(finding: Finding, gaps: Outcomes, in_time: bool, last_step: int = 0) -> dict[str, Any]:
    """The entry of a check that gave a verdict; `gaps` are the steps at which it gave none."""
    verdict, (_, last) = finding.verdict, finding.series[-1]
    level = str(verdict.level)
    # What does not apply here has numbers of nothing; the record keeps them.
    applies = verdict.level is not Level.NOT_APPLICABLE
    details = _details(finding.series) if applies else []
    name, unit = _decider(verdict.value, last)
    unit = verdict.unit or unit
    return {
        **_about(finding.instrument, finding.title, level),
        "sentence": clean(verdict.sentence),
        "cause": clean(cause_in_words(verdict.cause)),
        "confidence": str(verdict.confidence),
        "confidence_text": CONFIDENCE[verdict.confidence],
        "why_here": _why_here(finding, in_time),
        "value": None if verdict.value is None else {"name": name, **number(verdict.value, unit)},
        "threshold": None if verdict.threshold is None else number(verdict.threshold, unit),
        "threshold_source": clean(verdict.threshold_source),
        "uncalibrated": verdict.threshold_source.strip().rstrip(".") == OUR_CHOICE,
        "first_step": finding.first_step if in_time else None,
        "last_step": finding.last_step if in_time else None,
        "old": in_time and is_old(finding.last_step, last_step),
        "measurements": len(finding.series),
        "layers": [clean(layer) for layer in verdict.layers],
        "advice": clean(verdict.advice),
        "refutation": clean(verdict.refutation),
        "source": clean(verdict.source or finding.source),
        "preconditions": [
            {"name": clean(p.name), "holds": bool(p.holds), "detail": clean(p.detail)} for p in last.preconditions
        ],
        "notes": list(dict.fromkeys(clean(note) for _, result in finding.series for note in result.notes))[:12],
        "gaps": [_gap(group) for group in list(_groups(gaps))[:MAX_GAPS]],
        "details": details[:MAX_DETAILS],
        "details_left_out": max(0, len(details) - MAX_DETAILS),
        "arrays": list(_arrays(last)) if applies else [],
        "settings": _settings(finding.instrument, last, verdict.threshold),
        "provenance": _provenance(last),
        "examples": examples(finding.series),
        "charts": [],
    }


def unjudged(outcomes: Outcomes, in_time: bool) -> dict[str, Any]:
    """The entry of a check that never gave a result: skipped or failed, and why."""
    last = outcomes[-1][1]
    known = instruments().get(last.instrument)
    title = known.title if known else last.instrument.replace("_", " ").capitalize()
    level = "failed" if isinstance(last, Failed) else "skipped"
    return {
        **_about(last.instrument, title, level),
        "sentence": clean(last.reason),
        "source": clean(known.source) if known else "",
        "first_step": outcomes[0][0] if in_time else None,
        "last_step": outcomes[-1][0] if in_time else None,
        "old": False,
        "times": len(outcomes),
        "traceback": clean(last.traceback)[-6000:] if isinstance(last, Failed) else "",
    }


def by_instrument(outcomes: Outcomes) -> dict[str, list[tuple[int, Skipped | Failed]]]:
    """The outcomes of each instrument, in step order."""
    found: dict[str, list[tuple[int, Skipped | Failed]]] = {}
    for step, outcome in outcomes:
        found.setdefault(outcome.instrument, []).append((step, outcome))
    return found


def _unwrapped(text: str) -> str:
    """The text with each paragraph on one line, as the page is not as wide as the source; lists stay lists."""
    return re.sub(r"(?<!\n)\n(?![\n\s*-])", " ", text)


def _about(instrument: str, title: str, level: str) -> dict[str, Any]:
    known = instruments().get(instrument)
    return {
        "id": slug(instrument),
        "instrument": clean(instrument),
        "name": clean(title),
        "title": clean(TITLES[level].format(title)),
        "level": level,
        "why": clean(known.why or known.summary) if known else "",
        "documentation": clean(_unwrapped(inspect.getdoc(known.function) or "")) if known else "",
    }


def slug(text: str) -> str:
    """A text as the end of an element's id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "check"


def _decider(value: float | None, result: Result) -> tuple[str, str]:
    """(name, unit) of the field that a verdict's value is: the one scalar that equals it, or the one that is a
    field of its own. Where several do, their unit if they agree on it; else nothing."""
    if value is None:
        return "", ""
    equals = [name for name, found in result.scalars().items() if found == value and not isinstance(found, bool)]
    fields = [name for name in equals if "/" not in name]
    for names in (fields, equals):
        if len(names) == 1:
            return clean(names[0].replace("_", " ")), _units(result)[names[0].split("/")[0]]
    units = {_units(result)[name.split("/")[0]] for name in equals}
    return "", units.pop() if len(units) == 1 else ""


def _units(result: Result) -> dict[str, str]:
    return {f.name: f.metadata["unit"] for f in result.measured_fields()}


def _why_here(finding: Finding, in_time: bool) -> str:
    """On what this verdict rests in this run, in a sentence or two."""
    verdict, last = finding.verdict, finding.series[-1][1]
    parts = []
    if in_time:
        one = finding.first_step == finding.last_step
        when = (
            f"at step {finding.last_step:,}"
            if one
            else f"over steps {finding.first_step:,} to {finding.last_step:,}"
        )
        parts.append(f"Judged {when}, on {count_in_words(len(finding.series), 'measurement')}")
    else:
        parts.append("Judged on one measurement")
    if last.provenance.num_examples:
        parts.append(f" of {count_in_words(last.provenance.num_examples, 'example')}")
    unmet = last.unmet()
    if unmet is not None:
        detail = f" ({unmet.detail})" if unmet.detail else ""
        parts.append(f". A precondition does not hold: {unmet.name}{detail}")
    elif verdict.value is not None and verdict.threshold is not None:
        side = "above" if verdict.value > verdict.threshold else "below"
        side = "at" if verdict.value == verdict.threshold else side
        parts.append(f". The deciding number lies {side} its threshold")
    return clean("".join(parts).rstrip(".") + ".")


def _groups(outcomes: Outcomes) -> Iterable[list[tuple[int, Skipped | Failed]]]:
    groups: dict[tuple[str, str], list[tuple[int, Skipped | Failed]]] = {}
    for step, outcome in outcomes:
        groups.setdefault((type(outcome).__name__, outcome.reason), []).append((step, outcome))
    return groups.values()


def _gap(group: list[tuple[int, Skipped | Failed]]) -> dict[str, Any]:
    (first, outcome), (last, _) = group[0], group[-1]
    kind = "failed" if isinstance(outcome, Failed) else "skipped"
    return {
        "kind": kind,
        "times": len(group),
        "first_step": first,
        "last_step": last,
        "reason": clean(outcome.reason),
    }


def _details(series: Sequence[tuple[int, Result]]) -> list[dict[str, Any]]:
    """Every scalar of the last result, with its standard error where it has one, and its range over the run."""
    last = series[-1][1]
    about = {f.name: f.metadata for f in last.measured_fields()}
    courses: dict[str, list[float]] = {}
    for _, result in series:
        for name, value in result.scalars().items():
            courses.setdefault(name, []).append(float(value))
    scalars = last.scalars()
    rows = []
    for name, value in scalars.items():
        field = about[name.split("/")[0]]
        error = scalars.get(f"{name}_standard_error")
        usable = [v for v in courses[name] if math.isfinite(v)]
        varies = len(courses[name]) > 1 and bool(usable)
        rows.append(
            {
                "name": clean(name.replace("_", " ").replace("/", ", ")),
                **number(value, field["unit"]),
                "standard_error": None if error is None else number(error, field["unit"]),
                "lowest": number(min(usable), field["unit"]) if varies else None,
                "highest": number(max(usable), field["unit"]) if varies else None,
                "description": clean(field["description"]),
            }
        )
    return rows


def _arrays(result: Result) -> Iterable[dict[str, str]]:
    """What is recorded besides scalars: name, shape, unit and description."""
    for field in result.measured_fields():
        value = getattr(result, field.name)
        shape = getattr(value, "shape", None)
        if not field.metadata.get("record", True) or (shape is None and not isinstance(value, (tuple, str))):
            continue
        size = f"{value.dtype} {list(shape)}" if shape is not None else as_text(value)
        yield {
            "name": clean(field.name.replace("_", " ")),
            "shape": clean(size)[:200],
            "unit": clean(field.metadata["unit"]),
            "description": clean(field.metadata["description"]),
        }


def _settings(instrument: str, result: Result, threshold: float | None) -> list[dict[str, Any]]:
    """The settings that the result was measured with, and which of them were changed or decided."""
    known = instruments().get(instrument)
    defaults = {s.name: s.default for s in known.settings} if known else {}
    return [
        {
            "name": clean(name),
            "text": as_text(value),
            "changed": name in defaults and defaults[name] != value,
            "decided": threshold is not None and not isinstance(value, bool) and value == threshold,
        }
        for name, value in result.provenance.settings.items()
    ]


def _provenance(result: Result) -> dict[str, Any]:
    about = result.provenance
    return {
        "examples": about.num_examples,
        "data_fingerprint": clean(about.data_fingerprint),
        "seed": about.seed,
    }
