"""`RunWriter` appends to the files of a run (`files` says what they are); at most one writer a folder.

Every append is one write to the operating system, so what a call has written survives SIGKILL.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.encoding import encode, plain_data
from diag.errors import InvalidInput, RunError
from diag.result import Outcome
from diag.run.arrays import save_array
from diag.run.damage import missing
from diag.run.files import (
    ARRAYS,
    DAMAGED,
    LOCK,
    META,
    RECORDS_FILE,
    RUN_FOLDER_FORMAT,
    RUN_FOLDER_VERSION,
    STEPS_FILE,
    jsonable,
    metadata_text,
    read_metadata,
    write_atomically,
)
from diag.run.fitting import refuse_other_layers, table_of
from diag.run.folder import set_aside, take, tidy
from diag.run.growing import Growing
from diag.run.records import kept_records, outcome_record, read_records, record_line
from diag.run.rows import kept_rows, read_rows, row_columns, row_dtype, sealed
from diag.snapshot.history import History

# The writers that this process has open. A notebook cell that is run twice must be able to take its own folder
# over, and a forked data loader worker must not keep the lock of a parent that was killed.
_open_writers: weakref.WeakValueDictionary[str, RunWriter] = weakref.WeakValueDictionary()


class Unwritten(RunError):
    """A record could not be written whole; nothing of it was, and it may be tried again."""


class RunWriter:
    """Appends to the run in the folder `path`; at most one writer a folder.

    metadata: plain data about the run; `layers` (parameter name -> number of elements) must be there.
    resume: False starts a new run; an earlier run in the folder is kept as `previous-run/` (one generation),
        and other files there are left alone. True continues the run's step numbers after `last_step`, and
        starts a new run where there is none. A step number continues after that step: what was recorded
        beyond it is superseded (training restarted from an older checkpoint).

    rates_before: the first and the last learning rate of the run that is continued, empty where there is none.

    Raises RunError where another process writes to the folder, where the folder's run has other layers
    (naming the first difference) or cannot be read. A writer of the same process is closed and replaced.
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, Any], resume: bool | int = False) -> None:
        self.path = Path(os.path.abspath(path))  # the process may move to another folder later
        self._lock: int | None = None
        self._files: dict[str, Growing] = {}
        if "layers" not in metadata:
            raise InvalidInput(
                "The run's metadata lack layers; give the number of elements of each parameter, by name."
            )
        self.layers: dict[str, int] = {str(k): int(v) for k, v in metadata["layers"].items()}
        self.last_step = 0
        self.rates_before: tuple[float, ...] = ()
        self._notes: set[str] = set()
        self._optimizer: Any = None
        self._dtype = row_dtype(row_columns(len(self.layers)))
        self._take_folder()
        try:
            if resume is False or not (self.path / META).exists():
                self._begin(metadata)
            else:
                self._continue(metadata, resume)
        except OSError as error:
            self.close()
            raise RunError(f"The run folder {self.path} cannot be written ({error}); give another.") from None
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
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"The run folder {self.path} cannot be made ({error.strerror}); give another.") from None
        try:
            take(self._lock, self.path)
        except OSError as error:  # a disk that is full, say
            self.close()
            raise RunError(
                f"The run folder {self.path} cannot be written ({error.strerror}); give another."
            ) from None
        except RunError:
            self.close()
            raise
        _open_writers[key] = self

    def _begin(self, metadata: Mapping[str, Any]) -> None:
        set_aside(self.path)
        # run.json comes last: a folder that has it has the other files, or has lost them.
        self._files = {name: Growing(self.path / name) for name in (STEPS_FILE, RECORDS_FILE)}
        about = {"format": RUN_FOLDER_FORMAT, "format_version": RUN_FOLDER_VERSION, "created": _now()}
        row = {"seal": int.from_bytes(os.urandom(4), "little"), "row": row_columns(len(self.layers))}
        self._about = jsonable(metadata) | about | row | {"layers": self.layers}
        write_atomically(self.path / META, metadata_text(self._about))

    def _continue(self, metadata: Mapping[str, Any], resume: bool | int) -> None:
        tidy(self.path)
        before, wrong = read_metadata(self.path)
        refuse_other_layers(before["layers"], self.layers, self.path)
        self._dtype = row_dtype(before["row"])
        rows = read_rows(self.path / STEPS_FILE, before["row"], before["seal"])
        records = read_records(self.path / RECORDS_FILE, before["seal"])
        wrong += missing(self.path, before, rows, records)  # read now: it cannot be known once more is written
        kept = kept_rows(rows, records.all)
        last_row = kept["steps"][-1:].tolist()
        self.last_step = max([0, *last_row, *(r["step"] for r in kept_records(records.all))])
        if resume is not True:
            if resume < 0 or resume > self.last_step:
                raise RunError(
                    f"resume={resume} is not a step of {self.path}, which has steps up to {self.last_step}; "
                    "give one of these, or resume=True to go on after the last."
                )
            self.last_step = int(resume)
        rates = kept["learning_rate"][kept["steps"] <= self.last_step]
        self.rates_before = tuple(rates[[0, -1]].tolist()) if len(rates) else ()
        changed = {k: v for k, v in jsonable(metadata).items() if before.get(k) != v}
        before["sessions"] = [*before.get("sessions", []), {"resumed": _now(), "after": self.last_step, **changed}]
        count = len(rows.all)
        self._files = {
            STEPS_FILE: Growing(self.path / STEPS_FILE, count * self._dtype.itemsize, count),
            RECORDS_FILE: Growing(self.path / RECORDS_FILE, records.bytes, records.next),
        }
        self._about = jsonable(before)
        text = f"resumed after step {self.last_step}"
        torn = rows.torn + records.torn
        self._append_record({"type": "resume", "step": self.last_step, "rows": count, "torn": torn, "text": text})
        for sentence in wrong:
            self.append_event(self.last_step, DAMAGED, sentence)
        write_atomically(self.path / META, metadata_text(self._about))

    # Appending

    def append_steps(self, rows: History) -> None:
        """Append the rows of `rows`; its steps must continue after `last_step`. New notes are recorded too."""
        if not len(rows):
            return
        self.append_table(table_of(rows, self._dtype, self.layers, self.last_step, self.path))
        for note in rows.notes:
            if note not in self._notes:
                self._append_record({"type": "note", "step": self.last_step, "text": note})
                self._notes.add(note)
        self.append_optimizer(rows.optimizer)

    @property
    def dtype(self) -> numpy.dtype[Any]:
        """The NumPy dtype of one row of steps."""
        return self._dtype

    def append_table(self, table: NDArray[Any]) -> None:
        """Append rows that are in this form (`dtype`) already: the quick way, for every step of a watched run."""
        file = self._files.get(STEPS_FILE) or self._file(STEPS_FILE)
        data = sealed(table.tobytes(), self._dtype.itemsize, file.count(), self._about["seal"])
        self._write(file, data, len(table))
        self.last_step = int(table["steps"][-1])

    def append_optimizer(self, optimizer: Mapping[str, Any]) -> None:
        """Append what the optimizer is, where that is new."""
        if optimizer and optimizer != self._optimizer:
            record = {"type": "optimizer", "step": self.last_step, "data": jsonable(optimizer)}
            self._append_record(record)
            self._optimizer = dict(optimizer)

    def append_outcome(self, step: int, outcome: Outcome, seconds: float | None = None) -> None:
        """Append what an instrument gave at `step`, and the time it took (it appears in the run's costs)."""
        self._append_record(outcome_record(step, outcome, seconds, self._save_array))

    def append_event(self, step: int, kind: str, text: str) -> None:
        """Append something that happened ("not observed", "skipped step", "exception"), in one sentence."""
        self._append_record({"type": "event", "step": step, "kind": kind, "text": text})

    def append_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append numbers of the user's own at `step`, by name."""
        self._append_record({"type": "metrics", "step": step, "values": encode(dict(values))})

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
        self._append_record({"type": "cost", "step": step, "instrument": instrument, **encode(plain_data(times))})

    @property
    def closed(self) -> bool:
        """Whether nothing more can be appended."""
        return not self._files

    def restore(self) -> bool:
        """Where somebody has removed files of the run, write them again from what this process holds open.

        Returns whether that was so. Arrays that were removed are gone. Raises Unwritten where it cannot be done,
        or another run has taken the place.
        """
        gone = [file for file in self._files.values() if file.is_removed()]
        headless = not (self.path / META).exists() and any(file.is_at_path() for file in self._files.values())
        if not (gone or headless):
            return False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in gone:
                file.restore()
            if not (self.path / META).exists():
                write_atomically(self.path / META, metadata_text(self._about))
        except OSError as error:
            raise Unwritten(f"The files of {self.path} were removed and cannot be made again ({error}).") from None
        return True

    def close(self) -> None:
        """Record how much the run holds, close the files and release the folder; may be called twice."""
        if self._files:
            counts = {"rows": self._files[STEPS_FILE].count(), "records": self._files[RECORDS_FILE].count()}
            with contextlib.suppress(Exception):  # without it, rows that are cut off later are not missed
                write_atomically(self.path / META, metadata_text(self._about | {"closed": counts}))
        self.release()

    def release(self) -> None:
        """Close the files and release the folder, without writing anything to it."""
        files, self._files = self._files, {}
        for file in files.values():
            file.close()
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)
        if _open_writers.get(os.path.realpath(self.path)) is self:
            del _open_writers[os.path.realpath(self.path)]

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append_record(self, record: Mapping[str, Any]) -> None:
        file = self._file(RECORDS_FILE)
        self._write(file, record_line(record, file.count(), self._about["seal"]))

    def _save_array(self, array: NDArray[Any]) -> str:
        if not self.path.exists():
            raise Unwritten(f"The run folder {self.path} is gone, so arrays cannot be written.")
        try:
            return save_array(self.path / ARRAYS, array)
        except OSError as error:
            raise _unwritten(self.path / ARRAYS, error) from None

    def _file(self, name: str) -> Growing:
        if name not in self._files:
            raise RunError(f"The run {self.path} is closed; open it again with resume=True to go on writing.")
        return self._files[name]

    def _write(self, file: Growing, data: bytes, records: int = 1) -> None:
        try:
            file.append(data, records)
        except OSError as error:
            raise _unwritten(file.path, error) from None


def _unwritten(path: Path, error: OSError) -> Unwritten:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "free some space" if full else "see that the folder can be written to"
    return Unwritten(f"{path} cannot be written ({error.strerror}); {advice}.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _close_in_child() -> None:
    for writer in list(_open_writers.values()):
        writer.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
