"""The report as one JSON document: everything that the page shows, and nothing that it must still compute.

An entry of `audits` is a check: its id, a title that flips with what was found, why the check matters, what it
rests on here, the value with its unit and threshold, typed details. The page (`page.render`) is a pure function
of this document; the same evidence gives the same document.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from diag.reporting.audits import by_instrument, judged_entry, slug, unjudged
from diag.reporting.caveats import caveats
from diag.reporting.charts import charts, tells_by_a_chart
from diag.reporting.evidence import Evidence, gather
from diag.reporting.examples import take_pictures
from diag.reporting.layers import layer_map
from diag.reporting.method import facts, method
from diag.reporting.outcome import outcome
from diag.reporting.plain import clean, count_in_words, listed
from diag.reporting.state import run_state
from diag.reporting.timeline import axis_of, timeline
from diag.reporting.words import words_of
from diag.result import Level
from diag.run.stories import stories

REPORT_VERSION = 1
SHOWN_LEVELS = (*(str(level) for level in Level), "skipped", "failed")
ROOM_FOR_DRAWINGS = 260_000  # bytes; what keeps a page of very many checks under a megabyte
ROOM_FOR_THE_REST = 60_000  # of it, for checks that found nothing wrong
SMALL_DRAWING = 25_000  # a drawing of a check that found nothing wrong
NEEDS_ATTENTION = tuple(str(level) for level in Level if level.is_finding)


def document(source: Any, *, title: str = "", command: str = "", drawings: bool = True) -> dict[str, Any]:
    """The document of a report on `source` (see `diag.report`): strict JSON, the worst check first.

    title: in place of the run's name. command: the command line that makes this report, to be shown in it.
    drawings: whether to draw the charts and the pictures of examples.
    Raises InvalidInput where no report can be made of `source`, RunError where a path holds no run.
    """
    evidence = gather(source)
    history = evidence.history
    in_time = evidence.findings if evidence.kind == "run" else ()
    axis = axis_of(history, in_time, evidence.last_step)
    audits = audits_of(evidence)
    counts = {level: sum(a["level"] == level for a in audits) for level in SHOWN_LEVELS}
    stories = stories_of(evidence, audits)
    name = clean(title or evidence.title)
    made = {
        "format": "diag-report",
        "format_version": REPORT_VERSION,
        "kind": evidence.kind,
        "title": name,
        "command": clean(command),
        "verdict": verdict(counts, audits, stories),
        "state": run_state(evidence, audits, stories),
        "outcome": outcome(axis, evidence) if evidence.kind == "run" else None,
        "counts": counts,
        "facts": facts(evidence),
        "caveats": caveats(evidence, counts),
        "audits": audits,
        "stories": stories,
        "timeline": axis and timeline(axis, history, in_time, evidence.events, evidence.metrics),
        "layers": None if history is None else layer_map(axis, history, evidence.findings),
        "words": words_of(audits),
        "method": method(evidence, audits),
        "drawings": _draw(evidence if drawings else None, audits, hashlib.sha1(name.encode()).hexdigest()[:6]),
    }
    _link(made)
    return json.loads(json.dumps(made, allow_nan=False))


def audits_of(evidence: Evidence) -> list[dict[str, Any]]:
    """The checks with a verdict in the order of the findings, then those without; each has an id of its own."""
    gaps, in_time = by_instrument(evidence.outcomes), evidence.kind == "run"
    made = [judged_entry(f, gaps.pop(f.instrument, ()), in_time, evidence.last_step) for f in evidence.findings]
    made += [unjudged(outcomes, in_time) for _, outcomes in sorted(gaps.items())]
    taken: set[str] = set()
    for audit in made:
        base, n = audit["id"], 2
        while audit["id"] in taken:
            audit["id"], n = f"{base}-{n}", n + 1
        taken.add(audit["id"])
    return made


def stories_of(evidence: Evidence, audits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What went wrong, in order: the check that names the cause, and those that follow."""
    ids = {audit["instrument"]: audit["id"] for audit in audits}
    return [
        {
            "level": str(story.level),
            "audit": ids[clean(story.finding.instrument)],
            "consequences": [ids[clean(f.instrument)] for f in story.consequences],
        }
        for story in stories(evidence.findings)
    ]


