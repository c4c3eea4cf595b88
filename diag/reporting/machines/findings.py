"""The findings of a run as one JSON document of the published schema.

Strict JSON: a number that JSON does not have is the text "NaN", "Infinity" or "-Infinity".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diag.reporting.evidence import is_old
from diag.reporting.plain import clean
from diag.result import Failed, Level, Skipped
from diag.run.entries import Finding
from diag.run.files import DAMAGED
from diag.run.run import Run
from diag.run.stories import stories

FINDINGS_FORMAT, FINDINGS_VERSION = "diag-findings", 1


def findings_document(run: Run) -> dict[str, Any]:
    """What a run says of itself: every verdict, what could not be judged, and which findings follow from which."""
    found = run.findings()
    levels = [str(f.verdict.level) for f in found]
    return {
        "format": FINDINGS_FORMAT,
        "format_version": FINDINGS_VERSION,
        "run": run_entry(run),
        "level": str(run_level(found)),
        "counts": {str(level): levels.count(str(level)) for level in Level},
        "findings": [finding_entry(f, run.last_step) for f in found],
        "stories": [
            {
                "level": str(story.level),
                "finding": clean(story.finding.instrument),
                "consequences": [clean(f.instrument) for f in story.consequences],
            }
            for story in stories(found)
        ],
        "unjudged": list(_unjudged(run.outcomes)),
        "problems": [clean(e.text) for e in run.events if e.kind == DAMAGED],
    }


def run_level(findings: Iterable[Finding]) -> Level:
    """The worst that was found; `ok` where something could be judged and passed, else `unknown`."""
    levels = {f.verdict.level for f in findings}
    wrong = [level for level in levels if level.is_finding]
    if wrong:
        return min(wrong, key=lambda level: level.severity)
    return Level.OK if Level.OK in levels else Level.UNKNOWN


def run_entry(run: Run) -> dict[str, Any]:
    """What the run is, and the last value of every number in it."""
    about = run.metadata
    return {
        "name": clean(run_name(run)),
        "path": None if run.path is None else clean(run.path),
        "created": _text_or_none(about.get("created")),
        "model": _text_or_none(about.get("model")),
        "parameters": about.get("parameters") if isinstance(about.get("parameters"), int) else None,
        "last_step": run.last_step,
        "versions": {clean(k): clean(v) for k, v in (about.get("versions") or {}).items()},
        "values": {clean(k): json_number(v) for k, v in run.last_values().items()},
    }


def run_name(run: Run) -> str:
    """The name of a run: its own, or its folder's."""
    return str(run.metadata.get("name") or (run.path.resolve().name if run.path else "in memory"))


def finding_entry(finding: Finding, last_step: int) -> dict[str, Any]:
    """One verdict with its evidence."""
    verdict = finding.verdict
    return {
        "instrument": clean(finding.instrument),
        "title": clean(finding.title),
        "level": str(verdict.level),
        "sentence": clean(verdict.sentence),
        "advice": clean(verdict.advice),
        "refutation": clean(verdict.refutation),
        "cause": clean(verdict.cause),
        "explained_by": [clean(c) for c in verdict.explained_by],
        "confidence": str(verdict.confidence),
        "source": clean(verdict.source or finding.source),
        "value": None if verdict.value is None else json_number(verdict.value),
        "threshold": None if verdict.threshold is None else json_number(verdict.threshold),
        "threshold_source": clean(verdict.threshold_source),
        "layers": [clean(layer) for layer in verdict.layers],
        "examples": [int(row) for row in verdict.examples],
        "step": verdict.step,
        "began": finding.began,
        "first_step": finding.first_step,
        "last_step": finding.last_step,
        "measurements": len(finding.series),
        "old": is_old(finding.last_step, last_step),
        "values": {clean(k): json_number(v) for k, v in finding.series[-1][1].scalars().items()},
    }


def json_number(value: Any) -> float | int | str:
    """`value`, or its name where JSON has no such number."""
    if isinstance(value, bool) or (isinstance(value, int) and not isinstance(value, bool)):
        return int(value)
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")


def _text_or_none(value: Any) -> str | None:
    return None if value is None else clean(value)


def _unjudged(outcomes: Sequence[tuple[int, Skipped | Failed]]) -> Iterable[dict[str, Any]]:
    """What was skipped or failed, once a reason."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for step, outcome in outcomes:
        kind = "failed" if isinstance(outcome, Failed) else "skipped"
        rows.setdefault((outcome.instrument, kind, outcome.reason), []).append(step)
    for (instrument, kind, reason), steps in rows.items():
        yield {
            "instrument": clean(instrument),
            "kind": kind,
            "reason": clean(reason),
            "times": len(steps),
            "first_step": steps[0],
            "last_step": steps[-1],
        }


def plain_json(value: Any) -> Any:
    """Any plain data (results of other commands, settings) as strict JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_json(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {clean(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v) for v in value]
    if hasattr(value, "tolist"):
        return plain_json(value.tolist())
    if value is None or isinstance(value, bool):
        return value
    return json_number(value) if isinstance(value, (int, float)) else clean(value)
