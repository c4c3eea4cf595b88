"""One row a run, for a sweep of many: its state, how it ended, and the settings in which the runs differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from diag.display import format_number
from diag.reporting.evidence import Evidence
from diag.reporting.method import DRAWN_SEED
from diag.reporting.outcome import best_step, outcome_courses
from diag.reporting.plain import as_text, clean, finite
from diag.result import Level

MOST_SETTINGS = 8
NOT_SETTINGS = (
    "created", "layers", "row", "versions", "sessions", "closed", "format", "format_version", "seal", "name",
    "checkpoints",
)  # fmt: skip


def key_of(number: int) -> str:
    """A short name for the run of this number.

    >>> [key_of(i) for i in (0, 1, 25, 26, 27)]
    ['A', 'B', 'Z', 'AA', 'AB']
    """
    text = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, 26)
        text = chr(ord("A") + letter) + text
    return text


def sweep_table(
    sides: Sequence[Evidence], described: Sequence[Mapping[str, Any]], audits: Sequence[Sequence[Any]]
) -> dict[str, Any]:
    """The table: `columns` are the settings and logged numbers that differ between the runs. described: the
    sides as the comparison's document has them."""
    settings = [_settings(side) for side in sides]
    names = dict.fromkeys(name for found in settings for name in found)
    differ = [n for n in names if len({found.get(n, "") for found in settings}) > 1][:MOST_SETTINGS]
    rows = [
        {
            "key": about["name"],
            "title": about["title"],
            "level": about["level"],
            "worst": about["verdict"]["name"],
            **_findings(made),
            "steps": side.last_step,
            "loss": _last_loss(side),
            "best": _best(side),
            "settings": [found.get(name, "–") for name in differ],
        }
        for about, side, made, found in zip(described, sides, audits, settings, strict=True)
    ]
    return {"columns": differ, "rows": rows}


def _findings(audits: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    levels = [audit["level"] for audit in audits]
    return {"alarms": levels.count(str(Level.ALARM)), "warnings": levels.count(str(Level.WARNING))}


def _last_loss(side: Evidence) -> dict[str, Any] | None:
    if side.history is None or not len(side.history):
        return None
    value = float(numpy.asarray(side.history.loss)[-1])
    return {"number": finite(value), "text": "not finite" if not math.isfinite(value) else format_number(value)}


def _best(side: Evidence) -> dict[str, Any] | None:
    best = best_step(outcome_courses(side)) if side.kind == "run" else None
    return best and {"text": best["value"], "number": best["number"], "what": best["what"], "step": best["step"]}


def best_row(table: Mapping[str, Any] | None) -> str:
    """Which run is best on held-out data, in a sentence; empty where they were not all measured in one way."""
    rows = table["rows"] if table else []
    measured = [(row["best"]["number"], row) for row in rows if row["best"]]
    kinds = {row["best"]["what"] for _, row in measured}
    if len(kinds) != 1 or len(measured) < len(rows):
        return ""
    _, row = (max if kinds == {"accuracy"} else min)(measured, key=lambda item: item[0])
    name, best = f"{row['key']} ({row['title']})", row["best"]
    return f" Best held-out {best['what']}: {best['text']}, of {name} at step {best['step']:,}."


def _settings(side: Evidence) -> dict[str, str]:
    """What was chosen: optimizer, rate, seed and the run's own metadata, as texts."""
    about = {k: v for k, v in side.metadata.items() if k not in NOT_SETTINGS and not isinstance(v, Mapping)}
    optimizer = (side.history.optimizer if side.history is not None else {}) or {}
    known = about | {k: v for k, v in dict(optimizer).items() if not isinstance(v, (Mapping, list, tuple))}
    chosen = {k: v for k, v in known.items() if v not in (None, "") and not _was_drawn(v)}
    return {clean(k).replace("_", " "): clean(as_text(v)) for k, v in chosen.items()}


def _was_drawn(value: Any) -> bool:
    """Whether it is a seed of twenty digits that nobody chose."""
    return isinstance(value, int) and abs(value) >= DRAWN_SEED
