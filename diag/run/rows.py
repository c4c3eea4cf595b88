"""The rows of steps.bin: what a row holds, its checksum, and the history that rows make.

A row ends in a checksum of its bytes that starts from the run's seal and its place in the file, so that a row that
was changed, moved, inserted twice or taken from another run is detected. Every row is one write to the operating
system.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from diag.encoding import decode
from diag.snapshot.history import History, empty_history, unmap

CRC = "crc"
CRC_BYTES = 4
ROW_BYTES_AT_ONCE = 1 << 22  # bytes that are read at a time
DTYPE = re.compile(r"<[fiu][248]|\|[biu]1")
MOST_LAYERS = 1 << 24


def row_columns(num_layers: int) -> list[list[Any]]:
    """The columns of a row of steps.bin as JSON: name, little-endian dtype and, for one value a layer, [L].

    They are the arrays of a `History`, so that what is observed of a step is named in one place.
    """
    series = vars(empty_history({str(i): 1 for i in range(num_layers)}, 1))
    arrays = {name: a for name, a in series.items() if isinstance(a, numpy.ndarray)}
    columns: list[list[Any]] = [[n, a.dtype.newbyteorder("<").str, list(a.shape[1:])] for n, a in arrays.items()]
    return [["total_steps", "<i8", []], *columns, [CRC, f"<u{CRC_BYTES}", []]]


def row_dtype(columns: Iterable[Iterable[Any]]) -> numpy.dtype[Any]:
    """The NumPy dtype of a row that has these columns."""
    return numpy.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in columns])


def check_columns(columns: Iterable[Any], num_layers: int) -> None:
    """Raise ValueError unless these are columns of numbers, among them all that a history needs."""
    if num_layers > MOST_LAYERS:
        raise ValueError("more layers than a model can have")
    shapes: dict[str, list[int]] = {}
    for name, dtype, shape in columns:
        if not isinstance(name, str) or not DTYPE.fullmatch(str(dtype)) or shape not in ([], [num_layers]):
            raise ValueError(f"a column {str(name)[:40]!r} of another kind")
        shapes[name] = shape
    needed = {name: shape for name, _, shape in row_columns(num_layers)}
    if missing := [n for n in needed if shapes.get(n) != needed[n]] or list(shapes)[-1] != CRC:
        raise ValueError(f"the column {missing[0] if isinstance(missing, list) else CRC} is not where it belongs")


def sealed(data: bytes, itemsize: int, first: int, seal: int) -> bytes:
    """The bytes of rows with their checksums; `first` is the place of the first of them in the file, `seal` the
    number of their run."""
    if len(data) == itemsize:
        body = data[:-CRC_BYTES]
        return body + zlib.crc32(body, (seal + first) & 0xFFFFFFFF).to_bytes(CRC_BYTES, "little")
    starts = range(0, len(data), itemsize)
    return b"".join(sealed(data[at : at + itemsize], itemsize, first + i, seal) for i, at in enumerate(starts))


class Rows(NamedTuple):
    """All rows of the file, memory-mapped; which of them are whole; how many at the end were torn.

    A machine that lost power may leave rows of zeros; these at the end, and a part of a row, are torn.
    """

    all: NDArray[Any]
    whole: NDArray[numpy.bool_]
    torn: int

    @property
    def damaged(self) -> int:
        """How many rows do not fit their checksums."""
        return int((~self.whole).sum())


def read_rows(file: Path, columns: Iterable[Iterable[Any]], seal: int) -> Rows:
    """The rows of steps.bin, each compared with its checksum. Raises OSError where the file cannot be read."""
    dtype = row_dtype(columns)
    size = file.stat().st_size if file.exists() else 0
    count, rest = divmod(size, dtype.itemsize)
    if not count:
        return Rows(numpy.empty(0, dtype), numpy.zeros(0, bool), int(rest > 0))
    whole = numpy.concatenate(list(_whole(file, dtype, count, seal)))
    rows = numpy.memmap(file, dtype, "r", shape=(count,))
    kept = count
    while kept and not whole[kept - 1] and not any(rows[kept - 1].tobytes()):
        kept -= 1
    return Rows(rows[:kept], whole[:kept], count - kept + int(rest > 0))


def _whole(file: Path, dtype: numpy.dtype[Any], count: int, seal: int) -> Iterator[NDArray[numpy.bool_]]:
    """For each row, whether its checksum fits; read in blocks, so that no file fills the memory."""
    size, at = dtype.itemsize, 0
    body, step = size - CRC_BYTES, max(1, ROW_BYTES_AT_ONCE // size)
    with open(file, "rb") as source:
        while at < count:
            data = memoryview(source.read(size * min(step, count - at)))
            if len(data) < size:  # cut by somebody else while it is read
                yield numpy.zeros(count - at, bool)
                return
            rows = numpy.frombuffer(data[: len(data) // size * size], dtype)
            starts = [(seal + at + i) & 0xFFFFFFFF for i in range(len(rows))]
            sums = [zlib.crc32(data[i * size : i * size + body], start) for i, start in enumerate(starts)]
            yield rows[CRC] == numpy.array(sums, numpy.uint32)
            at += len(rows)


def kept_rows(rows: Rows, records: Iterable[Mapping[str, Any]]) -> NDArray[Any]:
    """The whole rows that no resumption from an earlier step superseded; the memory map where that is all."""
    keep, resumed = rows.whole.copy(), [r for r in records if r["type"] == "resume"]
    steps = _columns(rows.all, ["steps"])["steps"] if resumed else rows.all[:0]
    for record in resumed:
        keep[: record["rows"]] &= steps[: record["rows"]] <= record["step"]
    return rows.all if keep.all() else _picked(rows.all, keep)


def _picked(rows: NDArray[Any], keep: NDArray[numpy.bool_]) -> NDArray[Any]:
    """These rows: in memory or, where they are many, in a file without a name."""
    if rows.nbytes <= 16 * ROW_BYTES_AT_ONCE:
        return rows[keep]
    with tempfile.TemporaryFile() as file:
        for part, kept in zip(_blocks(rows), _blocks(keep, _at_once(rows)), strict=True):
            file.write(part[kept].tobytes())
        file.flush()
        return numpy.memmap(file, rows.dtype, "r") if keep.any() else rows[:0]


def _columns(rows: NDArray[Any], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Copies of some columns. To read one from the map would bring nearly all of the file into memory, for good."""
    parts = [{name: numpy.array(part[name]) for name in names} for part in _blocks(rows)]
    return {name: numpy.concatenate([part[name] for part in parts]) for name in names}


