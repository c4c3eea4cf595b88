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
    sides: Sequence[Evidence], keys: Sequence[str], titles: Sequence[str], audits: Sequence[Sequence[Any]]
) -> dict[str, Any]:
    """The table: `columns` are the settings and logged numbers that differ between the runs."""
    settings = [_settings(side) for side in sides]
    names = dict.fromkeys(name for found in settings for name in found)
    differ = [n for n in names if len({found.get(n, "") for found in settings}) > 1][:MOST_SETTINGS]
    rows = [
        {
            "key": key,
            "title": title,
            **_state(made),
            "steps": side.last_step,
            "loss": _last_loss(side),
            "best": _best(side),
            "settings": [found.get(name, "–") for name in differ],
        }
        for key, title, side, made, found in zip(keys, titles, sides, audits, settings, strict=True)
    ]
    return {"columns": differ, "rows": rows}


def _state(audits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    levels = [audit["level"] for audit in audits]
    wrong = [level for level in (str(Level.ALARM), str(Level.WARNING)) if level in levels]
    level = wrong[0] if wrong else str(Level.OK if str(Level.OK) in levels else Level.UNKNOWN)
    worst = next((audit["name"] for audit in audits if wrong and audit["level"] == level), "")
    counts = {name: levels.count(name) for name in (str(Level.ALARM), str(Level.WARNING))}
    return {"level": level, "worst": worst, "alarms": counts["alarm"], "warnings": counts["warning"]}


def _last_loss(side: Evidence) -> dict[str, Any] | None:
    if side.history is None or not len(side.history):
        return None
    value = float(numpy.asarray(side.history.loss)[-1])
    return {"number": finite(value), "text": "not finite" if not math.isfinite(value) else format_number(value)}


def _best(side: Evidence) -> dict[str, Any] | None:
    best = best_step(outcome_courses(side)) if side.kind == "run" else None
    return best and {"text": best["value"], "what": best["what"], "step": best["step"]}


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
