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
from diag.reporting.evidence import Evidence
from diag.reporting.outcome import best_step, outcome_courses
from diag.reporting.plain import clean, count_in_words
from diag.result import Level

MOST_STORIES = 3
LONGEST_STORY = 260  # characters: what a story on the first screen may take


def run_state(
    evidence: Evidence, audits: Sequence[Mapping[str, Any]], told: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The level, the headline, a sentence on how training went, and the first stories."""
    level = _level(audits, told)
    by_id = {audit["id"]: audit for audit in audits}
    return {
        "level": level,
        "headline": _headline(level, told, evidence.kind),
        "sentence": clean(" ".join(_course(evidence))),
        "stories": [_story(story, by_id, evidence.last_step) for story in told[:MOST_STORIES]],
        "more": max(0, len(told) - MOST_STORIES),
    }


def _level(audits: Sequence[Mapping[str, Any]], told: Sequence[Mapping[str, Any]]) -> str:
    if told:
        return min((story["level"] for story in told), key=lambda level: Level(level).severity)
    return str(Level.OK if any(a["level"] == Level.OK for a in audits) else Level.UNKNOWN)


def _headline(level: str, told: Sequence[Mapping[str, Any]], kind: str) -> str:
    what = "run" if kind == "run" else "network"
    if level == Level.ALARM:
        alarms = sum(story["level"] == Level.ALARM for story in told)
        return (
            f"Something is wrong with this {what}" if alarms == 1 else f"{_many(alarms)} are wrong with this {what}"
        )
    if level == Level.WARNING:
        return "One thing to look at" if len(told) == 1 else f"{_many(len(told))} to look at"
    return "Nothing wrong was found" if level == Level.OK else "Nothing could be judged"


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
        "follows": [by_id[i]["name"] for i in story["consequences"]],
    }


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
        return
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
            yield f"The training loss went from {first} to {last}."
    best = best_step(outcome_courses(evidence))
    if best is not None:
        yield _held_out(best)


def _held_out(best: Mapping[str, Any]) -> str:
    name = f"held-out {best['what']}" if best["label"] == "held-out" else best["label"]
    if best["is_last"]:
        return f"The {name} is at its best at the end: {best['last']}."
    return f"The {name} was best at step {best['step']:,} ({best['value']}) and is {best['last']} at the end."
