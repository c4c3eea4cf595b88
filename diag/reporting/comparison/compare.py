"""Runs side by side: which verdicts changed, their curves on one axis, every number with its difference.

The first run is what the others are compared with. `healthy` runs are not columns: they give the range in which the
numbers of a run that went well lie.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diag.door import at_the_door
from diag.errors import InvalidInput
from diag.reporting.caveats import caveats
from diag.reporting.comparison.headline import change_counts, headline
from diag.reporting.comparison.numbers import compared_numbers
from diag.reporting.comparison.overlay import overlay
from diag.reporting.comparison.sweep import best_row, key_of, sweep_table
from diag.reporting.document import SHOWN_LEVELS, audits_of, stories_of, verdict
from diag.reporting.evidence import Evidence, gather
from diag.reporting.files import Page
from diag.reporting.method import facts
from diag.reporting.plain import clean, count_in_words
from diag.result import Level
from diag.run.opening import opened

COMPARISON_VERSION = 2
JUDGING = [str(level) for level in (Level.ALARM, Level.WARNING, Level.OK)]


@at_the_door
def compare(
    *sources: Any,
    output: str | os.PathLike[str] | None = None,
    names: Sequence[str] | None = None,
    healthy: Sequence[Any] = (),
    build: Any = None,
    command: str = "",
) -> Page:
    """A page that compares two runs or more (or whatever else a report can be made of) with the first of them.

    With `build`, the function that gives `(model, loss_fn, data)` or its name, sources are checkpoints, each
    measured by itself; without it, checkpoints are compared by what the files hold. names: short names, one a
    source. healthy: runs that went well; numbers outside their range are marked. output: where the page is
    written, with its document beside it as JSON.
    Raises InvalidInput for fewer than two sources, and as `diag.report` does.
    """
    page = Page(comparison(*sources, names=names, healthy=healthy, build=build, command=command))
    return page if output is None else page.save(output)


def comparison(
    *sources: Any,
    names: Sequence[str] | None = None,
    healthy: Sequence[Any] = (),
    build: Any = None,
    command: str = "",
) -> dict[str, Any]:
    """The document of a comparison, strict JSON."""
    _refuse(sources, names)
    sides = [gather(_opened(source, build, sources[0])) for source in sources]
    accepted = [gather(_opened(source, build, sources[0])) for source in healthy]
    keys = [key_of(i) for i in range(len(sides))]
    audits = [audits_of(side) for side in sides]
    checks = list(_checks(audits))
    titles = [clean(n) for n in names or _titles(sides)]
    described = [
        _side(key, title, side, made_of)
        for key, title, side, made_of in zip(keys, titles, sides, audits, strict=True)
    ]
    sweep = sweep_table(sides, described, audits) if len(sides) > 2 else None
    made = {
        "format": "diag-comparison",
        "format_version": COMPARISON_VERSION,
        "title": " and ".join(titles) if len(titles) == 2 else f"{len(titles)} runs against {titles[0]}",
        "command": clean(command),
        "verdict": {
            "headline": headline(checks, described),
            "sentence": change_counts(checks, keys) + best_row(sweep),
        },
        "sides": described,
        "healthy": [clean(side.title) for side in accepted],
        "facts": list(_facts(sides)),
        "checks": checks,
        "curves": overlay(sides, keys, accepted),
        "scalars": compared_numbers(sides, keys, accepted),
        "sweep": sweep,
    }
    return json.loads(json.dumps(made, allow_nan=False))


def _refuse(sources: Sequence[Any], names: Sequence[str] | None) -> None:
    if len(sources) == 1 and isinstance(sources[0], (list, tuple)):
        raise InvalidInput(
            f"A comparison was asked of one list of {len(sources[0])}; give each by itself: diag.compare(*sources)."
        )
    if len(sources) < 2:
        raise InvalidInput(f"A comparison was asked of {count_in_words(len(sources), 'run')}; give two or more.")
    if names is not None and len(names) != len(sources):
        raise InvalidInput(f"There are {len(names)} names for {len(sources)} runs; give one a run.")


def _opened(source: Any, build: Any, first: Any) -> Any:
    """A source as it is, or the run at a path; checkpoints that are not measured are compared with the first."""
    if not isinstance(source, (str, os.PathLike)):
        return source
    before = first if isinstance(first, (str, os.PathLike)) and first != source else None
    return opened(source, build, before)


def _titles(sides: Sequence[Evidence]) -> list[str]:
    return [clean(side.title) for side in sides]


def _side(key: str, title: str, side: Evidence, audits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = {level: sum(a["level"] == level for a in audits) for level in SHOWN_LEVELS}
    said = verdict(counts, audits, stories_of(side, audits))
    first = next((a for a in audits if a["id"] == said["audit"]), None)
    return {
        "name": key,
        "title": title,
        "verdict": said,
        "level": said["level"],
        "cause": "" if first is None else first["cause"] or first["name"].lower(),
        "counts": counts,
        "caveats": caveats(side, counts),
        "last_step": side.last_step,
    }


def _facts(sides: Sequence[Evidence]) -> Iterable[dict[str, Any]]:
    found = [{f["name"]: f["text"] for f in facts(side)} for side in sides]
    for name in dict.fromkeys(n for side in found for n in side):
        texts = [side.get(name, "–") for side in found]
        yield {"name": name, "texts": texts, "differs": len(set(texts)) > 1}


def _checks(audits: Sequence[Sequence[Mapping[str, Any]]]) -> Iterable[dict[str, Any]]:
    """One row a check: what each run found, and whether the others are worse, better or the same as the first."""
    found = [{audit["instrument"]: audit for audit in side} for side in audits]
    for name in dict.fromkeys(n for side in found for n in side):
        rows = [side.get(name) for side in found]
        cells = [None if a is None else {"level": a["level"], "sentence": a["sentence"]} for a in rows]
        title = next(a["name"] for a in rows if a)
        changes = [_change(cells[0], cell) for cell in cells[1:]]
        yield {"instrument": name, "name": title, "cells": cells, "changes": changes, "change": _summed(changes)}


def _change(first: Mapping[str, str] | None, other: Mapping[str, str] | None) -> str:
    """ "worse", "better" or "same" between levels that judge; "" where either side has no judgement."""
    levels = [cell["level"] if cell else "" for cell in (first, other)]
    if any(level not in JUDGING for level in levels):
        return ""
    before, after = (JUDGING.index(level) for level in levels)
    return "same" if before == after else ("better" if after > before else "worse")


def _summed(changes: Sequence[str]) -> str:
    """The changes of several runs as one: "mixed" where some are worse and some better."""
    found = {change for change in changes if change in ("worse", "better")}
    if len(found) == 2:
        return "mixed"
    if found:
        return found.pop()
    return "same" if "same" in changes else ""
