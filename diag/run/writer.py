"""`RunWriter` appends to the files of a run (run_files says what they are); at most one writer a folder.

Every append is one write to the operating system, so what a call has written survives SIGKILL.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import weakref
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.errors import InvalidInput, RunError
from diag.result import Outcome, encode, plain
from diag.run.files import (
    ARRAYS,
    FORMAT,
    FORMAT_VERSION,
    LOCK,
    META,
    PREVIOUS,
    RECORDS,
    STEPS,
    jsonable,
    kept_records,
    kept_rows,
    outcome_record,
    read_metadata,
    read_records,
    read_rows,
    record_line,
    row_columns,
    row_dtype,
    write_atomically,
)
from diag.snapshot.history import History

# The writers that this process has open. A notebook cell that is run twice must be able to take its own folder
# over, and a forked data loader worker must not keep the lock of a parent that was killed.
_open_writers: weakref.WeakValueDictionary[str, RunWriter] = weakref.WeakValueDictionary()


class RunWriter:
    """Appends to the run in the folder `path`; at most one writer a folder.

    metadata: plain data about the run; `layers` (parameter name -> number of elements) must be there.
    resume: False starts a new run; an earlier run in the folder is kept as `previous-run/` (one generation),
        and other files there are left alone. True continues the run's step numbers after `last_step`, and
        starts a new run where there is none. A step number continues after that step: what was recorded
        beyond it is superseded (training restarted from an older checkpoint).

    Raises RunError where another process writes to the folder, where the folder's run has other layers
    (naming the first difference) or cannot be read. A writer of the same process is closed and replaced.
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, Any], resume: bool | int = False) -> None:
        self.path = Path(path)
        self._files: dict[str, int] = {}
        if "layers" not in metadata:
            raise InvalidInput(
                "The run's metadata lack layers; give the number of elements of each parameter, by name."
            )
        self.layers: dict[str, int] = {str(k): int(v) for k, v in metadata["layers"].items()}
        self.last_step = 0
        self._notes: set[str] = set()
        self._optimizer: Any = None
        self._dtype = row_dtype(row_columns(len(self.layers)))
        self._take_folder()
        try:
            if resume is False or not (self.path / META).exists():
                self._begin(metadata)
            else:
                self._continue(metadata, resume)
        except BaseException:
            self.close()
            raise

    # Opening

    def _take_folder(self) -> None:
        key = os.path.realpath(self.path)
        if key in _open_writers:
            _open_writers.pop(key).close()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._files[LOCK] = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"The run folder {self.path} cannot be made ({error.strerror}); give another.") from None
        try:
            _lock(self._files[LOCK], self.path)
        except RunError:
            self.close()
            raise
        _open_writers[key] = self

    def _begin(self, metadata: Mapping[str, Any]) -> None:
        _set_aside(self.path)
        (self.path / ARRAYS).mkdir(exist_ok=True)
        about = {"format": FORMAT, "format_version": FORMAT_VERSION, "created": _now()}
        row = {"row": row_columns(len(self.layers))}
        write_atomically(self.path / META, jsonable(metadata) | about | row | {"layers": self.layers})
        self._open_files()

    def _open_files(self) -> None:
        for name in (STEPS, RECORDS):
            self._files[name] = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _continue(self, metadata: Mapping[str, Any], resume: bool | int) -> None:
        before = read_metadata(self.path)
        _refuse_other_layers(before["layers"], self.layers, self.path)
        (self.path / ARRAYS).mkdir(exist_ok=True)
        self._dtype = row_dtype(before["row"])
        rows, torn_rows = read_rows(self.path, before["row"])
        records, _ = read_records(self.path)
        last_row = kept_rows(rows, records)["steps"][-1:].tolist()
        self.last_step = max([0, *last_row, *(r["step"] for r in kept_records(records))])
        if resume is not True:
            if resume < 0 or resume > self.last_step:
                raise RunError(
                    f"resume={resume} is not a step of {self.path}, which has steps up to {self.last_step}; "
                    "give one of these, or resume=True to go on after the last."
                )
            self.last_step = int(resume)
        dropped = torn_rows + _cut_torn_tail(self.path, len(rows) * self._dtype.itemsize)
        changed = {k: v for k, v in jsonable(metadata).items() if before.get(k) != v}
        before["sessions"] = [*before.get("sessions", []), {"resumed": _now(), "after": self.last_step, **changed}]
        write_atomically(self.path / META, jsonable(before))
        self._open_files()
        text = f"resumed after step {self.last_step}"
        self._append_record(
            {"type": "resume", "step": self.last_step, "rows": len(rows), "torn": dropped, "text": text}
        )

    # Appending

    def append_steps(self, rows: History) -> None:
        """Append the rows of `rows`; its steps must continue after `last_step`. New notes are recorded too."""
        if not len(rows):
            return
        self.append_table(_table(rows, self._dtype, self.layers, self.last_step, self.path))
        for note in rows.notes:
            if note not in self._notes:
                self._notes.add(note)
                self._append_record({"type": "note", "step": self.last_step, "text": note})
        self.append_optimizer(rows.optimizer)

    @property
    def dtype(self) -> numpy.dtype[Any]:
        """The NumPy dtype of one row of steps."""
        return self._dtype

    def append_table(self, table: NDArray[Any]) -> None:
        """Append rows that are in this form (`dtype`) already: the quick way, for every step of a watched run."""
        self._write(STEPS, table.tobytes())
        self.last_step = int(table["steps"][-1])

    def append_optimizer(self, optimizer: Mapping[str, Any]) -> None:
        """Append what the optimizer is, where that is new."""
        if optimizer and optimizer != self._optimizer:
            self._optimizer = dict(optimizer)
            record = {"type": "optimizer", "step": self.last_step, "data": jsonable(optimizer)}
            self._append_record(record)

    def append_outcome(self, step: int, outcome: Outcome, seconds: float | None = None) -> None:
        """Append what an instrument gave at `step`, and the time it took (it appears in the run's costs)."""
        self._append_record(outcome_record(step, outcome, seconds, self._save_array))

    def append_event(self, step: int, kind: str, text: str) -> None:
        """Append something that happened ("not observed", "skipped step", "exception"), in one sentence."""
        self._append_record({"type": "event", "step": step, "kind": kind, "text": text})

    def append_cost(
        self,
        step: int,
        instrument: str = "",
        seconds: float = 0.0,
        wall_seconds: float = 0.0,
        watch_seconds: float = 0.0,
        always_on_seconds: float = 0.0,
        check_seconds: float = 0.0,
    ) -> None:
        """Append time spent: on an instrument that gave no outcome, and, since the last such record, the wall
        time that passed (`wall_seconds`) and the part of it spent in the watch (`watch_seconds`): of that, in what
        runs at every step (`always_on_seconds`) and in looks at the probe set (`check_seconds`)."""
        times = {
            "seconds": seconds,
            "wall_seconds": wall_seconds,
            "watch_seconds": watch_seconds,
            "always_on_seconds": always_on_seconds,
            "check_seconds": check_seconds,
        }
        self._append_record({"type": "cost", "step": step, "instrument": instrument, **encode(plain(times))})

    def close(self) -> None:
        """Close the files and let the folder go; may be called twice."""
        files, self._files = self._files, {}
        for descriptor in files.values():
            os.close(descriptor)
        if _open_writers.get(os.path.realpath(self.path)) is self:
            del _open_writers[os.path.realpath(self.path)]

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append_record(self, record: Mapping[str, Any]) -> None:
        self._write(RECORDS, record_line(record))

    def _save_array(self, array: NDArray[Any]) -> str:
        buffer = io.BytesIO()
        numpy.save(buffer, array, allow_pickle=False)
        data = buffer.getvalue()
        name = hashlib.blake2b(data, digest_size=12).hexdigest() + ".npy"
        target = self.path / ARRAYS / name
        if not target.exists():  # named by content: an array that repeats is stored once
            partial = target.with_suffix(f".{os.getpid()}.partial")
            partial.write_bytes(data)
            partial.replace(target)
        return name

    def _write(self, name: str, data: bytes) -> None:
        if name not in self._files:
            raise RunError(f"The run {self.path} is closed; open it again with resume=True to go on writing.")
        descriptor = self._files[name]
        written = 0
        try:
            while written < len(data):
                written += os.write(descriptor, data[written:] if written else data)
        except OSError as error:
            # A half-written record would spoil all that follow.
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise RunError(f"{self.path / name} cannot be written ({error.strerror}); free some space.") from None


