"""The first screen: the state of the run in plain words, and the stories that matter most.

The headline claims no more than the verdicts do: a run in which nothing was found is not called good.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy

from diag.display import format_number, format_seconds
from diag.reporting.caveats import spent
from diag.reporting.evidence import Evidence, is_old
from diag.reporting.outcome import Course, best_step, outcome_courses, shown_value
from diag.reporting.plain import clean, count_in_words
from diag.result import Level
from diag.snapshot.history import History

MOST_STORIES = 3
FEW_CHECKS = 5  # that passed: the headline says how few
LONGEST_STORY = 260  # characters: what a story on the first screen may take


def run_state(
    evidence: Evidence, audits: Sequence[Mapping[str, Any]], told: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The level, the headline, a sentence on how training went, and the first stories."""
    level = _level(audits, told)
    by_id = {audit["id"]: audit for audit in audits}
    return {
        "level": level,
        "headline": _headline(level, told, evidence.kind, sum(a["level"] == Level.OK for a in audits))
        + (_first_cause(by_id[told[0]["audit"]], len(told)) if told else ""),
        "sentence": clean(" ".join(_course(evidence))),
        "stories": [_story(story, by_id, evidence.last_step) for story in told[:MOST_STORIES]],
        "more": max(0, len(told) - MOST_STORIES),
    }


def _level(audits: Sequence[Mapping[str, Any]], told: Sequence[Mapping[str, Any]]) -> str:
    if told:
        return min((story["level"] for story in told), key=lambda level: Level(level).severity)
    return str(Level.OK if any(a["level"] == Level.OK for a in audits) else Level.UNKNOWN)


def _headline(level: str, told: Sequence[Mapping[str, Any]], kind: str, passed: int) -> str:
    what = "run" if kind == "run" else "network"
    if level == Level.ALARM:
        alarms = sum(story["level"] == Level.ALARM for story in told)
        return (
            f"Something is wrong with this {what}" if alarms == 1 else f"{_many(alarms)} are wrong with this {what}"
        )
    if level == Level.WARNING:
        return "One thing to look at" if len(told) == 1 else f"{_many(len(told))} to look at"
    if level != Level.OK:
        return "Nothing could be judged"
    few = f" by the {count_in_words(passed, 'check')} that could judge" if passed < FEW_CHECKS else ""
    return f"Nothing wrong was found{few}"


def _first_cause(audit: Mapping[str, Any], stories: int) -> str:
    """What the first story comes from, in words; nothing where its check names no cause."""
    if not audit["cause"]:
        return ""
    return f": {audit['cause']}" if stories == 1 else f", first: {audit['cause']}"


def _many(count: int, what: str = "thing") -> str:
    text = count_in_words(count, what)
    return text[0].upper() + text[1:]


def _story(story: Mapping[str, Any], by_id: Mapping[str, Any], last_step: int) -> dict[str, Any]:
    audit = by_id[story["audit"]]
    return {
        "level": audit["level"],
        "audit": audit["id"],
        "name": audit["name"],
        "sentence": shortened(audit["sentence"]),
        "advice": shortened(audit["advice"]),
        "old": audit["old"],
        "as_of": f"step {audit['last_step']:,} of {last_step:,}" if audit["old"] else "",
        "follows": said_once(audit["cause"], [by_id[i] for i in story["consequences"]]),
    }


def said_once(cause: str, consequences: Sequence[Mapping[str, Any]]) -> list[str]:
    """What follows from a story, each once: by its cause, or the name of the check that found it."""
    said = dict.fromkeys(a["cause"] or a["name"] for a in consequences)
    return [text for text in said if text != cause]


def shortened(text: str, most: int = LONGEST_STORY) -> str:
    """The first sentences of a text, as many as have room; a long first one is cut at a word."""
    if len(text) <= most:
        return text
    kept = ""
    for sentence in re.split(r"(?<=[.;:])\s+", text):
        if len(kept) + len(sentence) + 1 > most:
            break
        kept = f"{kept} {sentence}".strip()
    cut = kept.rstrip(";:") or text[:most].rsplit(" ", 1)[0]
    return f"{cut} …"


def _course(evidence: Evidence) -> Iterable[str]:
    """How training went, in sentences."""
    if evidence.kind != "run":
        return
    files = evidence.metadata.get("checkpoints")
    if files:
        yield f"{_many(len(files), 'checkpoint')}."
    else:
        yield from _training(evidence)
    courses = outcome_courses(evidence)
    yield from _measured_once(courses, evidence.last_step)
    best = best_step(courses)
    if best is not None:
        yield _held_out(best, evidence.last_step)
    elif evidence.history is not None:
        yield "No held-out data were seen, so nothing is known of how it does on new examples."


def _training(evidence: Evidence) -> Iterable[str]:
    """How long, and where the loss began and ended."""
    wall, _ = spent(evidence)
    took = f" in {format_seconds(wall)}" if wall and numpy.isfinite(wall) else ""
    steps = count_in_words(evidence.last_step, "step") if evidence.last_step else ""
    if steps:
        yield f"Trained for {steps}{took}."
    history = evidence.history
    if history is not None:
        usable = numpy.asarray(history.loss, float)
        usable = usable[numpy.isfinite(usable)]
        if len(usable) > 1:
            first, last = (format_number(float(v)) for v in (usable[0], usable[-1]))
            yield f"The training loss went from {first} to {last}{_not_finite_since(history)}."


def _not_finite_since(history: History) -> str:
    """Since when the loss is NaN or infinite; empty where its last value is finite."""
    finite = numpy.isfinite(numpy.asarray(history.loss, float))
    if finite[-1] or not finite.any():
        return ""
    since = int(numpy.asarray(history.steps)[int(numpy.flatnonzero(finite)[-1]) + 1])
    return f" and is NaN or infinite from step {since:,} on"


def _measured_once(courses: Mapping[str, Sequence[Course]], last_step: int) -> Iterable[str]:
    """An accuracy of which there is no course to be drawn, where it is of the network as it is."""
    for course in courses["accuracy"]:
        if len(course.steps) == 1 and not course.is_held_out and not is_old(course.steps[0], last_step):
            value = shown_value("accuracy", course.values[0])
            yield f"The accuracy on {course.label} is {value} at step {course.steps[0]:,}."


def _held_out(best: Mapping[str, Any], last_step: int) -> str:
    name = f"held-out {best['what']}" if best["label"] == "held-out" else best["label"]
    if is_old(best["last_step"], last_step):
        place = f"at step {best['last_step']:,}, where it was last measured"
        higher = "" if best["is_last"] else f"; it was best at step {best['step']:,} ({best['value']})"
        return f"The {name} was {best['last']} {place}{higher}."
    if best["is_last"]:
        return f"The {name} is at its best at the end: {best['last']}."
    return f"The {name} was best at step {best['step']:,} ({best['value']}) and is {best['last']} at the end."
