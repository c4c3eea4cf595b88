"""A run's folder: who may write to it, and making room for a new run, which can be killed at any moment.

A run that lies in the folder is moved to `previous-run/` (one generation), run.json first: from then on the folder
holds no run, and the next start continues where this one stopped. What is removed is renamed first, so that a half
removed folder is never taken for somebody else's.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

from diag.errors import RunError
from diag.run.files import (
    ARRAYS,
    LOCK,
    META,
    PREVIOUS,
    RECORDS_FILE,
    RUN_FOLDER_FORMAT,
    RUN_FOLDER_VERSION,
    STEPS_FILE,
    read_metadata,
)
from diag.run.records import OUTCOMES, read_records
from diag.run.rows import row_dtype

OURS = (META, STEPS_FILE, RECORDS_FILE, ARRAYS, LOCK)
MOVING, REMOVING = f"{PREVIOUS}.moving", f"{PREVIOUS}.removing"


def take(descriptor: int, path: Path) -> None:
    """Lock the open lock file for this process; RunError where another one holds it."""
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


def is_being_written(path: Path) -> bool:
    """Whether a process that lives holds the run's lock; where there are no locks, whether it was not closed."""
    try:
        import fcntl
    except ImportError:
        return "closed" not in read_metadata(path)[0]
    try:
        with open(path / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        return False
    return False


def set_aside(folder: Path) -> None:
    """Move a run that lies in `folder` to `previous-run/`, replacing the one kept there; one that has neither a
    step nor a result is removed, so that a failed start does not replace a run.

    Raises RunError where something that diag did not write has one of the names; nothing is moved then.
    """
    ours = [folder / name for name in OURS if name != LOCK and (folder / name).exists()]
    moving, kept = folder / MOVING, folder / PREVIOUS
    tidy(folder)
    if not moving.exists():
        if all(_is_empty(file) for file in ours):  # of a start that was killed, or nothing
            return
        version = _refuse_foreign(folder, ours[0])
        if version == RUN_FOLDER_VERSION and not _has_begun(folder):
            for file in ours:
                _remove(file)
            return
    if kept.exists() and not {file.name for file in kept.iterdir()} <= set(OURS):
        _refuse_foreign(kept, kept)
    moving.mkdir(exist_ok=True)
    for file in ours:
        file.replace(moving / file.name)
    if kept.exists():
        kept.replace(_unused(folder))
    moving.replace(kept)
    tidy(folder)


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0


def _has_begun(folder: Path) -> bool:
    """Whether the run has a step or a result, or may have had one before it was damaged."""
    try:
        metadata, _ = read_metadata(folder)
        if (folder / STEPS_FILE).stat().st_size >= row_dtype(metadata["row"]).itemsize:
            return True
        records = read_records(folder / RECORDS_FILE, metadata["seal"])
    except (OSError, RunError):
        return True
    return bool(records.damaged or any(r["type"] in OUTCOMES for r in records.all))


def _remove(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def _unused(folder: Path) -> Path:
    numbers = itertools.count(2)
    name = folder / REMOVING
    while name.exists():
        name = folder / f"{REMOVING}-{next(numbers)}"
    return name


def tidy(folder: Path) -> None:
    """Remove what a killed start left: runs that were renamed to be removed (what others have put into them stays),
    and a folder into which nothing was moved yet."""
    with contextlib.suppress(OSError):  # it is not there, or holds a part of a run
        (folder / MOVING).rmdir()
    for rest in folder.glob(f"{REMOVING}*"):
        for file in (rest / name for name in OURS):
            _remove(file)
        with contextlib.suppress(OSError):  # it holds what is not ours
            rest.rmdir()


def _refuse_foreign(folder: Path, what: Path) -> Any:
    """Raise RunError unless diag wrote the run.json of `folder`, whatever its format's version; return that."""
    try:
        data = json.loads((folder / META).read_bytes())
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or data.get("format") != RUN_FOLDER_FORMAT:
        raise RunError(f"{what} was not written by diag and is in the way; give another run folder.")
    return data.get("format_version")