def _table(
    rows: History, dtype: numpy.dtype[Any], layers: Mapping[str, int], last_step: int, path: Path
) -> NDArray[Any]:
    _refuse_other_layers(layers, dict(zip(rows.layers, rows.sizes, strict=True)), path)
    if rows.steps[0] <= last_step or (numpy.diff(rows.steps) <= 0).any():
        raise RunError(
            f"Steps {rows.steps[0]} to {rows.steps[-1]} do not continue {path}, whose last step is {last_step}; "
            "append increasing steps after it."
        )
    table = numpy.zeros(len(rows), dtype)
    for name in dtype.names or ():
        table[name] = getattr(rows, name)
    return table


def _refuse_other_layers(known: Mapping[str, int], given: Mapping[str, int], path: Path) -> None:
    if list(known.items()) == list(given.items()):
        return
    for name in [*known, *given]:
        if known.get(name) != given.get(name):
            has, gets = (f"{d[name]:,} elements" if name in d else "no such layer" for d in (known, given))
            raise RunError(
                f"The model does not fit the run {path}: for {name} the run has {has} and the model {gets}; "
                "give the same model, or another run folder."
            )
    raise RunError(f"The model has the layers of the run {path} in another order; give the same model.")


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock to take
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
        raise RunError(
            f"{path} is being written by process {owner or '(unknown)'}; stop it, or give another run folder."
        ) from None
    except OSError:  # some network file systems have no locks
        return
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def _set_aside(folder: Path) -> None:
    """Move a run that lies in `folder` to `previous-run/`, replacing the one kept there."""
    ours = [folder / name for name in (META, STEPS, RECORDS, ARRAYS) if (folder / name).exists()]
    # Moved through a folder of its own, run.json first, so that after being killed half-way the next start ends
    # the move.
    moving, kept = folder / f"{PREVIOUS}.moving", folder / PREVIOUS
    if not ours and not moving.exists():
        return
    if not moving.exists():
        _refuse_foreign(folder, ours[0])
    moving.mkdir(exist_ok=True)
    for file in ours:
        file.replace(moving / file.name)
    if kept.exists():
        _refuse_foreign(kept, kept)
        shutil.rmtree(kept)
    moving.replace(kept)


def _refuse_foreign(folder: Path, what: Path) -> None:
    """Raise RunError unless diag wrote the run.json of `folder`; a run of a newer format may be replaced."""
    try:
        data = json.loads((folder / META).read_bytes())
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RunError(f"{what} was not written by diag and is in the way; give another run folder.")


def _cut_torn_tail(folder: Path, rows_bytes: int) -> int:
    """Cut the torn ends off both files; the number of torn lines (0 or 1) in records.jsonl."""
    if (folder / STEPS).exists():
        os.truncate(folder / STEPS, rows_bytes)
    if not (folder / RECORDS).exists():
        return 0
    data = (folder / RECORDS).read_bytes()
    whole = data.rfind(b"\n") + 1
    os.truncate(folder / RECORDS, whole)
    return int(whole < len(data))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _let_go_in_child() -> None:
    for writer in list(_open_writers.values()):
        writer.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
