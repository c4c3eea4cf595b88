"""The files of a run, and the only code that writes them.

    run.json        what the run is (metadata), the format's version, the columns of a row of steps.bin
    steps.bin       one fixed-width little-endian row an optimizer step
    records.jsonl   one line a result, skip, failure, event or cost
    arrays/         the results' larger arrays, named by their content, complete before a line names them
    writer.lock     held (flock) by the process that writes
    previous-run/   the run that was in this folder before, if any

Every append is one write to the operating system, so what a call has written survives SIGKILL. Only the last
record of a file can be torn; readers drop it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.errors import InvalidInput, RunError
from diag.result import Failed, Outcome, Result, decode, encode, plain
from diag.snapshot.history import History, empty_history

FORMAT = "diag-run"
FORMAT_VERSION = 1
META, STEPS, RECORDS, ARRAYS = "run.json", "steps.bin", "records.jsonl", "arrays"
LOCK, PREVIOUS = "writer.lock", "previous-run"

OUTCOMES = ("result", "skipped", "failed")
REQUIRED = {
    "result": ("instrument", "data"),
    "skipped": ("instrument", "data"),
    "failed": ("instrument", "data"),
    "resume": ("rows",),
    "event": ("kind", "text"),
    "optimizer": ("data",),
}
OUTCOME_BYTES = {name.encode() for name in OUTCOMES}
# How a line with a checksum begins, and an outcome's line up to its data. An instrument's name that needs
# escapes is left to the JSON parser.
CHECKED = re.compile(
    rb'\{"crc":"([0-9a-f]{8})",(?:"type":"(?P<kind>\w+)","step":(?P<step>\d+),'
    rb'"instrument":"(?P<instrument>[^"\\]+)","seconds":(?P<seconds>[0-9.e+-]+|null),"data":)?'
)


def row_columns(num_layers: int) -> list[list[Any]]:
    """The columns of a row of steps.bin as JSON: name, little-endian dtype and, for one value a layer, [L].

    They are the arrays of a `History`, so that what is observed of a step is named in one place.
    """
    series = vars(empty_history({str(i): 1 for i in range(num_layers)}, 1))
    arrays = {name: a for name, a in series.items() if isinstance(a, numpy.ndarray)}
    columns: list[list[Any]] = [[n, a.dtype.newbyteorder("<").str, list(a.shape[1:])] for n, a in arrays.items()]
    return [["total_steps", "<i8", []], *columns]


def row_dtype(columns: Iterable[Iterable[Any]]) -> numpy.dtype[Any]:
    """The NumPy dtype of a row that has these columns."""
    return numpy.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in columns])


def read_metadata(folder: Path) -> dict[str, Any]:
    """The contents of run.json.

    Raises RunError where there is no run, where the file is not one of ours, or where its format is newer.
    """
    file = folder / META
    if not file.exists():
        hint = "" if folder.exists() else " (there is no such folder)"
        raise RunError(
            f"{folder} holds no run{hint}; expected a folder that diag.watch(model, run=...) has written."
        )
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error}); expected the run.json of a diag run.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RunError(f"{file} was not written by diag; give another folder.")
    if data.get("format_version", 0) > FORMAT_VERSION:
        raise RunError(
            f"{folder} has run format {data['format_version']} and this diag reads up to {FORMAT_VERSION}; "
            "install a newer diag."
        )
    try:
        row_dtype(data["row"])
        dict(data["layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file} is damaged (its row or layers: {error}); restore it from a copy.") from None
    return _with_floats(data)


def _with_floats(value: Any) -> Any:
    """What `encode` made of numbers that JSON has not (infinity), as numbers again."""
    if isinstance(value, dict):
        return decode(value) if "__float__" in value else {k: _with_floats(v) for k, v in value.items()}
    return [_with_floats(v) for v in value] if isinstance(value, list) else value


def read_rows(folder: Path, columns: Iterable[Iterable[Any]]) -> tuple[NDArray[Any], int]:
    """The complete rows of steps.bin, memory-mapped, and how many rows at the end were torn."""
    dtype, file = row_dtype(columns), folder / STEPS
    size = file.stat().st_size if file.exists() else 0
    count, rest = divmod(size, dtype.itemsize)
    if not count:
        return numpy.empty(0, dtype), int(rest > 0)
    rows = numpy.memmap(file, dtype, "r", shape=(count,))
    whole = count
    while whole and rows["steps"][whole - 1] <= 0:  # a machine that lost power may leave rows of zeros
        whole -= 1
    return rows[:whole], count - whole + int(rest > 0)


def record_line(record: Mapping[str, Any]) -> bytes:
    """A record as a line of records.jsonl: its JSON, with a checksum of all that follows the checksum in front."""
    body = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()[1:]
    return b'{"crc":"%08x",%b\n' % (zlib.crc32(body), body)


def read_records(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of records.jsonl in order, and how many were damaged.

    The `data` of an outcome is left as the bytes of its line (`outcome_data` reads them): its checksum tells that
    they are whole, and parsing a hundred thousand results would take many times as long.
    """
    file = folder / RECORDS
    *lines, last = (file.read_bytes() if file.exists() else b"").split(b"\n")
    records = [record for record in map(_record, lines) if record is not None]
    return records, len(lines) - len(records) + int(bool(last))