def _draw(evidence: Evidence | None, audits: Sequence[dict[str, Any]], salt: str) -> dict[str, str]:
    """The charts (the course and the last measurement where attention is needed, else the first of these) and the
    pictures of examples, by name; the worst checks first, as long as the page has room. None draws nothing."""
    drawings: dict[str, str] = {}
    room = {True: ROOM_FOR_DRAWINGS if evidence else 0, False: ROOM_FOR_THE_REST if evidence else 0}
    findings = evidence.findings if evidence else ()
    for audit, finding in itertools.zip_longest(audits, findings):
        wrong = audit["level"] in NEEDS_ATTENTION
        if finding is not None and (wrong or tells_by_a_chart(finding)):
            audit["charts"], drawn = charts(finding, salt, 2 if wrong else 1)
            for chart in audit["charts"]:
                size = len(drawn.get(chart["key"], ""))
                fits = size <= room[True] and (wrong or size <= min(room[False], SMALL_DRAWING))
                if not fits and drawn.pop(chart["key"], ""):
                    chart["problem"] = "No chart: the page has no room left for it."
                else:
                    _take(room, wrong, size)
            drawings |= drawn
        for name, picture in take_pictures(audit.get("examples"), f"{salt}-{audit['id']}"):
            _take(room, True, len(picture))
            if room[True] > 0:
                drawings[name] = picture
    return drawings


def _take(room: dict[bool, int], wrong: bool, size: int) -> None:
    """What the rest takes is taken from the whole, too."""
    for kind in {True, wrong}:
        room[kind] -= size


def _link(made: dict[str, Any]) -> None:
    """Where a part of the document names a check by its instrument, let it name the check's id."""
    ids = {audit["instrument"]: audit["id"] for audit in made["audits"]}
    rows = [*made["timeline"]["lanes"]] if made["timeline"] else []
    for row in [*rows, *made["method"]["schedule"]]:
        row["audit"] = ids.get(row["audit"], slug(row["audit"]))
    for row in made["layers"]["rows"] if made["layers"] else []:
        row["findings"] = [ids.get(name, slug(name)) for name in row["findings"]]


def verdict(
    counts: Mapping[str, int], audits: Sequence[Mapping[str, Any]], stories: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The report in one sentence: how many checks need attention, and what the first story says."""
    could_judge = sum(counts[level] for level in ("alarm", "warning", "ok"))
    first = stories[0]["audit"] if stories else None
    worst = next((a for a in audits if a["level"] in NEEDS_ATTENTION and first in (None, a["id"])), None)
    if worst is None:
        return {
            "level": "ok" if could_judge else "unknown",
            "audit": None,
            "name": "",
            **_quiet(could_judge, counts),
        }
    parts = [count_in_words(counts[level], level) for level in NEEDS_ATTENTION if counts[level]]
    headline = f"{listed(parts)} in {count_in_words(sum(counts.values()), 'check')}"
    headline = headline[0].upper() + headline[1:]
    return {
        "level": worst["level"],
        "audit": worst["id"],
        "headline": headline,
        "name": worst["name"],
        "sentence": worst["sentence"],
    }


def _quiet(could_judge: int, counts: Mapping[str, int]) -> dict[str, str]:
    """The sentence where nothing raised a warning: it claims no more than what was judged."""
    if not could_judge:
        silent = sum(counts.values())
        text = f"None of the {count_in_words(silent, 'check')} could judge." if silent else "Nothing was measured."
        return {"headline": "No verdict", "sentence": text}
    others = [
        count_in_words(counts[level], words.replace("were", "was"), words)
        for level, words in (
            ("unknown", "could not tell"),
            ("description", "only described"),
            ("not_applicable", "did not apply"),
            ("skipped", "were skipped"),
            ("failed", "failed"),
        )
        if counts[level]
    ]
    rest = f"; {listed(others)}" if others else ""
    passed = (
        "The one check that could judge passed"
        if could_judge == 1
        else f"All {could_judge} checks that could judge passed"
    )
    return {"headline": "No check raised a warning", "sentence": f"{passed}{rest}."}
