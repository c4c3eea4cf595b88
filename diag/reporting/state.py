"""The first screen: the state of the run in plain words, and the stories that matter most.

The headline claims no more than the verdicts do: a run in which nothing was found is not called good.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from diag.display import format_number, format_seconds
from diag.reporting.caveats import spent
from diag.reporting.evidence import Evidence, is_old
from diag.reporting.outcome import Course, best_step, outcome_courses, shown_value
from diag.reporting.plain import clean, count_in_words, listed
from diag.result import Level
from diag.snapshot.history import History

MOST_STORIES = 3
FEW_CHECKS = 5  # that passed: the headline says how few
BEFORE_TRAINING = "checked"  # the metadata of a preflight have it
MOST_FILES = 4  # that are named
NEIGHBOURS, JUMP = 10, 5.0  # losses on either side, and how many times their median a jump is
TOLD_RISE = 1.2  # a loss so many times the lowest is told
LONGEST_STORY = 260  # characters: what a story on the first screen may take


def run_state(
    evidence: Evidence, audits: Sequence[Mapping[str, Any]], told: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The level, the headline, a sentence on how training went, and the first stories."""
    level = _level(audits, told)
    by_id = {audit["id"]: audit for audit in audits}
    return {
        "level": level,
        "headline": _headline(level, told, _subject(evidence), sum(a["level"] == Level.OK for a in audits))
        + (_first_cause(by_id[told[0]["audit"]], len(told)) if told else ""),
        "sentence": clean(" ".join(_course(evidence))),
        "stories": [_story(story, by_id, evidence.last_step) for story in told[:MOST_STORIES]],
        "more": max(0, len(told) - MOST_STORIES),
    }


def _level(audits: Sequence[Mapping[str, Any]], told: Sequence[Mapping[str, Any]]) -> str:
    if told:
        return min((story["level"] for story in told), key=lambda level: Level(level).severity)
    return str(Level.OK if any(a["level"] == Level.OK for a in audits) else Level.UNKNOWN)


def _subject(evidence: Evidence) -> str:
    """What a headline speaks of."""
    files = evidence.metadata.get("checkpoints")
    if files:
        return "this checkpoint" if len(files) == 1 else "these checkpoints"
    if _is_trial(evidence):
        return "this setup"
    return "this run" if evidence.kind == "run" else "this network"


def _headline(level: str, told: Sequence[Mapping[str, Any]], what: str, passed: int) -> str:
    if level == Level.ALARM:
        alarms = sum(story["level"] == Level.ALARM for story in told)
        return f"Something is wrong with {what}" if alarms == 1 else f"{_many(alarms)} are wrong with {what}"
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
        yield _named(files)
    else:
        yield from _training(evidence)
    courses = outcome_courses(evidence)
    yield from _measured_once(courses, evidence.last_step)
    best = best_step(courses)
    if best is not None:
        yield _held_out(best, evidence.last_step)
        yield from _loss_past_its_best(best, courses["loss"])
    elif evidence.history is not None and not _is_trial(evidence):
        yield "Nothing was measured on held-out data, so nothing is known of how it does on new examples."


def _named(files: Sequence[Mapping[str, Any]]) -> str:
    """How many checkpoints, and where they are few which step each is of."""
    known = [(Path(str(f["path"])).name, f.get("step")) for f in files if f.get("path")]
    names = [f"{name} (step {step:,})" if isinstance(step, int) else name for name, step in known]
    few = f": {listed(names)}" if 0 < len(names) <= MOST_FILES else ""
    return f"{_many(len(files), 'checkpoint')}{few}."


def _training(evidence: Evidence) -> Iterable[str]:
    """How long, and where the loss began and ended."""
    wall, _ = spent(evidence)
    took = f" in {format_seconds(wall)}" if wall and numpy.isfinite(wall) else ""
    steps = count_in_words(evidence.last_step, "step") if evidence.last_step else ""
    how = (
        "Tried before training, on copies: one batch, again and again, for"
        if _is_trial(evidence)
        else "Trained for"
    )
    if steps:
        yield f"{how} {steps}{took}."
    history = evidence.history
    if history is not None:
        usable = numpy.asarray(history.loss, float)
        usable = usable[numpy.isfinite(usable)]
        if len(usable) > 1:
            first, last = (format_number(float(v)) for v in (usable[0], usable[-1]))
            yield f"The training loss went from {first} to {last}{_not_finite_since(history)}."
        yield from _jump(history)


def _jump(history: History) -> Iterable[str]:
    """The highest loss, where it lies far above the first, those around it and the last ones."""
    loss = numpy.asarray(history.loss, float)
    steps, loss = numpy.asarray(history.steps)[numpy.isfinite(loss)], loss[numpy.isfinite(loss)]
    if len(loss) <= 2 * NEIGHBOURS or not loss[0] > 0:
        return
    top = int(loss.argmax())
    around = numpy.median(loss[max(0, top - NEIGHBOURS) : top + NEIGHBOURS + 1])
    if loss[top] > JUMP * max(around, numpy.median(loss[-NEIGHBOURS:])) and loss[top] > 2 * loss[0]:
        yield f"It jumped to {format_number(float(loss[top]))} at step {int(steps[top]):,} and came back."


def _is_trial(evidence: Evidence) -> bool:
    return bool(evidence.metadata.get(BEFORE_TRAINING))


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
        since = f", as at step {best['step']:,} already" if best["step"] < best["last_step"] else ""
        return f"The {name} is at its best at the end: {best['last']}{since}."
    return f"The {name} was best at step {best['step']:,} ({best['value']}) and is {best['last']} at the end."


def _loss_past_its_best(best: Mapping[str, Any], losses: Sequence[Course]) -> Iterable[str]:
    """That the held-out loss rises again where the accuracy, which decides, does not fall."""
    course = max((c for c in losses if c.is_held_out), key=lambda c: len(c.steps), default=None)
    if course is None or best["what"] == "loss" or not best["is_last"]:
        return
    step, lowest = min(zip(course.steps, course.values, strict=True), key=lambda item: item[1])
    if 0 < TOLD_RISE * lowest < course.values[-1]:
        name = "held-out loss" if course.label == "held-out" else course.label
        then = shown_value("loss", course.values[-1])
        yield f"The {name} was lowest at step {step:,} ({shown_value('loss', lowest)}) and is {then} at the end."