def _record(line: bytes) -> dict[str, Any] | None:
    start = CHECKED.match(line)
    if start is not None and int(start[1], 16) != zlib.crc32(line[start.end(1) + 2 :]):
        return None
    if start is not None and start["kind"] in OUTCOME_BYTES:
        seconds = None if start["seconds"] == b"null" else float(start["seconds"])
        name = start["instrument"].decode()
        about = {"step": int(start["step"]), "instrument": name, "seconds": seconds, "data": line}
        return {"type": start["kind"].decode(), **about}
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    if any(name not in record for name in REQUIRED.get(record.get("type", ""), ())):
        return None
    return record | {"data": line} if record.get("type") in OUTCOMES else record


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
    """The `data` of an outcome that `read_records` left as its line."""
    return json.loads(line)["data"]


def read_array(folder: Path, name: str) -> NDArray[Any]:
    """An array that a record names. Raises RunError where the file is missing, damaged or elsewhere."""
    try:
        if Path(name).name != name:
            raise ValueError("not a plain file name")
        return numpy.load(folder / ARRAYS / name, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"The array {name!r} of {folder} cannot be read ({error}).") from None


def kept_rows(rows: NDArray[Any], records: Iterable[Mapping[str, Any]]) -> NDArray[Any]:
    """The rows that no resumption from an earlier step superseded; the memory map itself where that is all."""
    resumed = [r for r in records if r["type"] == "resume"]
    keep = numpy.ones(len(rows), bool)
    for record in resumed:
        keep[: record["rows"]] &= rows["steps"][: record["rows"]] <= record["step"]
    return rows if keep.all() else rows[keep]


def kept_records(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that no resumption from an earlier step superseded; time once spent stays spent."""
    kept: list[dict[str, Any]] = []
    for record in records:
        if record.get("type") == "resume":
            kept = [r for r in kept if r["step"] <= record["step"] or r.get("type") == "cost"]
        kept.append(record)
    return kept


def history_of(metadata: Mapping[str, Any], rows: Any, records: Iterable[Mapping[str, Any]]) -> History | None:
    """The step-by-step record that the kept rows and records hold; None without a row."""
    if not len(rows):
        return None
    layers = metadata["layers"]
    optimizer = [r["data"] for r in records if r["type"] == "optimizer"]
    # Columns are views into the memory map: nothing is read before it is used.
    columns: dict[str, Any] = {n: numpy.asarray(rows[n]) for n in rows.dtype.names if n != "total_steps"}
    return dataclasses.replace(
        empty_history(layers),
        **columns,
        total_steps=int(rows["total_steps"][-1]),
        optimizer=decode(optimizer[-1]) if optimizer else {},
        notes=tuple(dict.fromkeys(r["text"] for r in records if "note" in (r["type"], r.get("kind")))),
    )


def jsonable(value: Any) -> Any:
    """Plain data as JSON; what JSON cannot hold becomes its text."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (tuple, list, set)):
        return [jsonable(v) for v in value]
    try:
        return encode(plain(value))
    except InvalidInput:
        return str(value)


def write_atomically(file: Path, data: Mapping[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1, allow_nan=False))
    partial.replace(file)
