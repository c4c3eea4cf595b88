"""The lines of records.jsonl: what a line holds, its number and checksum, and which lines still count.

A line is {"crc": checksum of all that follows, "n": its number, "type": ..., "step": ..., ...}. The checksum starts
from the run's seal, so that a line of another run does not fit. A gap in the numbers shows that lines are lost; a
repeated number, that one was inserted twice or moved.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diag.encoding import decode
from diag.errors import InvalidInput
from diag.result import Failed, Outcome, Result
from diag.run.files import LARGEST_NUMBER

OUTCOMES = ("result", "skipped", "failed")
OUTCOME_BYTES = {name.encode() for name in OUTCOMES}
# How every line begins, and an outcome's line up to its data. An instrument's name that needs escapes is left to
# the JSON parser.
START = re.compile(
    rb'\{"crc":"([0-9a-f]{8})","n":(?P<n>\d{1,18}),(?:"type":"(?P<kind>\w+)","step":(?P<step>\d{1,18}),'
    rb'"instrument":"(?P<instrument>[^"\\\x00-\x1f]+)","seconds":(?P<seconds>\d[0-9.e+-]*|null),"data":)?'
)
AFTER_CRC = len(b'{"crc":"00000000",')
# What a record needs besides its step, and of which kind it is.
NEEDED: dict[str, dict[str, type]] = {
    "result": {"instrument": str, "data": dict},
    "skipped": {"instrument": str, "data": dict},
    "failed": {"instrument": str, "data": dict},
    "resume": {"rows": int},
    "end": {"rows": int},
    "event": {"kind": str, "text": str},
    "note": {"text": str},
    "optimizer": {"data": dict},
    "cost": {},
    "metrics": {"values": dict},
}


class Records(NamedTuple):
    """The records in order, and the state of their file.

    damaged: how many lines do not fit their checksums, or are gone. torn: whether the last is (0 or 1).
    next: the number of the next line. bytes: the size of the file without the torn end.
    """

    all: list[dict[str, Any]]
    damaged: int
    torn: int
    next: int
    bytes: int


def record_line(record: Mapping[str, Any], number: int, seal: int) -> bytes:
    """A record as line `number` of the records.jsonl of the run with this seal."""
    body = b'"n":%d,%b' % (number, json.dumps(record, allow_nan=False, separators=(",", ":")).encode()[1:])
    return b'{"crc":"%08x",%b\n' % (zlib.crc32(body, seal), body)


def read_records(file: Path, seal: int) -> Records:
    """The records of records.jsonl that fit their checksums. Raises OSError where it cannot be read.

    The `data` of an outcome is left as the bytes of its line (`outcome_data` reads them): its checksum shows that
    they are whole, and parsing a hundred thousand results would take many times as long.
    """
    data = file.read_bytes() if file.exists() else b""
    *lines, last = data.split(b"\n")
    records: list[dict[str, Any]] = []
    before = -1
    for line in lines:
        number, record = _record(line, seal)
        if record is None or number <= before:
            continue
        before = number
        records.append(record)
    bad, gone = len(lines) - len(records), before + 1 - len(records)
    end, following = len(data) - len(last), max(before + 1, len(lines))
    return Records(records, max(bad, gone), int(bool(last)), following, end)


def _record(line: bytes, seal: int) -> tuple[int, dict[str, Any] | None]:
    start = START.match(line)
    if start is None or int(start[1], 16) != zlib.crc32(line[AFTER_CRC:], seal):
        return 0, None
    try:
        record = _outcome(start, line) if start["kind"] in OUTCOME_BYTES else _other(line)
    except Exception:  # it was not written by diag
        return 0, None
    return int(start["n"]), record


def _outcome(start: re.Match[bytes], line: bytes) -> dict[str, Any]:
    seconds = None if start["seconds"] == b"null" else float(start["seconds"])
    about = {"step": int(start["step"]), "instrument": start["instrument"].decode(), "seconds": seconds}
    return {"type": start["kind"].decode(), **about, "data": line}


def _other(line: bytes) -> dict[str, Any] | None:
    record = json.loads(line)
    kind, needed = record["type"], NEEDED.get(record["type"])
    if not _is_count(record["step"]):
        return None
    if needed is None:  # of a newer diag
        return {"type": str(kind), "step": record["step"]}
    if not all(isinstance(record[name], of) for name, of in needed.items()):
        return None
    if not all(_is_count(record[name]) for name in ("rows", "torn") if name in record):
        return None
    if "text" in record and not isinstance(record["text"], str):
        return None
    if kind == "optimizer":
        decode(record["data"])  # raises where it is not what `encode` makes
    if kind == "cost":
        return {"type": kind, "step": record["step"], "instrument": str(record.get("instrument", ""))} | _times(
            record
        )
    seconds = record.get("seconds")
    if seconds is not None and not (isinstance(seconds, (int, float)) and math.isfinite(seconds)):
        return None
    checked: dict[str, Any] = record | {"data": line} if kind in OUTCOMES else record
    return checked


def _times(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(decode(value)) for name, value in record.items() if name.endswith("seconds")}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST_NUMBER


def outcome_record(step: int, outcome: Outcome, seconds: float | None, save_array: Any = None) -> dict[str, Any]:
    """An outcome as one JSON-safe record; `save_array` as for `Result.to_dict`."""
    if isinstance(outcome, Result):
        name, kind, data = outcome.provenance.instrument, "result", outcome.to_dict(save_array)
    else:
        name, kind = outcome.instrument, "failed" if isinstance(outcome, Failed) else "skipped"
        data = {k: v for k, v in dataclasses.asdict(outcome).items() if k != "instrument"}
    if not name:
        raise InvalidInput(
            f"A {type(outcome).__name__} does not say which instrument gave it; measure through one."
        )
    return {"type": kind, "step": int(step), "instrument": name, "seconds": seconds, "data": data}


def outcome_data(line: bytes) -> dict[str, Any]:
    """The `data` of an outcome that `read_records` left as its line. Raises ValueError where it is not a dict."""
    data = json.loads(line)["data"]
    if not isinstance(data, dict):
        raise ValueError("its data are not a dict")
    return data


def kept_records(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that no resumption from an earlier step superseded; time once spent stays spent."""
    kept: list[dict[str, Any]] = []
    for record in records:
        if record["type"] == "resume":
            kept = [r for r in kept if r["step"] <= record["step"] or r["type"] in ("cost", "end")]
        kept.append(record)
    return kept
