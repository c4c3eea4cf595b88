"""Reads the folder that a watched training wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diag.encoding import decode
from diag.errors import RunError
from diag.run.damage import damaged, missing
from diag.run.entries import Cost, Event, Record, Unread
from diag.run.files import DAMAGED, META, RECORDS_FILE, STEPS_FILE, read_metadata
from diag.run.records import OUTCOMES, kept_records, read_records
from diag.run.rows import history_of, kept_rows, read_rows
from diag.run.run import Run


def read_run(path: str | Path) -> Run:
    """Open the run in the folder `path` (or the folder's run.json).

    A record that a killed writer left torn is dropped and counted in `torn`. What is not as it was written (a
    checksum does not fit, a file is gone) is left out, and events of the kind "damaged" say so.
    Raises RunError where there is no run, one of another format, or one whose files cannot be read.
    """
    folder = Path(path).parent if Path(path).name == META else Path(path)
    metadata, wrong = read_metadata(folder)
    try:
        rows = read_rows(folder / STEPS_FILE, metadata["row"], metadata["seal"])
        found = read_records(folder / RECORDS_FILE, metadata["seal"])
    except OSError as error:
        raise RunError(f"The run {folder} cannot be read ({error.strerror}: {error.filename}).") from None
    wrong += [*missing(folder, metadata, rows, found), *damaged(rows, found)]
    torn_before = sum(int(r.get("torn", 0)) for r in found.all if r["type"] == "resume")
    kept, records = kept_rows(rows, found.all), kept_records(found.all)
    events = [Event(r["step"], r.get("kind", r["type"]), r["text"]) for r in records if "text" in r]
    last = max([0, *kept["steps"][-1:].tolist(), *(r["step"] for r in records)])
    return Run(
        path=folder,
        metadata=metadata,
        history=history_of(metadata, kept, records),
        records=tuple(
            Record(r["step"], r["instrument"], Unread(r["type"], r["data"]), r.get("seconds"))
            for r in records
            if r["type"] in OUTCOMES
        ),
        events=(*events, *(Event(last, DAMAGED, sentence) for sentence in wrong)),
        times=tuple(_times(records)),
        metrics=_metrics(records),
        torn=rows.torn + found.torn + torn_before,
    )


def _metrics(records: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for r in records:
        if r["type"] == "metrics":
            for name, value in decode(r["values"]).items():
                found.setdefault(str(name), []).append((r["step"], float(value)))
    return found


def _times(records: Iterable[Mapping[str, Any]]) -> Iterable[Cost]:
    for r in records:
        if r["type"] == "cost":
            yield Cost(r["step"], r["instrument"], *(r.get(name, 0.0) for name in Cost._fields[2:]))
