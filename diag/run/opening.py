"""What a path holds: the folder of a run, or a checkpoint, measured with `build` or looked at by itself."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diag.errors import CheckpointError, RunError
from diag.run.checkpoints import from_checkpoints
from diag.run.files import META
from diag.run.reading import read_run
from diag.run.run import Run
from diag.run.state_files import from_state_files

PathOfRun = str | os.PathLike[str]
LOGS = (".csv", ".jsonl")


def opened(path: PathOfRun, build: Any = None, first: PathOfRun | None = None) -> Run:
    """The run at `path`, or one made of the checkpoint there.

    build: the function that gives `(model, loss_fn, data)`, or its name, for checkpoints that are to be measured.
    first: what it is compared with, a checkpoint like this one where it is one that is not measured.
    Raises RunError or CheckpointError where the path does not hold what it should, or not of the kind of `first`.
    """
    path = Path(path)
    against_files = first is not None and Path(first).exists() and not build and not holds_run(Path(first))
    if holds_run(path) and against_files:
        raise CheckpointError(f"{path} is a run and {first} a checkpoint; give runs, or checkpoints, or a build.")
    if holds_run(path) or not path.exists():
        return read_run(path)
    refuse_log(path)
    if build is not None:
        return from_checkpoints([path], build)
    if first is not None and holds_run(Path(first)):
        return read_run(path)  # says that it holds none
    try:
        return from_state_files([path], before=first)
    except CheckpointError as error:
        if not path.is_dir():
            raise
        raise CheckpointError(f"{path} holds no run, and as a checkpoint: {error}") from None


def opened_against_first(paths: Iterable[PathOfRun], build: Any = None) -> list[Run]:
    """Each of the paths opened; checkpoints that are not measured are compared with the first."""
    first, *others = paths
    return [opened(first, build), *(opened(path, build, first) for path in others)]


def holds_run(path: Path) -> bool:
    """Whether it is the folder of a run, or the run.json in one."""
    return (path / META).is_file() or (path.name == META and path.is_file())


def refuse_log(path: Path) -> None:
    """Raises RunError where the file is another tool's log, of which a run can be made."""
    is_log = path.suffix.lower() in LOGS or path.name == "trainer_state.json" or "tfevents" in path.name
    if path.is_file() and is_log:
        raise RunError(f"{path} is a log and no checkpoint; make a run of it: diag import {path} -o RUN.")