def _blocks(rows: NDArray[Any], at_once: int = 0) -> Iterator[NDArray[Any]]:
    """Consecutive parts (one at least, which may be empty) of at most `ROW_BYTES_AT_ONCE` bytes or so many rows."""
    at_once = at_once or _at_once(rows)
    for at in range(0, max(1, len(rows)), at_once):
        yield rows[at : at + at_once]
        unmap(rows)


def _at_once(rows: NDArray[Any]) -> int:
    return max(1, ROW_BYTES_AT_ONCE // rows.dtype.itemsize)


def history_of(metadata: Mapping[str, Any], rows: Any, records: Iterable[Mapping[str, Any]]) -> History | None:
    """The step-by-step record that the kept rows and records hold; None without a row."""
    if not len(rows):
        return None
    empty = empty_history(metadata["layers"])
    optimizer = [r["data"] for r in records if r["type"] == "optimizer"]
    # Columns with a value a layer are views into the memory map: nothing is read before it is used.
    names = [n for n in rows.dtype.names if hasattr(empty, n)]
    wide = {n: numpy.asarray(rows[n]) for n in names if rows.dtype[n].shape}
    columns: dict[str, Any] = wide | _columns(rows, [n for n in names if n not in wide])
    columns["total_steps"] = int(rows["total_steps"][-1])
    notes = tuple(dict.fromkeys(r["text"] for r in records if "note" in (r["type"], r.get("kind"))))
    return dataclasses.replace(empty, **columns, optimizer=decode(optimizer[-1]) if optimizer else {}, notes=notes)
