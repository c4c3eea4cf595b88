"""What a path holds: the folder of a run, or a checkpoint, measured with `build` or looked at by itself."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diag.errors import CheckpointError
from diag.run.checkpoints import from_checkpoints
from diag.run.files import META
from diag.run.run import Run, read_run
from diag.run.state_files import from_state_files

PathOfRun = str | os.PathLike[str]


def opened(path: PathOfRun, build: Any = None, first: PathOfRun | None = None) -> Run:
    """The run at `path`, or one made of the checkpoint there.

    build: the function that gives `(model, loss_fn, data)`, or its name, for checkpoints that are to be measured.
    first: what it is compared with, a checkpoint like this one where it is one that is not measured.
    Raises RunError or CheckpointError where the path does not hold what it should.
    """
    path = Path(path)
    if _is_run(path) or not path.exists():
        return read_run(path)
    if build is not None:
        return from_checkpoints([path], build)
    if first is not None and _is_run(Path(first)):
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


def _is_run(path: Path) -> bool:
    return (path / META).is_file()
