"""What is missing or damaged in a run's files, in sentences: nothing is left out silently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diag.errors import counted
from diag.run.files import RECORDS_FILE, STEPS_FILE
from diag.run.records import Records
from diag.run.rows import Rows


def missing(folder: Path, metadata: Mapping[str, Any], rows: Rows, records: Records) -> list[str]:
    """What is lost: files, and what was cut off at their ends."""
    return list(_missing(folder, metadata, rows, records))


def _missing(folder: Path, metadata: Mapping[str, Any], rows: Rows, records: Records) -> Iterator[str]:
    closed = metadata.get("closed") or {}
    resumed = max((r["rows"] for r in records.all if r["type"] == "resume"), default=0)
    counts = {
        STEPS_FILE: (len(rows.all), max(_count(closed.get("rows")), resumed), "row"),
        RECORDS_FILE: (records.next, _count(closed.get("records")), "line"),
    }
    for name, (found, expected, what) in counts.items():
        if not (folder / name).exists():
            yield f"{name} is missing, and with it what it held; restore it from a copy."
        elif expected > found:
            yield f"The last {counted(expected - found, what)} of {name} were cut off; restore it from a copy."


def damaged(rows: Rows, records: Records) -> Iterator[str]:
    """What is there and does not fit its checksum."""
    if number := rows.damaged:
        yield f"{counted(number, 'row')} of {STEPS_FILE} {_are(number)} damaged and left out."
    if number := records.damaged:
        yield f"{counted(number, 'line')} of {RECORDS_FILE} {_are(number)} damaged or gone, and left out."


def _count(value: Any) -> int:
    return value if type(value) is int else 0


def _are(number: int) -> str:
    return "is" if number == 1 else "are"
