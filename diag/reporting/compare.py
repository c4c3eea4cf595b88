"""Two runs side by side: their verdicts, their curves on one axis, and every scalar with its difference."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from diag.reporting.document import document
from diag.reporting.evidence import Evidence, gather
from diag.reporting.files import Page
from diag.reporting.overlay import SIDES, overlay
from diag.reporting.plain import clean, count_in_words, finite, listed, number
from diag.result import Level

FORMAT_VERSION = 1


def compare(run_a: Any, run_b: Any, output: str | os.PathLike[str] | None = None, *, command: str = "") -> Page:
    """A page that compares two runs (or whatever else a report can be made of): A the first, B the second.

    Raises as `diag.report` does.
    """
    page = Page(comparison(run_a, run_b, command=command))
    return page if output is None else page.save(output)


def comparison(run_a: Any, run_b: Any, *, command: str = "") -> dict[str, Any]:
    """The document of a comparison, strict JSON."""
    sides = [gather(run_a), gather(run_b)]
    documents = [document(side, drawings=False) for side in sides]
    checks = list(_checks(*documents))
    made = {
        "format": "diag-comparison",
        "format_version": FORMAT_VERSION,
        "title": f"{documents[0]['title']} and {documents[1]['title']}",
        "command": clean(command),
        "verdict": {"headline": _headline(checks), "sentence": ""},
        "sides": [{"name": n, **_side(d)} for n, d in zip(SIDES, documents, strict=True)],
        "facts": list(_pairs(*({f["name"]: f["text"] for f in d["facts"]} for d in documents))),
        "checks": checks,
        "curves": overlay(sides),
        "scalars": list(_scalars(*sides)),
    }
    return json.loads(json.dumps(made, allow_nan=False))


def _side(made: Mapping[str, Any]) -> dict[str, Any]:
    return {key: made[key] for key in ("title", "verdict", "counts", "caveats")}


def _pairs(a: Mapping[str, str], b: Mapping[str, str]) -> Iterable[dict[str, Any]]:
    for name in dict.fromkeys([*a, *b]):
        texts = [a.get(name, "–"), b.get(name, "–")]
        yield {"name": name, "texts": texts, "differs": texts[0] != texts[1]}


def _checks(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """One row a check: what each side found, and whether B is worse, better or the same."""
    found = [{audit["instrument"]: audit for audit in d["audits"]} for d in (a, b)]
    for name in dict.fromkeys([*found[0], *found[1]]):
        audits = [side.get(name) for side in found]
        cells = [
            None if audit is None else {"level": audit["level"], "sentence": audit["sentence"]} for audit in audits
        ]
        title = next(audit["name"] for audit in audits if audit)
        yield {"instrument": name, "name": title, "cells": cells, "change": _change(cells)}


def _change(cells: list[dict[str, str] | None]) -> str:
    """ "worse", "better" or "same" between levels that judge; "" where either side has no judgement."""
    judging = [str(level) for level in (Level.ALARM, Level.WARNING, Level.OK)]
    levels = [cell["level"] if cell else "" for cell in cells]
    if any(level not in judging for level in levels):
        return ""
    before, after = (judging.index(level) for level in levels)
    return "same" if before == after else ("better" if after > before else "worse")


def _headline(checks: list[dict[str, Any]]) -> str:
    changes = [check["change"] for check in checks]
    words = {"worse": "worse", "better": "better", "same": "the same"}
    parts = [
        f"{count_in_words(changes.count(key), 'check')} {word}" for key, word in words.items() if key in changes
    ]
    unlike = changes.count("")
    parts += [f"{unlike} not judged in both"] if unlike else []
    return f"B against A: {listed(parts)}" if checks else "Nothing was measured"


def _scalars(a: Evidence, b: Evidence) -> Iterable[dict[str, Any]]:
    """Every scalar of the last results that both have, or one has: A, B, B - A and B / A."""
    found = [{f.instrument: f for f in side.findings} for side in (a, b)]
    for name in dict.fromkeys([*found[0], *found[1]]):
        pair = [side.get(name) for side in found]
        last = [f.series[-1][1] if f else None for f in pair]
        about = next(r for r in last if r is not None)
        units = {field.name: field.metadata["unit"] for field in about.measured_fields()}
        values = [r.scalars() if r is not None else {} for r in last]
        title = next(f.title for f in pair if f)
        for scalar in dict.fromkeys([*values[0], *values[1]]):
            unit = units.get(scalar.split("/")[0], "")
            both = scalar in values[0] and scalar in values[1]
            x, y = (float(v.get(scalar, math.nan)) for v in values)
            yield {
                "check": clean(title),
                "name": clean(scalar.replace("_", " ").replace("/", ", ")),
                "values": [number(v[scalar], unit) if scalar in v else None for v in values],
                "difference": number(y - x, unit) if both else None,
                "ratio": finite(y / x) if both and x else None,
            }
