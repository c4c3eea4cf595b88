"""Recorded outcomes as objects again: each line is decoded when it is first asked for, and once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diag.encoding import decode
from diag.errors import RunError
from diag.registry import Instrument
from diag.result import Failed, Skipped
from diag.run.arrays import read_array
from diag.run.entries import Record, Unread
from diag.run.files import ARRAYS
from diag.run.records import outcome_data


class DecodedOutcomes:
    """The outcomes of a run's records.

    folder: where the arrays of the results lie, if it has one. installed: the instruments that can read a result.
    """

    def __init__(self, folder: Path | None, installed: Mapping[str, Instrument]) -> None:
        self.folder, self.installed = folder, installed
        self._found: dict[int, Any] = {}

    def of(self, record: Record) -> Any:
        """The outcome of a record: a Result, Skipped or Failed; a raw dict for an unknown instrument."""
        outcome = record.outcome
        if not isinstance(outcome, Unread):
            return outcome
        if id(record) not in self._found:
            self._found[id(record)] = self._read(record.instrument, outcome)
        return self._found[id(record)]

    def _read(self, name: str, unread: Unread) -> Any:
        try:
            data = outcome_data(unread.line)
            if unread.kind != "result":
                made = Skipped if unread.kind == "skipped" else Failed
                return made(name, **{k: str(data[k]) for k in ("reason", "traceback") if k in data})
            if name not in self.installed:
                return decode(data, self._load_array)
            return self.installed[name].result.from_dict(data, self._load_array)
        except Exception as error:  # written by another version of the instrument, or its array is gone
            return Failed(name, f"Its recorded result cannot be read: {error}")

    def _load_array(self, name: str) -> Any:
        if self.folder is None:
            raise RunError(
                f"The array {name!r} lies in a run folder, and this run has none; open it from its folder."
            )
        return read_array(self.folder / ARRAYS, name)
